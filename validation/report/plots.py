"""Plots as a grid of rows: a label, a small inline SVG with positions in per cent, and the figure.

Such a plot follows the width of the page while its text keeps its size, so that one drawing is legible on a
phone, on a desk and in print. Rows touch, so lines through all of them look continuous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

_ROW_HEIGHT = 26
_MIDDLE = _ROW_HEIGHT // 2


class Row(NamedTuple):
    """One value with its interval."""

    label: str
    value: float
    text: str
    tone: str
    """CSS class that colours the mark: `ref`, `one`, `two`, `three`."""
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    """A tick on the row, such as a baseline."""


class Group(NamedTuple):
    """Rows under one heading."""

    heading: str
    rows: Sequence[Row]


class Scale(NamedTuple):
    """A linear axis: its ends, and where its labels stand."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def percent(self, value: float) -> float:
        """Position of a value on the axis, in per cent of its length, kept inside it."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)


def intervals(
    title: str, groups: Sequence[Group], scale: Scale, marks: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Dots with their intervals.

    Args:
        title: read out by screen readers.
        marks: lines through all rows at a value, each with a CSS class (`zero`, `margin`).
    """

    def mark(row: Row) -> Markup:
        parts = Markup("")
        if row.low is not None and row.high is not None:
            parts += _line(
                f"span {row.tone}", scale.percent(row.low), scale.percent(row.high), _MIDDLE, _MIDDLE
            )
        if row.reference is not None:
            x = scale.percent(row.reference)
            parts += _line("tick", x, x, _MIDDLE - 6, _MIDDLE + 6)
        return parts + Markup('<circle class="dot {}" cx="{}%" cy="{}" r="4.5"/>').format(
            row.tone, scale.percent(row.value), _MIDDLE
        )

    return _grid(title, groups, scale, marks, mark)


def bars(title: str, groups: Sequence[Group], scale: Scale) -> Markup:
    """Horizontal bars from the low end of the axis."""

    def mark(row: Row) -> Markup:
        return Markup('<rect class="bar {}" x="0" width="{}%" y="{}" height="10" rx="1.5"/>').format(
            row.tone, max(0.3, scale.percent(row.value)), _MIDDLE - 5
        )

    return _grid(title, groups, scale, (), mark)


def _grid(
    title: str,
    groups: Sequence[Group],
    scale: Scale,
    marks: Sequence[tuple[float, str]],
    mark: Callable[[Row], Markup],
) -> Markup:
    through = Markup("").join(
        _line(kind, scale.percent(value), scale.percent(value), 0, _ROW_HEIGHT) for value, kind in marks
    )
    track = _line("track", 0, 100, _MIDDLE, _MIDDLE)
    parts = [Markup('<div class="plot" role="group" aria-label="{}">').format(title)]
    for group in groups:
        parts.append(Markup('<div class="head">{}</div>').format(group.heading))
        for row in group.rows:
            drawing = Markup('<svg height="{}" aria-hidden="true">{}</svg>').format(
                _ROW_HEIGHT, track + through + mark(row)
            )
            parts.append(
                Markup('<div class="label">{}</div>{}<div class="value">{}</div>').format(
                    row.label, drawing, row.text
                )
            )
    labels = Markup("").join(_tick_label(scale.percent(value), label) for value, label in scale.ticks)
    parts.append(
        Markup('<div></div><svg height="18" aria-hidden="true">{}</svg><div></div></div>').format(labels)
    )
    return Markup("").join(parts)


def _line(kind: str, x1: float, x2: float, y1: int, y2: int) -> Markup:
    return Markup('<line class="{}" x1="{}%" x2="{}%" y1="{}" y2="{}"/>').format(kind, x1, x2, y1, y2)


def _tick_label(x: float, label: str) -> Markup:
    anchor = "start" if x < 4 else "end" if x > 96 else "middle"
    return Markup('<text x="{}%" y="13" text-anchor="{}">{}</text>').format(x, anchor, label)


def share_scale() -> Scale:
    """0 to 100 %."""
    return Scale(0.0, 1.0, [(t / 100, f"{t} %") for t in (0, 50, 100)])


def points_scale(values: Sequence[float]) -> Scale:
    """Symmetric about zero, wide enough for all values, in percentage points."""
    reach = max([1.0, *(abs(v) for v in values)])
    step = next((s for s in (1, 2, 5, 10, 20, 50) if s * 3 >= reach), 50)
    end = step * max(1, -int(-reach // step))
    return Scale(-end, end, [(-end, f"\N{MINUS SIGN}{end:g}"), (0.0, "0"), (end, f"+{end:g}")])


def speed_scale(values: Sequence[float]) -> Scale:
    """From zero to a round number at or above all values."""
    top = max([1e-9, *values])
    magnitude = 1e-9
    while magnitude * 10 <= top:
        magnitude *= 10
    end = next(
        m * magnitude for m in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if m * magnitude >= top * (1 - 1e-9)
    )
    return Scale(0.0, end, [(0.0, "0"), (end / 2, f"{end / 2:g}"), (end, f"{end:g}")])


class Heat(NamedTuple):
    """One cell of a heat map."""

    share: float
    """0 to 1; the depth of the colour."""
    text: str
    below: str = ""
    """A second, smaller line."""


_CELL_HEIGHT = 42


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Heat | None]]],
    *,
    across: str = "",
) -> Markup:
    """Rows of coloured cells, each with its figure: colour alone is not read by everyone. None: not measured.

    Args:
        title: read out by screen readers.
        rows: (label, one cell a column).
        across: what the columns are; stands above their labels.
    """
    width = 100 / max(1, len(columns))

    def cell(at: int, heat: Heat | None) -> Markup:
        x, middle = round(at * width, 2), round((at + 0.5) * width, 2)
        box = Markup('<rect class="{}" x="{}%" y="1" width="{}%" height="{}" fill-opacity="{}"/>').format(
            "heat none" if heat is None else "heat",
            x,
            round(width - 0.4, 2),
            _CELL_HEIGHT - 2,
            0 if heat is None else round(0.06 + 0.84 * min(1.0, max(0.0, heat.share)), 3),
        )
        if heat is None:
            return box + _words(middle, 26, "–")
        kind = "on" if heat.share > 0.55 else "off"
        if not heat.below:
            return box + _words(middle, 26, heat.text, kind)
        return box + _words(middle, 18, heat.text, f"{kind} strong") + _words(middle, 34, heat.below, kind)

    parts = [Markup('<div class="plot heat" role="group" aria-label="{}">').format(title)]
    if across:
        parts.append(Markup('<div></div><div class="label over">{}</div><div></div>').format(across))
    heads = Markup("").join(_words(round((at + 0.5) * width, 2), 13, name) for at, name in enumerate(columns))
    parts.append(Markup('<div></div><svg height="18">{}</svg><div></div>').format(heads))
    for label, cells in rows:
        drawing = Markup("").join(cell(at, heat) for at, heat in enumerate(cells))
        parts.append(
            Markup('<div class="label">{}</div><svg height="{}">{}</svg><div></div>').format(
                label, _CELL_HEIGHT, drawing
            )
        )
    parts.append(Markup("</div>"))
    return Markup("").join(parts)


def _words(x: float, y: int, text: str, kind: str = "") -> Markup:
    return Markup('<text class="{}" x="{}%" y="{}" text-anchor="middle">{}</text>').format(kind, x, y, text)
