"""Room on a page: long texts and long tables share what there is, and what is left out is said."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import escape

PAGE_TEXTS = 1_500_000
"""Bytes for all texts that unfold. A page stays under 3 MB with 5,000 items and every text at its longest."""
PAGE_ROWS = 700_000
"""Bytes for the rows of all panels' tables."""
LONGEST_TEXT = 6_000
"""Characters of one text: the beginning and the end, where an answer stands."""
_HEAD = 2_000


def shares(wanted: Sequence[int], room: int) -> list[int]:
    """Divide `room` among demands: each gets what it wants, or an equal part of what the smaller ones leave."""
    given = [0] * len(wanted)
    left = room
    for place, index in enumerate(sorted(range(len(wanted)), key=lambda i: wanted[i])):
        given[index] = min(wanted[index], left // (len(wanted) - place))
        left -= given[index]
    return given


def fitting(sizes: Sequence[int], room: int) -> int:
    """How many of the first sizes fit into `room`."""
    for count, size in enumerate(sizes):
        room -= size
        if room < 0:
            return count
    return len(sizes)


def cut(text: str) -> str:
    """A text of at most `LONGEST_TEXT` characters, with a line that says how many are left out."""
    if len(text) <= LONGEST_TEXT:
        return text
    left_out = len(text) - LONGEST_TEXT
    tail = text[len(text) - (LONGEST_TEXT - _HEAD) :]
    return f"{text[:_HEAD]}\n[… {left_out:,} characters left out; report.json has all of them …]\n{tail}"


def weight(*texts: str) -> int:
    """Bytes that texts take on a page, escaped, with the markup of one unfolding around them."""
    return sum(len(str(escape(text)).encode()) + 90 for text in texts) + 60
