"""A picture in characters, for terminals of 80 columns."""

from __future__ import annotations

import textwrap

from validation.picture import Line, Picture, axes, shown

_MARKERS = "#ox+"
"""By a line's style: the baseline's first, as in the page."""
_WIDTH, _HEIGHT, _GUTTER = 69, 14, 8


def terminal_plot(picture: Picture) -> str:
    """Title, 14 rows of plot, the axis, and a legend; at most 79 columns.

    Measured points are letters, bounds dots, intervals bars; where points fall together the later line shows.
    """
    x, y = axes(picture)
    field = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def place(at_x: float, at_y: float) -> tuple[int, int]:
        return (
            round((_WIDTH - 1) * x.share(at_x)),
            round((_HEIGHT - 1) * (1 - y.share(at_y))),
        )

    for value, _ in picture.levels:
        row = place(x.low, value)[1]
        field[row] = ["-"] * _WIDTH
    lines = [line for line in picture.lines if line.points]
    for line in sorted(lines, key=lambda one: not one.bound):
        for point in line.points:
            column, row = place(point.x, point.y)
            if not line.bound and point.low is not None and point.high is not None:
                top, bottom = place(point.x, point.high)[1], place(point.x, point.low)[1]
                for between in range(top, bottom + 1):
                    field[between][column] = "|"
            field[row][column] = "." if line.bound else _MARKERS[line.style % len(_MARKERS)]
    labels = {place(x.low, value)[1]: shown(value) for value in y.ticks}
    labels |= {place(x.low, value)[1]: name for value, name in picture.levels}
    out = [*textwrap.wrap(picture.title, 79)]
    out += [f"({mark})" for mark in picture.marks]
    out.append(f"{picture.y_name}")
    out += [f"{labels.get(row, ''):>{_GUTTER}} |{''.join(cells)}".rstrip() for row, cells in enumerate(field)]
    out.append(f"{'':>{_GUTTER}} +{'-' * _WIDTH}")
    under = [" "] * (_WIDTH + 1)
    for value in x.ticks:
        text = shown(value)
        start = min(max(0, place(value, y.low)[0] - len(text) // 2), _WIDTH - len(text))
        if all(letter == " " for letter in under[max(0, start - 1) : start + len(text) + 1]):
            under[start : start + len(text)] = text
    out.append(f"{'':>{_GUTTER}}  {''.join(under).rstrip()}")
    out.append(f"{picture.x_name:>{_GUTTER + 2 + _WIDTH}}")
    out += textwrap.wrap(
        "   ".join(_legend(line) for line in lines if not line.bound)
        + ("   . roofline" if any(line.bound for line in lines) else ""),
        79,
        initial_indent="  ",
        subsequent_indent="  ",
    )
    return "\n".join(out)


def _legend(line: Line) -> str:
    return f"{_MARKERS[line.style % len(_MARKERS)]} {line.name}".replace(" ", "\N{NO-BREAK SPACE}")
