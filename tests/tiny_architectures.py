"""Checkpoints of every declared architecture, small and random, written by the safetensors library itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packager.layouts import Expected, recognise

_SMALL = {
    "vocab_size": 72,
    "hidden_size": 136,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "max_position_embeddings": 64,
}
_EXPERTS = {"moe_intermediate_size": 144, "num_experts_per_tok": 2}

TINY: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", **_SMALL},
    "Qwen3ForCausalLM": {"model_type": "qwen3", **_SMALL},
    "SeedOssForCausalLM": {"model_type": "seed_oss", **_SMALL},
    "Qwen3MoeForCausalLM": {
        "model_type": "qwen3_moe",
        **_SMALL,
        **_EXPERTS,
        "num_experts": 4,
        "mlp_only_layers": [0],
    },
    "MixtralForCausalLM": {
        "model_type": "mixtral",
        **_SMALL,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "DeepseekV3ForCausalLM": {
        "model_type": "deepseek_v3",
        **_SMALL,
        **_EXPERTS,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 80,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_nextn_predict_layers": 1,
    },
    "BailingMoeV2ForCausalLM": {
        "model_type": "bailing_moe",
        **_SMALL,
        **_EXPERTS,
        "num_experts": 4,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_router_enable_expert_bias": True,
        "use_qk_norm": True,
    },
}


def tiny_config(architecture: str, **overrides: Any) -> dict[str, Any]:
    """config.json of a small model of that architecture."""
    return {"architectures": [architecture], **TINY[architecture], "torch_dtype": "bfloat16", **overrides}


def layout_of(raw: dict[str, Any], mtp_layers: int = 0) -> list[Expected]:
    """The tensors that its checkpoint must hold."""
    return [want for want in recognise(raw).tensors(mtp_layers=mtp_layers) if not want.optional]


def random_tensors(layout: list[Expected], dtype: str = "bfloat16", seed: int = 0) -> dict[str, Any]:
    """Random torch tensors of those shapes."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    values = {want.name: torch.randn(want.shape, generator=generator) * 0.05 for want in layout}
    return {name: value.to(getattr(torch, dtype)) for name, value in values.items()}


def write_tensors(path: Path, raw: dict[str, Any], *shards: dict[str, Any]) -> Path:
    """Write a checkpoint of these torch tensors: one file, or one a shard with an index."""
    from safetensors.torch import save_file

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(raw))
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors")
        return path
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, path / name)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def write_tiny(
    path: Path, architecture: str, *, mtp_layers: int = 0, dtype: str = "bfloat16", **overrides: Any
) -> Path:
    """Write a small checkpoint of that architecture in one file."""
    raw = tiny_config(architecture, **overrides)
    return write_tensors(path, raw, random_tensors(layout_of(raw, mtp_layers), dtype))
