"""Evidence from a GPU, cell by cell: `python tests/gpu/measure.py PIECE… --out DIR`; see README.md here."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from cells import Cell, run_cells  # noqa: E402


def _conversion(scale: str) -> Iterator[Cell]:
    from conversion import conversion_cells

    return conversion_cells(_device(), scale)


def _drafts(scale: str) -> Iterator[Cell]:
    from drafts import draft_cells

    return draft_cells(_device(), scale)


PIECES: dict[str, Callable[[str], Iterator[Cell]]] = {"conversion": _conversion, "drafts": _drafts}
"""`serving` is beside them: it keeps files of its own."""


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _stamp(scale: str) -> dict[str, Any]:
    """What every file says of the machine and of how it was made."""
    from validation.environment import collect_environment

    environment = collect_environment()
    return {
        "scale": scale,
        "command": ["python", "tests/gpu/measure.py", *sys.argv[1:]],
        "environment": environment.model_dump(mode="json"),
        "commit": os.environ.get("MEASURED_COMMIT"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pieces", nargs="+", choices=(*PIECES, "serving"))
    parser.add_argument("--out", type=Path, required=True, help="one JSON file a cell; those there are kept")
    parser.add_argument("--scale", choices=("true", "nano"), default="true", help="nano: to try it on a CPU")
    parser.add_argument("--seconds", type=float, default=540.0, help="no cell begins that would not fit")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    cells: list[Cell] = []
    for piece in options.pieces:
        if piece == "serving":
            from serving import serving_cells

            cells += serving_cells(options.scale, options.out, options.seconds)
        else:
            cells += PIECES[piece](options.scale)
    if options.scale == "nano":
        cells = [dataclasses.replace(cell, seconds=min(cell.seconds, 20.0)) for cell in cells]
    return 0 if run_cells(cells, options.out, until, _stamp(options.scale)) else 1


if __name__ == "__main__":
    sys.exit(main())
