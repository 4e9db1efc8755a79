"""Figures of a card: each says where it stands in the evidence, in a form that a program can follow.

On the card a figure is a link, and its title names the place:

    [91.7 % (74.2 to 97.7)](evidence/report.html#accuracy
                            "report.json /accuracy/3/overall {accuracy low high} x100")

that is: document, JSON pointer (RFC 6901), members of the object there in the order shown, factor. The card's
metadata and `.eval_results/` carry the same text. So whoever has the folder can hold every figure against the
report, whichever release of this software wrote the card.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REPORT, LOCK = "report.json", "bundle.lock"
_PLACE = r"(report\.json|bundle\.lock) (/[^\s\"{]*)(?: \{([^}\"]*)\})?(?: x(\d+))?"
_LINK = re.compile(rf'\[([^\]\n]*)\]\(([^\s)]+) "{_PLACE}"\)')
_NUMBER = re.compile(r"[-\N{MINUS SIGN}]?\d+(?:\.(\d+))?(?:e([-+]?\d+))?")
PLACE = re.compile(_PLACE)


class NoSuchPlace(Exception):
    """A pointer leads nowhere, or not to a number."""


@dataclass(frozen=True)
class Figure:
    """One figure, or a few that belong together (an estimate with its interval)."""

    values: tuple[float | int | None, ...]
    """As they stand in the document; None: not measured."""
    place: str
    """Document, pointer, members, factor."""
    target: str
    """File and anchor that the link leads to."""
    form: str
    """Message that puts the values into words; its fields are {0}, {1}, …"""
    digits: int | None
    """Decimal places; None: four significant digits."""
    factor: int = 1
    signed: bool = False
    unit: str = ""

    @property
    def texts(self) -> list[str]:
        """The values as shown; none if one was not measured."""
        if any(value is None for value in self.values):
            return []
        return [shown(self.factor * v, self.digits, self.signed) for v in self.values if v is not None]


def shown(value: float, digits: int | None, signed: bool = False) -> str:
    """A number with a true minus; what rounds to zero has no sign."""
    if digits is not None:
        text = f"{abs(value):.{digits}f}"
    elif abs(value) >= 1000:
        text = f"{abs(value):.0f}"
    else:
        text = f"{abs(value):.4g}"
    if float(text) == 0:
        return text
    return ("\N{MINUS SIGN}" if value < 0 else "+" if signed else "") + text


def place(document: str, *steps: str | int, members: tuple[str, ...] = (), factor: int = 1) -> str:
    """The text that names a place: `report.json /accuracy/0/overall {accuracy low high} x100`."""
    pointer = "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in steps)
    pointer = pointer.replace(" ", "%20").replace('"', "%22").replace("{", "%7B")
    listed = " {" + " ".join(members) + "}" if members else ""
    return f"{document} {pointer}{listed}" + (f" x{factor}" if factor != 1 else "")


def values_at(named: str, documents: Mapping[str, Any]) -> tuple[list[float | None], int]:
    """The numbers at a place, and the factor they are shown with.

    Raises:
        NoSuchPlace: the text names none, or there is no number.
    """
    match = PLACE.fullmatch(named)
    if match is None:
        raise NoSuchPlace(f"{named!r} names no place")
    node = documents.get(match[1])
    for step in match[2].split("/")[1:]:
        step = step.replace("%20", " ").replace("%22", '"').replace("%7B", "{")
        step = step.replace("~1", "/").replace("~0", "~")
        try:
            node = node[int(step)] if isinstance(node, list) else node[step]  # type: ignore[index]
        except (KeyError, IndexError, ValueError, TypeError):
            raise NoSuchPlace(f"{match[1]} has no {match[2]}") from None
    members = match[3].split() if match[3] else None
    try:
        found = [node] if members is None else [node[member] for member in members]  # type: ignore[index]
    except (KeyError, TypeError):
        raise NoSuchPlace(f"{match[1]} has not all of {match[3]} at {match[2]}") from None
    if any(isinstance(v, bool) or not isinstance(v, int | float | None) for v in found):
        raise NoSuchPlace(f"{match[1]} has no number at {match[2]}")
    return found, int(match[4] or 1)


def linked_figures(markdown: str) -> Iterator[tuple[str, str]]:
    """(text, place) of every figure of a card."""
    for match in _LINK.finditer(markdown):
        yield match[1], match[0][match[0].index('"') + 1 : -2]


def differs(text: str, named: str, documents: Mapping[str, Any]) -> str | None:
    """Why a figure as shown is not the one that stands at its place, or None if it is.

    Numbers are compared at the precision they are shown with.
    """
    try:
        values, factor = values_at(named, documents)
    except NoSuchPlace as err:
        return str(err)
    numbers = list(_NUMBER.finditer(text))
    if any(value is None for value in values):
        return "it was not measured" if numbers else None
    if len(numbers) != len(values):
        return f"{len(numbers)} numbers where the evidence has {len(values)}"
    for number, value in zip(numbers, values, strict=True):
        assert value is not None
        said = float(number[0].replace("\N{MINUS SIGN}", "-"))
        last = float(number[2] or 0) - len(number[1] or "")
        # Large numbers lose their decimals on a card, never more.
        tolerance = 0.5 * 10**last * (1 + 1e-6) + abs(value) * factor * 1e-12
        if abs(said - value * factor) > tolerance:
            return f"the evidence has {value * factor:.6g}"
    return None
