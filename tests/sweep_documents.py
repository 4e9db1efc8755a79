"""Sweeps as documents: cells of a known engine, so that what is drawn and judged of them is known as well."""

from __future__ import annotations

import random
from typing import Any, Literal

from validation.environment import Environment
from validation.hardware import Hardware, parse_hardware
from validation.models import ServedModel, model_named
from validation.roofline import Draft, Setting, decode_step
from validation.sweep_model import Failure, Sweep, SweepCell, Variant, all_ratios, conclude_cell
from validation.throughput_cell import Cell, Spread

EFFICIENCY = 0.6
"""Of every step's bound that the engine of these sweeps reaches."""
LING = ServedModel(shape=model_named("ling-flash-2.0").model_copy(update={"name": "bundle"}), precision="fp8")
DRAFTED = LING.model_copy(update={"draft_tokens": 3, "draft_weight_bytes": 9e8, "draft_kv_bytes": 2048.0})
SEED = ServedModel(shape=model_named("seed-oss-36b"), precision="bf16")
ENVIRONMENT = Environment(
    cpu="a processor",
    cores=2,
    memory_gib=8.0,
    amx=False,
    gpus=(),
    system="Linux x86_64",
    python="3.11.0",
    versions={},
)


def digest(name: str) -> str:
    return "sha256:" + name.encode().hex().ljust(64, "0")[:64]


def variants(
    devices: int = 4, weights: Literal["real", "dummy"] = "real", acceptance: float = 2.5
) -> tuple[Variant, ...]:
    """Candidate with its draft, without it, and the dense baseline."""
    own: dict[str, Any] = {"devices": devices, "weights": weights}
    synthetic = weights == "dummy"
    return (
        Variant(
            name="FP8 + EAGLE3",
            role="candidate",
            subject=digest("bundle"),
            acceptance="synthetic" if synthetic else "measured",
            synthetic_acceptance_length=acceptance if synthetic else None,
            model=DRAFTED,
            **own,
        ),
        Variant(name="FP8", role="candidate without draft", subject=digest("fp8"), model=LING, **own),
        Variant(name="dense 36B", role="baseline", subject=digest("dense"), model=SEED, **own),
    )


def measured_cell(
    variant: Variant, hardware: Hardware, concurrency: int, prompt: int, answer: int, noise: random.Random
) -> Cell:
    """A run of 2 x concurrency requests at `EFFICIENCY`, give or take some per cent."""
    served, length = variant.model, None
    assert served is not None
    draft = None
    if served.draft_tokens is not None:
        length = variant.synthetic_acceptance_length or 2.5
        draft = Draft(
            weight_bytes=served.draft_weight_bytes,
            kv_bytes=served.draft_kv_bytes,
            tokens=served.draft_tokens,
            acceptance_length=length,
        )
    step = decode_step(
        served.shape,
        hardware.card,
        Setting(precision=served.precision, tensor=variant.devices, draft=draft),
        sequences=concurrency,
        context=prompt + answer / 2,
    )
    each = 1000 * step.seconds / (length or 1.0) / EFFICIENCY * (1 + 0.02 * noise.gauss(0, 1))
    requests, first = 2 * concurrency, 5.0 * concurrency
    seconds = 2 * (first + each * answer) / 1000
    spread = Spread(median=each, mean=each, p90=each, p95=each, p99=each)
    return Cell(
        concurrency=concurrency,
        requests=requests,
        completed=requests,
        failed=0,
        input_tokens=requests * prompt,
        output_tokens=requests * answer,
        duration_s=seconds,
        output_tokens_per_s=requests * answer / seconds,
        total_tokens_per_s=requests * (prompt + answer) / seconds,
        ttft_ms=Spread(median=first, mean=first, p99=first),
        tpot_ms=spread,
        itl_ms=spread,
        acceptance=None,
        reported_acceptance_length=length,
        output_lengths=(answer,) * requests,
    )


def make_sweep(
    *,
    seed: int = 0,
    on: str | None = "4xh200",
    concurrency: tuple[int, ...] = (1, 4, 16, 64),
    lengths: tuple[tuple[int, int], ...] = ((1024, 256), (8192, 256)),
    repeats: int = 3,
    weights: Literal["real", "dummy"] = "real",
    failed: int = 0,
    models: bool = True,
) -> Sweep:
    """A sweep on known hardware; its first `failed` cells ran out of memory."""
    hardware, noise = parse_hardware(on or "4xh200"), random.Random(seed)
    served, cells = variants(hardware.count, weights), list[SweepCell]()
    for variant in served:
        for prompt, answer in lengths:
            for level in concurrency:
                runs = [
                    measured_cell(variant, hardware, level, prompt, answer, noise) for _ in range(repeats)
                ]
                failure = None
                if len(cells) < failed:
                    failure = Failure(
                        kind="out of memory", message="CUDA out of memory", log_tail=("Traceback",)
                    )
                cells.append(conclude_cell(variant, level, prompt, answer, runs, failure=failure))
    if not models:
        served = tuple(one.model_copy(update={"model": None}) for one in served)
    return Sweep(
        residency="alternate",
        repeats=repeats,
        lengths="fixed",
        prefix_caching="off",
        variants=served,
        cells=tuple(cells),
        ratios=all_ratios(served, cells),
        prompts_digest=digest("prompts"),
        environment=ENVIRONMENT,
        hardware=hardware if on else None,
        marks=tuple(one.mark for one in served if one.mark),
    )
