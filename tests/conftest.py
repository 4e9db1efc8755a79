"""A tiny BailingMoeV2 checkpoint with random weights, written by the safetensors library itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}

MakeCheckpoint = Callable[..., Path]


def write_checkpoint(
    path: Path, *, shards: int = 1, mtp_layers: int = 0, seed: int = 0, **overrides: Any
) -> Path:
    """Write a checkpoint: one file, or `shards` files with an index; `overrides` change the config."""
    import torch
    from safetensors.torch import save_file

    from packager.bailing.config import BailingConfig
    from packager.bailing.layout import Role, expected_tensors

    raw = {**TINY_CONFIG, **overrides}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for want in expected_tensors(BailingConfig.parse(raw), mtp_layers):
        values = torch.randn(want.shape, generator=generator) * 0.05
        tensors[want.name] = values if want.role is Role.EXPERT_BIAS else values.bfloat16()
    path.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        names, weight_map = list(tensors), {}
        for number in range(shards):
            shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[number::shards]}
            save_file(part, path / shard, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, shard))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(raw))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    (path / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture
def impatient_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub client waits for nothing, knows no token, and caches in the test's own folder."""
    from huggingface_hub import constants

    from packager.checkpoint import hub_faults

    monkeypatch.setattr(hub_faults, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> MakeCheckpoint:
    """A factory: `make_checkpoint(name="source", **arguments of write_checkpoint)`."""

    def make(name: str = "source", **arguments: Any) -> Path:
        return write_checkpoint(tmp_path / name, **arguments)

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sharded tiny checkpoint for the whole session; never write into it."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "source", shards=3)
