"""A small target and responses with hidden states made from a seed, to train drafts on without an engine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from packager.draft.prepare import DraftData, target_digest
from packager.recipe import DraftSpec

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

HIDDEN, VOCAB, LAYERS = 64, 96, 4
YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
TARGET: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 2048,
    "rope_scaling": YARN,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
SPEC = DraftSpec(
    vocab_size=48,
    aux_layers=(1, 2, 3),
    intermediate_size=128,
    prompts=64,
    steps=120,
    batch_tokens=512,
    learning_rate=3e-3,
    ttt_steps=3,
    seed=1,
)


def write_target(directory: Path) -> Path:
    """A target whose head reads its own embedding: state e(t) in the last layer means token t comes next."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(VOCAB, HIDDEN, generator=generator)
    tensors = {
        "model.word_embeddings.weight": embeddings,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": embeddings.clone(),
    }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(TARGET))
    return directory


def write_data(workdir: Path, target: Path) -> DraftData:
    """Responses of a deterministic language (next = 3 t + 1 within 40 tokens) and matching states."""
    (workdir / "states").mkdir(parents=True)
    embeddings = load_file(target / "model.safetensors")["model.word_embeddings.weight"]
    rng = random.Random(0)
    lines = []
    for index in range(64):
        prompt = [rng.randrange(3, 40) for _ in range(rng.randrange(5, 30))]
        response, token = [], prompt[-1]
        for _ in range(rng.randrange(6, 20)):
            token = (3 * token + 1) % 37 + 3
            response.append(token)
        ids = prompt + response
        noise = torch.randn(len(ids) - 1, 4, HIDDEN, generator=torch.Generator().manual_seed(index))
        states = noise * 0.1
        states[:, 3] += embeddings[ids[1:]].float()
        states[:, 2] += embeddings[ids[:-1]].float()
        name = f"{index:06d}.safetensors"
        save_file(
            {"hidden_states": states.bfloat16(), "token_ids": torch.tensor(ids[:-1])},
            workdir / "states" / name,
        )
        row = {
            "index": index,
            "id": f"p{index}",
            "task": "chain",
            "language": "zh" if index % 4 == 0 else "en",
            "prompt_ids": prompt,
            "response_ids": response,
            "text": "",
            "states": name,
        }
        lines.append(json.dumps(row))
    (workdir / "responses.jsonl").write_text("\n".join(lines) + "\n")
    (workdir / "complete").touch()
    (workdir / "spec.json").write_text(SPEC.model_dump_json())
    return DraftData(workdir, target_digest(target))
