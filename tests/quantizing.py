"""Quantizing a small checkpoint into several shards, and looking at what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packager.artifact import Manifest
from packager.quantize import quantize
from packager.recipe import SCALE_ROUNDINGS, QuantizeSpec, SchemeName

SMALL = QuantizeSpec(shard_bytes=60_000)
"""Several shards even of the tiny checkpoint."""
SCHEMES: tuple[SchemeName, ...] = tuple(SCALE_ROUNDINGS)
EVERY_SCHEME = [
    QuantizeSpec(shard_bytes=60_000, scheme=scheme, scale_rounding=rounding)
    for scheme, roundings in SCALE_ROUNDINGS.items()
    for rounding in roundings
]


def run(source: Path, out: Path, spec: QuantizeSpec = SMALL, **options: Any) -> Manifest:
    """`quantize`; what it says goes to the list `lines`, if that is given."""
    lines: list[str] = options.pop("lines", [])
    return quantize(source, out, spec, recipe_digest=spec.digest, progress=lines.append, **options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
