"""JSON as two readers cannot understand it differently, and as no small text fills the memory.

Python takes the last of two equal names, other readers the first: a file that says one thing to a check and
another to an engine. So a name twice is refused, and so are NaN, infinities, and nesting beyond the stack.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

MOST_CONTAINERS = 4_000_000
"""Lists and objects in one document: an empty one is two bytes of text and 56 or more of memory."""


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json: the object. Raises ValueError: a name occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:200]!r} occurs twice")
            seen.add(name)
    return found


def strict_json(text: bytes, look: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        text: UTF-8.
        look: called with every object in it, the innermost first.

    Raises:
        ValueError: not JSON, a name twice, NaN or infinity, nested too deeply, too many values; and what
            `look` raises.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = unique_names(pairs)
        if look:
            look(found)
        return found

    if text.count(b"[") + text.count(b"{") > MOST_CONTAINERS:
        raise ValueError("it has more lists and objects than any configuration")
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=once if look else unique_names, parse_constant=_refuse
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
