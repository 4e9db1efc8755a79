"""Measurements as cells: each leaves a JSON file, is skipped where that exists, begins only if it fits."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    name: str
    measure: Callable[[], Figures]
    seconds: float
    """What it takes at most on the machine it is meant for; a guess until it was run there."""


def run_cells(cells: Iterable[Cell], out: Path, until: float, stamp: Figures) -> bool:
    """Measure what has no file yet, as long as `time.monotonic()` stays below `until`.

    A failing cell leaves `NAME.failed.json` with its error, and the others go on. Returns whether every cell
    has its file now.
    """
    out.mkdir(parents=True, exist_ok=True)
    complete = True
    for cell in cells:
        file = out / f"{cell.name}.json"
        if file.exists():
            print(f"{cell.name}: done before", file=sys.stderr)
            continue
        if time.monotonic() + cell.seconds > until:
            print(f"{cell.name}: not begun, {cell.seconds:.0f} s do not fit", file=sys.stderr)
            complete = False
            continue
        began = time.monotonic()
        try:
            figures = cell.measure()
        except Exception as err:
            complete = False
            _write(out / f"{cell.name}.failed.json", {"error": f"{type(err).__name__}: {err}", **stamp})
            print(f"{cell.name}: {type(err).__name__}: {err}", file=sys.stderr)
            continue
        spent = time.monotonic() - began
        _write(file, {"cell": cell.name, "seconds": round(spent, 2), **stamp, "figures": figures})
        (out / f"{cell.name}.failed.json").unlink(missing_ok=True)
        print(f"{cell.name}: {json.dumps(figures)[:300]}", file=sys.stderr)
    return complete


def _write(file: Path, document: Figures) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(file)
