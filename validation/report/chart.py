"""A picture as SVG that follows the width of the page while its text keeps its size.

Across, everything stands in per cent, and up and down in pixels; so a phone gets the same letters as a desk.
Lines differ by marker and by dash, not by colour alone; every point says what it is. Inside a page the page's
colours hold, light and dark; as a file it brings its own.
"""

from __future__ import annotations

import textwrap
from itertools import pairwise

from markupsafe import Markup

from validation.picture import Axis, Line, Picture, axes, shown

_HEIGHT = 280
"""Of the plot itself."""
_LEFT, _RIGHT = 13.0, 95.0
"""Between them lie the data, in per cent: labels of y have the room before."""
_END = 96
"""Where texts at the right end, in per cent."""
_ROW = 18
_WIDTH, _MARGIN = 720, 14
"""Of a file; per cent are of this width, so what is right of 96 % would be cut."""
_TONES = ("ref", "one", "two", "three")
_MARKERS = (
    ("square", "M-4-4H4V4H-4Z"),
    ("circle", "M-4.6 0A4.6 4.6 0 1 1 4.6 0A4.6 4.6 0 1 1-4.6 0Z"),
    ("diamond", "M0-6L6 0L0 6L-6 0Z"),
    ("triangle", "M0-5.4L5.4 4.4H-5.4Z"),
)
_DASHES = ("2 3", "6 4", "2 3 7 3", "9 3")
"""Of the bounds, by style."""
_STYLE = """
svg { --ink: #17212b; --soft: #52606d; --line: #dde3e8; --paper: #ffffff; --fail: #a0262b;
  --ref: #76828e; --one: #0b6b78; --two: #31508f; --three: #8a5a12; background: var(--paper);
  font-family: "Source Sans 3", "Helvetica Neue", Helvetica, Arial, "Noto Sans", sans-serif; }
@media (prefers-color-scheme: dark) { svg {
  --ink: #e4e9ee; --soft: #a3b0bc; --line: #2c3640; --paper: #12181e; --fail: #f08a8e;
  --ref: #94a3b1; --one: #38b2c1; --two: #8aa7e8; --three: #d9a44f; } }
text { font-size: 12px; fill: var(--soft); } .strong { fill: var(--ink); font-weight: 600; }
.grid { stroke: var(--line); } .even { stroke: var(--soft); } .said { fill: var(--fail); }
.level { stroke: var(--fail); stroke-dasharray: 6 3; }
.ref { stroke: var(--ref); fill: var(--ref); } .one { stroke: var(--one); fill: var(--one); }
.two { stroke: var(--two); fill: var(--two); } .three { stroke: var(--three); fill: var(--three); }
.path { stroke-width: 1.75; } .error { stroke-width: 1.5; }
.mark { stroke: var(--paper); stroke-width: 1.2; }
"""


def inline_svg(picture: Picture) -> Markup:
    """For a page whose style sheet knows the classes."""
    body, height = _drawn(picture)
    return Markup('<svg class="chart" width="100%" height="{}" role="img" aria-label="{}">{}</svg>').format(
        height, picture.title, body
    )


def svg_file(picture: Picture) -> str:
    """A file of its own, 720 wide, light or dark as its reader's screen is."""
    body, height = _drawn(picture)
    frame = f"{-_MARGIN} {-_MARGIN} {_WIDTH} {height + 2 * _MARGIN}"
    return str(
        Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}" viewBox="{}" role="img" '
            'aria-label="{}"><style>{}</style>{}</svg>\n'
        ).format(_WIDTH, height + 2 * _MARGIN, frame, picture.title, Markup(_STYLE), body)
    )


def _drawn(picture: Picture) -> tuple[Markup, int]:
    """What is inside of the `svg`, and its height."""
    x, y = axes(picture)
    lines = [line for line in picture.lines if line.points]
    parts = [Markup("<title>{}</title><desc>{}</desc>").format(picture.title, picture.description)]
    used = sorted({line.style % len(_MARKERS) for line in lines if not line.bound})
    shapes = (
        Markup('<path id="{}-{}" d="{}"/>').format(picture.key, _MARKERS[at][0], _MARKERS[at][1])
        for at in used
    )
    parts.append(Markup("<defs>{}</defs>").format(Markup("").join(shapes)))
    top = 6
    for mark in picture.marks:
        for row in textwrap.wrap(mark, 44):
            parts.append(Markup('<text class="said" x="0" y="{}">{}</text>').format(top + 12, row))
            top += _ROW
    limited = {line.style for line in lines if line.bound}
    for line in lines:
        if not line.bound:
            parts.append(_legend(picture, line, top, bound=line.style in limited))
            top += _ROW
    top += 26
    parts.append(Markup('<text class="strong" x="0" y="{}">{}</text>').format(top - 10, picture.y_name))
    parts += [_across(y, top, value) for value in y.ticks]
    for value, name in picture.levels:
        at, kind = _up(y, top, value), "even" if value == 1 else "level"
        parts.append(Markup('<line class="{}" x1="0%" x2="100%" y1="{}" y2="{}"/>').format(kind, at, at))
        word = "strong" if value == 1 else "said"
        parts.append(
            Markup('<text class="{}" x="{}%" y="{}" text-anchor="end">{}</text>').format(
                word, _END, at - 5, name
            )
        )
    bottom = top + _HEIGHT
    parts.append(Markup('<line class="grid" x1="0%" x2="100%" y1="{}" y2="{}"/>').format(bottom, bottom))
    for value in x.ticks:
        at_x = _over(x, value)
        parts.append(
            Markup('<line class="grid" x1="{0}%" x2="{0}%" y1="{1}" y2="{2}"/>').format(
                at_x, bottom, bottom + 4
            )
        )
        parts.append(
            Markup('<text x="{}%" y="{}" text-anchor="middle">{}</text>').format(
                at_x, bottom + 17, shown(value)
            )
        )
    parts.append(
        Markup('<text class="strong" x="{}%" y="{}" text-anchor="end">{}</text>').format(
            _END, bottom + 36, picture.x_name
        )
    )
    # Bounds first: what was measured lies over them.
    parts += [_bound(line, x, y, top) for line in lines if line.bound]
    labels: list[tuple[float, float, int]] = []
    parts += [_measured(picture, line, x, y, top, labels) for line in lines if not line.bound]
    return Markup("\n").join(parts), bottom + 44


