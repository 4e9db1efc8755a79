"""JSONL files: one object a line, with the line it stands on, so that a fault can be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from validation.errors import MeasurementError


def read_jsonl(path: Path, remedy: str = "") -> list[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line that is not blank.

    Raises:
        MeasurementError: the file cannot be read, or a line is not a JSON object; file and line are named.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise MeasurementError(f"cannot read items from {path}: {err}", remedy) from None
    rows: list[tuple[int, dict[str, Any]]] = []
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as err:
            raise MeasurementError(f"{path}, line {number} is not JSON: {err}", remedy) from None
        if not isinstance(row, dict):
            raise MeasurementError(f"{path}, line {number} is not a JSON object", remedy)
        rows.append((number, row))
    return rows
