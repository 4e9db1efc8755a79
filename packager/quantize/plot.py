"""The fidelity ledger as a picture: the signal-to-noise ratio of every quantized weight, layer by layer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from packager.quantize.fidelity import LedgerEntry, layer_of

PLOT_NAME = "fidelity.svg"
_WIDTH, _HEIGHT = 960, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 64, 46
"""Margins, in pixels."""
_COLOURS = ("#3366aa", "#cc5511", "#228844", "#884499", "#997700", "#007788", "#bb3355", "#555555")


@dataclass(frozen=True)
class _Mark:
    """The weights of one role in one layer."""

    x: float
    low: float
    high: float
    middle: float
    colour: str
    says: str


def ledger_svg(entries: Sequence[LedgerEntry], gate_db: float | None) -> bytes:
    """An SVG of a ledger; equal ledgers give equal bytes.

    For each role and layer a line from the worst weight to the best, and a dot at the median.

    Args:
        entries: the quantized weights. Those without an error, and those outside of the layers, have no place
            in the picture.
        gate_db: the bound that each weight has to reach, drawn as a line; None: there is none.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found: defaultdict[tuple[str, int], list[tuple[float, str]]] = defaultdict(list)
    for entry in entries:
        layer = layer_of(entry.name)
        if layer is not None and entry.snr_db is not None:
            found[entry.role, layer].append((entry.snr_db, entry.name))
    values = [value for group in found.values() for value, _ in group] or [0.0]
    bounds = [*values] if gate_db is None else [*values, gate_db]
    bottom, top = math.floor(min(bounds) - 0.5), math.ceil(max(bounds) + 0.5)
    layers = sorted({layer for _, layer in found}) or [0]
    roles = sorted({role for role, _ in found})
    column = (_WIDTH - _LEFT - _RIGHT) / len(layers)
    colours = {role: _COLOURS[at % len(_COLOURS)] for at, role in enumerate(roles)}

    def height(decibels: float) -> float:
        share = (top - decibels) / (top - bottom)
        return round(_TOP + share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def mark(role: str, layer: int, group: Sequence[tuple[float, str]]) -> _Mark:
        worst, name = min(group)
        place = layers.index(layer) + (roles.index(role) + 1) / (len(roles) + 1)
        return _Mark(
            x=round(_LEFT + column * place, 1),
            low=height(worst),
            high=height(max(group)[0]),
            middle=height(median(value for value, _ in group)),
            colour=colours[role],
            says=f"{role}, layer {layer}: {len(group)} weights, worst {worst:.2f} dB ({name})",
        )

    step = max(1, math.ceil((top - bottom) / 8))
    every = max(1, math.ceil(len(layers) / 32))
    environment = Environment(
        loader=PackageLoader("packager.quantize", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(f"{PLOT_NAME}.jinja").render(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        bottom=_HEIGHT - _BOTTOM,
        weights=len(entries),
        gate=None if gate_db is None else (height(gate_db), f"{gate_db:g}"),
        levels=[(height(level), level) for level in range(bottom, top + 1, step)],
        layers=[(round(_LEFT + column * (at + 0.5), 1), n) for at, n in enumerate(layers) if at % every == 0],
        legend=[(round(_LEFT + 150 * at, 1), colours[role], role) for at, role in enumerate(roles)],
        marks=[mark(role, layer, group) for (role, layer), group in sorted(found.items())],
    )
    return text.encode()
