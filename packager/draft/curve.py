"""The course of a training run: `training.jsonl`, a line a step, and a picture of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

LOG_NAME = "training.jsonl"
PLOT_NAME = "training.svg"


class TrainingLog:
    """A JSONL file with one line a training step.

    `step` (from 1), `loss`, `length` and `accepted` (teacher-forced acceptance on the step's own batch),
    `learning_rate`, and where the head was evaluated `held_out` (`length`, `accepted`). No times: a run that
    was interrupted and resumed leaves the bytes of one that was not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._out: IO[str] | None = None

    def open_after(self, done: int) -> None:
        """Keep the lines of the first `done` steps, drop what a killed run wrote beyond its checkpoint."""
        kept = [row for row in read_log(self.path) if row["step"] <= done]
        part = self.path.with_suffix(".partial")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        part.replace(self.path)
        self._out = self.path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line; `flush` makes it last."""
        assert self._out is not None, "open_after comes first"
        self._out.write(json.dumps(dict(row)) + "\n")

    def flush(self) -> None:
        """Hand everything written to the operating system; before each checkpoint."""
        if self._out is not None:
            self._out.flush()

    def close(self) -> None:
        """Flush and close."""
        if self._out is not None:
            self._out.close()
            self._out = None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a torn last one counts for nothing, nor does a file that is not there."""
    rows = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def training_svg(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss and acceptance length over the steps, as SVG; equal logs give equal bytes.

    Thin lines are single steps, thick ones a moving average over a twentieth of the run, dots what was
    measured on held-out responses.
    """
    import matplotlib
    from matplotlib.figure import Figure

    window = max(1, len(rows) // 20)

    def smooth(values: Sequence[float]) -> list[float]:
        found = []
        for at in range(len(values)):
            part = values[max(0, at + 1 - window) : at + 1]
            found.append(sum(part) / len(part))
        return found

    # Text as text and a fixed salt: else the file differs from machine to machine and run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "packager"}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        upper, lower = figure.subplots(2, sharex=True)
        steps = [row["step"] for row in rows]
        for axes, key, colour in ((upper, "loss", "#3366aa"), (lower, "length", "#cc5511")):
            values = [row[key] for row in rows]
            axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.4)
            axes.plot(steps, smooth(values), color=colour, linewidth=1.8)
            axes.grid(alpha=0.3)
        held = [(row["step"], row["held_out"]["length"]) for row in rows if "held_out" in row]
        if held:
            lower.plot(*zip(*held, strict=True), "o", color="#228844", markersize=4, label="held out")
            lower.legend()
        upper.set_ylabel("loss")
        lower.set_ylabel("acceptance length, teacher-forced")
        lower.set_xlabel("step")
        out = BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
