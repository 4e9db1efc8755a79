"""Inline SVG without a view box: horizontal positions in per cent, sizes in pixels.

Such a picture follows the width of the page while its text keeps its size, so that one drawing is legible on
a phone, on a desk and in print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

_ROW = 30
_HEAD = 26
_AXIS = 30


class Row(NamedTuple):
    """One value with its interval, drawn on a line of its own."""

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
    """Rows under one heading; an empty heading takes no room."""

    heading: str
    rows: Sequence[Row]


class Scale(NamedTuple):
    """A linear axis: its ends, where its labels stand, and how they read."""

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
        marks: full-height lines at a value, each with a CSS class (`zero`, `margin`).
    """
    body: list[Markup] = []

    def mark(row: Row, y: int) -> None:
        if row.low is not None and row.high is not None:
            low, high = scale.percent(row.low), scale.percent(row.high)
            body.append(
                Markup('<line class="span {}" x1="{}%" x2="{}%" y1="{}" y2="{}"/>').format(
                    row.tone, low, high, y, y
                )
            )
        if row.reference is not None:
            x = scale.percent(row.reference)
            body.append(
                Markup('<line class="tick" x1="{}%" x2="{}%" y1="{}" y2="{}"/>').format(x, x, y - 6, y + 6)
            )
        body.append(
            Markup('<circle class="dot {}" cx="{}%" cy="{}" r="4.5"/>').format(
                row.tone, scale.percent(row.value), y
            )
        )

    return _figure(title, groups, scale, marks, body, mark)


def bars(title: str, groups: Sequence[Group], scale: Scale) -> Markup:
    """Horizontal bars from the axis' low end."""
    body: list[Markup] = []

    def mark(row: Row, y: int) -> None:
        body.append(
            Markup('<rect class="bar {}" x="0" width="{}%" y="{}" height="8" rx="1.5"/>').format(
                row.tone, max(0.3, scale.percent(row.value)), y - 4
            )
        )

    return _figure(title, groups, scale, (), body, mark)


def _figure(
    title: str,
    groups: Sequence[Group],
    scale: Scale,
    marks: Sequence[tuple[float, str]],
    body: list[Markup],
    mark: Callable[[Row, int], None],
) -> Markup:
    texts: list[Markup] = []
    y = 4
    top = y
    for group in groups:
        if group.heading:
            texts.append(Markup('<text class="head" x="0" y="{}">{}</text>').format(y + 15, group.heading))
            y += _HEAD
        for row in group.rows:
            texts.append(Markup('<text class="label" x="0" y="{}">{}</text>').format(y + 10, row.label))
            texts.append(Markup('<text class="value" x="100%" y="{}">{}</text>').format(y + 10, row.text))
            # The track is drawn first, so the mark lies on top of it.
            body.append(Markup('<line class="track" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(y + 20))
            mark(row, y + 20)
            y += _ROW
        y += 8
    bottom = y
    grid: list[Markup] = []
    for value, label in scale.ticks:
        x = scale.percent(value)
        anchor = "start" if x < 4 else "end" if x > 96 else "middle"
        texts.append(
            Markup('<text class="axis" x="{}%" y="{}" text-anchor="{}">{}</text>').format(
                x, bottom + 14, anchor, label
            )
        )
    for value, kind in marks:
        x = scale.percent(value)
        grid.append(
            Markup('<line class="{}" x1="{}%" x2="{}%" y1="{}" y2="{}"/>').format(kind, x, x, top, bottom)
        )
    height = bottom + _AXIS - 8
    return Markup('<svg class="plot" role="img" width="100%" height="{}"><title>{}</title>{}</svg>').format(
        height, escape(title), Markup("").join([*grid, *body, *texts])
    )


def share_scale() -> Scale:
    """0 to 100 %."""
    return Scale(0.0, 1.0, [(t / 100, f"{t} %") for t in (0, 25, 50, 75, 100)])


def points_scale(values: Sequence[float]) -> Scale:
    """Symmetric about zero, wide enough for all values, in percentage points."""
    reach = max([1.0, *(abs(v) for v in values)])
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * 3 >= reach or s == 100)
    end = step * max(1, -(-reach // step))
    ticks = [
        (t, ("+" if t > 0 else "\N{MINUS SIGN}" if t < 0 else "") + f"{abs(t):g}") for t in (-end, 0.0, end)
    ]
    return Scale(-end, end, ticks)


def speed_scale(values: Sequence[float]) -> Scale:
    """From zero to a round number above all values."""
    top = max([1e-9, *values])
    magnitude = 1.0
    while magnitude * 10 <= top:
        magnitude *= 10
    while magnitude > top:
        magnitude /= 10
    end = next(m * magnitude for m in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if m * magnitude >= top)
    return Scale(0.0, end, [(0.0, "0"), (end / 2, f"{end / 2:g}"), (end, f"{end:g}")])
