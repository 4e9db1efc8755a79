"""Draft training at the true shape: tokens a second, memory, share of the chip's rate, against speculators.

Hidden states are random: speed does not depend on them. Both loops are those of
`benchmarks/draft_training.py`, over the same files.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Figures

ROOT = Path(__file__).parents[2]
TRUE = {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "vocab_size": 157184,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000.0,
    "partial_rotary_factor": 0.5,
}
NANO = TRUE | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "vocab_size": 2048,
}


def draft_cells(device: torch.device, scale: str) -> Iterator[Cell]:
    """Ours and speculators' at each length."""
    lengths, samples = ((4096, 16384), 6) if scale == "true" else ((256,), 4)
    seconds = 20.0 if scale == "true" else 1.0
    for length in lengths:
        for which in ("packager", "speculators"):
            yield Cell(
                f"draft-{which}-{length}",
                lambda w=which, n=length: train(device, scale, w, n, samples, seconds),  # type: ignore[misc]
                90,
            )


def train(device: torch.device, scale: str, which: str, length: int, samples: int, seconds: float) -> Figures:
    """Rates of one loop over samples of `length` tokens, half of them prompt.

    `of_matrix_rate` counts 6 operations a trained parameter and padded token for every training-time-test
    step, the output head included, over the matrix rate that the same process measures.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import draft_training as loops
    from conversion import ceilings

    from packager.draft.config import draft_config
    from packager.draft.loss import Target
    from packager.draft.ranks import Ranks
    from packager.draft.train import Trainer
    from packager.draft.vocabulary import VocabularyMap
    from packager.recipe import DraftSpec

    config: dict[str, Any] = TRUE if scale == "true" else NANO
    size = 32000 if scale == "true" else 512
    layers = config["num_hidden_layers"]
    spec = DraftSpec(
        vocab_size=size,
        aux_layers=(2, layers // 2, layers - 3),
        prompts=samples,
        steps=10**6,
        batch_tokens=length,
        optimizer="adamw",
    )
    generator = torch.Generator().manual_seed(0)
    vocabulary = VocabularyMap(tuple(range(size)), config["vocab_size"])
    hidden = config["hidden_size"]
    weights = Target(
        torch.randn(config["vocab_size"], hidden, generator=generator) * 0.02,
        torch.randn(size, hidden, generator=generator) * 0.02,
        torch.ones(hidden),
        config["rms_norm_eps"],
    )
    draft = draft_config(config, spec)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        found = _samples(root, samples, length, hidden, size, generator)
        trainer = Trainer(draft, weights, vocabulary, spec, root / "state", ranks=Ranks(device=device))
        if which == "packager":
            loop = loops.ours(trainer, found)
        else:
            arrow = loops.peer_data(found, root / "arrow")
            attention = "sdpa"
            model = loops.peer_model(draft, weights, vocabulary, trainer, attention).to(device)
            loop = loops.theirs(model, arrow, spec, hidden, length, trainer.bf16)
        loops.timed(loop, seconds / 4)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        work = loops.timed(loop, seconds)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
        parameters = sum(p.numel() for p in trainer.head.parameters() if p.requires_grad)
    response, padded = work.rates
    rate = ceilings(device, scale)["bf16_tflop_s"]
    return {
        "response_tokens_s": response,
        "padded_tokens_s": padded,
        "steps": work.steps,
        "peak_memory_gb": peak,
        "parameters": parameters,
        "bf16_tflop_s": rate,
        "of_matrix_rate": 6 * parameters * padded * spec.ttt_steps / (rate * 1e12),
        "length": length,
    }


def _samples(
    root: Path, count: int, length: int, hidden: int, vocabulary: int, generator: torch.Generator
) -> list[Any]:
    from safetensors.torch import save_file

    from packager.draft.states import Sample

    found = []
    for number in range(count):
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        states = torch.randn(length - 1, 4, hidden, generator=generator).bfloat16()
        path = root / f"{number}.safetensors"
        save_file({"hidden_states": states, "token_ids": ids[:-1].contiguous()}, path)
        found.append(Sample(path, length // 2, tuple(ids.tolist())))
    return found
