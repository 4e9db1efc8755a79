"""vLLM on dummy weights at the true shapes, through `packager validate throughput --shape`.

One command a cell; its own cache keeps every finished (variant, concurrency, lengths), so that a cell that
ran out of time goes on where it stopped. Single streams come first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cells import Cell, Figures

ROOT = Path(__file__).parents[2]
NANO = ROOT / "packager" / "nano" / "checkpoint" / "config.json"


def serving_cells(scale: str, out: Path, seconds: float) -> Iterator[Cell]:
    """MoE with drafts at four acceptances and without, and the dense model in BF16 and FP8."""
    if scale == "true":
        shapes = ["--shape", "ling-flash-2.0", "--baseline-shape", "seed-oss-36b"]
        acceptance, concurrency, requests = "1.9,2.5,3.1,3.4", "1,2,4,8,16,32,64", "16"
        lengths, precisions = ((1024, 1024), (16384, 1024)), ("bf16", "fp8-block")
    else:
        shapes = ["--shape", str(NANO), "--baseline-shape", str(NANO), "--baseline-shape-layers", "3"]
        acceptance, concurrency, requests = "1.9", "1,2", "4"
        lengths, precisions = ((48, 16),), ("bf16",)
    for prompt, answer in lengths:
        for precision in precisions:
            name = f"serving-{prompt}-{answer}-dense-{precision}"
            command = [sys.executable, "-m", "packager", "validate", "throughput", *shapes]
            command += ["--baseline-shape-scheme", precision, "--synthetic-acceptance", acceptance]
            command += ["--concurrency", concurrency, "--input-tokens", str(prompt)]
            command += ["--output-tokens", str(answer), "--repeats", "1", "--requests", requests]
            command += ["--residency", "alternate", "--cache", str(out / "sweep-cache")]
            yield Cell(name, lambda c=command, n=name: sweep(c, out / f"{n}.sweep.json", seconds), 60)  # type: ignore[misc]


def sweep(command: list[str], file: Path, seconds: float) -> Figures:
    """Run it; the sweep's own JSON lies beside the cell's. Raises RuntimeError with what it said last."""
    try:
        done = subprocess.run(
            [*command, "--out", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError("out of time; what was measured is kept, call again") from None
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    found = json.loads(file.read_text(encoding="utf-8"))
    return {
        "sweep": file.name,
        "marks": found["marks"],
        "ratios": [
            {key: one[key] for key in ("candidate", "baseline", "concurrency", "input_tokens", "ratio")}
            for one in found["ratios"]
        ],
    }