def _legend(picture: Picture, line: Line, top: int, *, bound: bool) -> Markup:
    tone, at = _TONES[line.style % len(_TONES)], top + 8
    drawn = Markup('<line class="path {}" x1="0" x2="26" y1="{}" y2="{}"/>').format(tone, at, at)
    drawn += _marker(picture, line, "13", at)
    if not bound:
        return drawn + Markup('<text x="34" y="{}">{}</text>').format(at + 4, line.name)
    drawn += Markup('<line class="path {}" x1="34" x2="64" y1="{}" y2="{}" stroke-dasharray="{}"/>').format(
        tone, at, at, _DASHES[line.style % len(_DASHES)]
    )
    return drawn + Markup('<text x="72" y="{}">{}, and its roofline</text>').format(at + 4, line.name)


def _bound(line: Line, x: Axis, y: Axis, top: int) -> Markup:
    """A dashed line without markers."""
    dash = Markup(' stroke-dasharray="{}"').format(_DASHES[line.style % len(_DASHES)])
    return _path(line, x, y, top, dash)


def _path(line: Line, x: Axis, y: Axis, top: int, more: Markup) -> Markup:
    tone = _TONES[line.style % len(_TONES)]
    places = [(_over(x, point.x), _up(y, top, point.y)) for point in line.points]
    parts = [Markup("<title>{}</title>").format(line.name)]
    for (x1, y1), (x2, y2) in pairwise(places):
        parts.append(
            Markup('<line class="path {}" x1="{}%" y1="{}" x2="{}%" y2="{}"{}/>').format(
                tone, x1, y1, x2, y2, more
            )
        )
    return Markup("<g>{}</g>").format(Markup("").join(parts))


def _measured(
    picture: Picture, line: Line, x: Axis, y: Axis, top: int, labels: list[tuple[float, float, int]]
) -> Markup:
    """The line, its points with their intervals, and those labels that lie over none of `labels`."""
    tone = _TONES[line.style % len(_TONES)]
    parts = [_path(line, x, y, top, Markup(""))]
    for point in line.points:
        at_x, at_y = _over(x, point.x), _up(y, top, point.y)
        mark = Markup("<title>{}</title>").format(f"{line.name}: {point.says}")
        if point.low is not None and point.high is not None:
            ends = _up(y, top, point.low), _up(y, top, point.high)
            mark += Markup('<line class="error {0}" x1="{1}%" x2="{1}%" y1="{2}" y2="{3}"/>').format(
                tone, at_x, *ends
            )
        mark += _marker(picture, line, f"{at_x}%", at_y)
        if point.label and _free(labels, at_x, at_y, len(point.label)):
            mark += Markup('<text x="{}%" y="{}" dx="8" dy="-7">{}</text>').format(at_x, at_y, point.label)
        parts.append(Markup("<g>{}</g>").format(mark))
    return Markup("").join(parts)


def _free(labels: list[tuple[float, float, int]], x: float, y: float, letters: int) -> bool:
    """Whether a label has room, on a phone too, where a per cent is 3.4 pixels; if so it is noted."""
    for other_x, other_y, count in labels:
        ahead = 3.4 * (other_x - x)
        if abs(other_y - y) < 14 and -7 * count - 4 < ahead < 7 * letters + 4:
            return False
    labels.append((x, y, letters))
    return True


def _marker(picture: Picture, line: Line, x: str, y: float) -> Markup:
    tone, name = _TONES[line.style % len(_TONES)], _MARKERS[line.style % len(_MARKERS)][0]
    return Markup('<use class="{} mark" href="#{}-{}" x="{}" y="{}"/>').format(tone, picture.key, name, x, y)


def _across(y: Axis, top: int, value: float) -> Markup:
    at = _up(y, top, value)
    line = Markup('<line class="grid" x1="0%" x2="100%" y1="{0}" y2="{0}"/>').format(at)
    return line + Markup('<text x="0" y="{}">{}</text>').format(at - 4, shown(value))


def _over(x: Axis, value: float) -> float:
    return round(_LEFT + (_RIGHT - _LEFT) * x.share(value), 2)


def _up(y: Axis, top: int, value: float) -> float:
    return round(top + _HEIGHT * (1 - y.share(value)), 1)
