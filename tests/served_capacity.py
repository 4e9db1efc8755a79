"""How many tokens a vLLM server's KV cache holds: by its own log, and by `packager plan`."""

from __future__ import annotations

import re
from pathlib import Path

from packager.checkpoint.source import read_json_object
from packager.layouts import Described
from packager.serving.plan import model_bytes

_REPORTED = re.compile(r"KV cache size: ([\d,]+) tokens")
SPACE = 1 << 30
"""Bytes that `packager.serving.cpu.cpu_environment` gives the cache."""


def reported(log: Path) -> int:
    """What the engine says at its start; AssertionError if it says nothing."""
    found = _REPORTED.search(log.read_text(encoding="utf-8", errors="replace"))
    assert found is not None, f"no KV cache size in {log}"
    return int(found[1].replace(",", ""))


def planned(model: Path, draft: Path | None = None) -> int:
    """What the plan says of so much space, a draft's layer counted."""
    config = Described.parse(read_json_object(model / "config.json"), str(model))
    return model_bytes(config, "bf16", draft=draft).tokens_in(SPACE)
