"""Exact match of what follows the last answer marker."""

from __future__ import annotations

import re

_MARKER = re.compile(r"(?:Answer|答案)\s*[:：][^\S\n]*([^\n]*)", re.IGNORECASE)
_STOPS = ".。"


def extract_answer(text: str) -> str | None:
    """What follows the last `Answer:` or `答案：` up to the end of its line; None without a marker.

    Spaces around it and a trailing full stop are dropped: `Answer: 20 mg.` gives `20 mg`.
    """
    found = _MARKER.findall(text)
    return normalise(found[-1]) if found else None


def normalise(answer: str) -> str:
    """An answer without the spaces around it and without one trailing full stop."""
    answer = answer.strip()
    if answer.endswith(tuple(_STOPS)):
        answer = answer[:-1].rstrip()
    return answer


def is_correct(extracted: str | None, expected: str) -> bool:
    """Whether the extracted answer is exactly the expected one; no answer is wrong."""
    return extracted is not None and extracted == normalise(expected)
