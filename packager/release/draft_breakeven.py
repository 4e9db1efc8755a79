"""Before any training: the acceptance length at which a draft would pay, from vLLM's synthetic acceptance.

An untrained draft of the right shape takes the time of a trained one. vLLM accepts its tokens at random with
given rates, and the speed of two or three acceptance lengths gives the line on which the wanted speed-ups
lie. Answers mean nothing, so all have the same length.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packager.checkpoint.source import Checkpoint
from packager.draft.acceptance import acceptance_from_metrics, ask
from packager.draft.config import draft_config, tensor_shapes
from packager.draft.speedup import NeededAcceptance, needed_acceptance
from packager.recipe import DraftSpec
from packager.serving import Server, ServeSpec

SPEEDUPS = (1.0, 1.5)
"""Speed-ups whose acceptance length is asked for."""


@dataclass(frozen=True)
class Point:
    """Speed at one synthetic acceptance length."""

    asked: float
    served: float
    """Acceptance length by the engine's counters."""
    tokens_per_s: float


@dataclass(frozen=True)
class Level:
    """One concurrency."""

    without: float
    """Output tokens/s without a draft."""
    points: tuple[Point, ...]
    line: NeededAcceptance

    def length_for(self, speedup: float) -> float | None:
        """Acceptance length that gives this speed-up; below 1 any draft does; None: speed does not grow."""
        return self.line.length_for(speedup * self.without)


@dataclass(frozen=True)
class Breakeven:
    """What a draft must reach, by concurrency."""

    tokens: int
    levels: dict[int, Level]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_speculative_tokens": self.tokens,
            "by_concurrency": {
                str(concurrency): {
                    "without_draft_tokens_per_s": level.without,
                    "points": [
                        {
                            "asked_length": p.asked,
                            "served_length": p.served,
                            "tokens_per_s": p.tokens_per_s,
                            "speedup": p.tokens_per_s / level.without,
                        }
                        for p in level.points
                    ],
                    "needed_length": {f"{ratio:g}": level.length_for(ratio) for ratio in SPEEDUPS},
                    "largest_distance_from_line": level.line.worst_residual,
                }
                for concurrency, level in self.levels.items()
            },
        }


def write_untrained(out: Path, target_config: Mapping[str, Any], spec: DraftSpec) -> Path:
    """A draft of `spec`'s shape with small random weights, which engines load; its guesses mean nothing."""
    import torch
    from safetensors.torch import save_file

    config = draft_config(target_config, spec)
    generator = torch.Generator().manual_seed(spec.seed)
    tensors: dict[str, Any] = {}
    for name, shape in tensor_shapes(config).items():
        if name == "d2t":
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
        elif name == "t2d":
            tensors[name] = torch.arange(shape[0]) < spec.vocab_size
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def measure_breakeven(
    serve: ServeSpec,
    spec: DraftSpec,
    prompts: Sequence[Mapping[str, Any]],
    *,
    tokens: int,
    concurrency: Sequence[int],
    output_tokens: int,
    repeats: int = 1,
    say: Callable[[str], None],
) -> Breakeven:
    """Serve without a draft, then with an untrained one at three synthetic acceptance lengths.

    Args:
        serve: the target.
        spec: shape of the draft: vocabulary, width, aux layers.
        tokens: draft tokens a step, K.
        output_tokens: of each answer, exactly.
        repeats: timed passes; the fastest counts, with and without a draft.

    Raises:
        BadInput: the draft does not fit the target. RemoteFailure: the engine fails.
    """
    wanted = (1.0, 1.0 + tokens / 2, 1.0 + tokens)
    without: dict[int, float] = {}
    points: dict[int, list[Point]] = {level: [] for level in concurrency}
    target_config = Checkpoint.open(serve.model).config()
    scratch = Path(tempfile.mkdtemp(prefix="draft-breakeven-"))
    try:
        draft = write_untrained(scratch / "draft", target_config, spec)
        for length in (None, *wanted):
            here = replace(serve, draft=None)
            if length is not None:
                here = replace(
                    serve, draft=draft, num_speculative_tokens=tokens, synthetic_acceptance_length=length
                )
            with Server(here, scratch / f"{length}.log") as server:
                name = here.served_name
                ask(server.url, name, prompts, max_tokens=2, concurrency=max(concurrency), ignore_eos=True)
                for level in concurrency:
                    before = server.metrics()
                    passes = [
                        ask(
                            server.url,
                            name,
                            prompts,
                            max_tokens=output_tokens,
                            concurrency=level,
                            ignore_eos=True,
                        )
                        for _ in range(repeats)
                    ]
                    answers = min(passes, key=lambda one: one.seconds)
                    speed = answers.output_tokens / answers.seconds
                    if length is None:
                        without[level] = speed
                        say(f"without a draft, concurrency {level}: {speed:.0f} tokens/s")
                        continue
                    served = acceptance_from_metrics(before, server.metrics()).length
                    points[level].append(Point(length, served, speed))
                    say(
                        f"acceptance length {served:.2f} (asked {length:.2f}), concurrency {level}: "
                        f"{speed:.0f} tokens/s"
                    )
    finally:
        shutil.rmtree(scratch / "draft", ignore_errors=True)  # logs stay: an error points to them
    shutil.rmtree(scratch)
    levels = {
        level: Level(
            without[level],
            tuple(found),
            needed_acceptance([(point.served, point.tokens_per_s) for point in found]),
        )
        for level, found in points.items()
    }
    return Breakeven(tokens, levels)
