"""Lines over two axes as data: what a picture shows, before anybody draws it.

The page draws it as SVG (`validation.report.chart`), the terminal in characters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_LOG_FROM = 5.0
"""An axis whose values span more than this factor is logarithmic."""


@dataclass(frozen=True)
class Point:
    """A value with its interval."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    """Stands beside it where there is room."""
    says: str = ""
    """The point in words, for those who point at it or hear it."""


@dataclass(frozen=True)
class Line:
    """Points that belong together."""

    name: str
    points: tuple[Point, ...]
    style: int
    """Lines of one style have one colour and one marker; 0 is the reference's."""
    bound: bool = False
    """Computed, not measured: dashed, without markers."""


@dataclass(frozen=True)
class Picture:
    """Lines over two axes."""

    key: str
    """Of letters, digits and hyphens; one of a kind on a page, and the name of its file."""
    title: str
    caption: str
    x_name: str
    y_name: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...] = ()
    """Horizontal lines at a value of y, such as the 3x that is claimed."""
    x_ticks: tuple[float, ...] = ()
    """Where x is labelled; none: at round numbers."""
    marks: tuple[str, ...] = field(default=())
    """What is not real about it; written into the picture, so that it is not lost with its surroundings."""

    @property
    def description(self) -> str:
        """All points in words."""
        said = "; ".join(
            f"{line.name}: {', '.join(p.says or f'{p.x:g} to {p.y:g}' for p in line.points)}"
            for line in self.lines
            if line.points and not line.bound
        )
        return f"{self.y_name} over {self.x_name}. {said}."


@dataclass(frozen=True)
class Axis:
    """A scale from values to shares of its length, 0 to 1."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Position of a value, kept on the axis."""
        if self.log:
            low, high, at = math.log(self.low), math.log(self.high), math.log(max(value, 1e-300))
        else:
            low, high, at = self.low, self.high, value
        return min(1.0, max(0.0, (at - low) / (high - low)))


def axes(picture: Picture) -> tuple[Axis, Axis]:
    """The scales of x and y that hold every point, interval and level."""
    points = [point for line in picture.lines for point in line.points]
    across = [point.x for point in points]
    up = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    return (
        _axis(across, picture.x_ticks),
        _axis([*up, *(value for value, _ in picture.levels)], zero=True),
    )


def shown(value: float) -> str:
    """A tick or a figure of three digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _axis(values: Iterable[float], fixed: Sequence[float] = (), *, zero: bool = False) -> Axis:
    kept = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = min(kept), max(kept)
    log = high / low > _LOG_FROM
    if log or low == high:
        room = max((high / low) ** 0.04, 1.06 if log else 1.5)
        low, high = low / room, high * room
    elif zero:
        low, high = 0.0, high * 1.06
    else:
        room = 0.04 * (high - low)
        low, high = low - room, high + room
    ticks = tuple(value for value in fixed if low <= value <= high)
    return Axis(low, high, log, ticks or _ticks(low, high, log=log))


def _ticks(low: float, high: float, *, log: bool) -> tuple[float, ...]:
    """Three to six round numbers."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
            if len(found) <= 6:
                break
        if len(found) > 1:
            return tuple(found[:: math.ceil(len(found) / 6)])
    unit = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if (high - low) / (m * unit) <= 5)
    first = math.ceil(low / step)
    return tuple(step * k for k in range(first, math.floor(high / step) + 1))
