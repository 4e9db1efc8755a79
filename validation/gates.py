"""Gates: a measured figure against a bound named beforehand. What was not measured never passes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import model_validator

from validation.document import Document

Outcome = Literal["pass", "fail", "not measured", "not gated"]


class Gate(Document):
    """One figure and its bound. A figure that is None or not finite was not measured."""

    name: str
    measured: float | None
    bound: float | None
    """None: the figure is reported only."""
    comparison: Literal["at least", "at most"]
    unit: str = ""
    note: str = ""
    outcome: Outcome = "not measured"
    """Follows from figure and bound; never taken from the caller or a file."""

    @model_validator(mode="before")
    @classmethod
    def _judge(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        measured = data.get("measured")
        if measured is not None and not math.isfinite(measured):
            measured = None
        outcome = judge(measured, data.get("bound"), data.get("comparison"))
        if data.get("outcome", outcome) != outcome:
            raise ValueError(f"the gate says {data['outcome']!r}, its figures say {outcome!r}")
        return {**data, "measured": measured, "outcome": outcome}


def judge(measured: float | None, bound: float | None, comparison: str | None) -> Outcome:
    """The outcome of a gate; "not measured" or "not gated" when the figure or the bound is missing."""
    if bound is None:
        return "not gated"
    if measured is None:
        return "not measured"
    held = measured >= bound if comparison == "at least" else measured <= bound
    return "pass" if held else "fail"


def at_least(name: str, measured: float | None, bound: float | None, unit: str = "", note: str = "") -> Gate:
    """A gate that a figure passes from `bound` upwards."""
    return Gate(name=name, measured=measured, bound=bound, comparison="at least", unit=unit, note=note)


def at_most(name: str, measured: float | None, bound: float | None, unit: str = "", note: str = "") -> Gate:
    """A gate that a figure passes up to and including `bound`."""
    return Gate(name=name, measured=measured, bound=bound, comparison="at most", unit=unit, note=note)


def failed(gates: Iterable[Gate]) -> list[Gate]:
    """The gates that were measured and missed."""
    return [g for g in gates if g.outcome == "fail"]


def overall(gates: Iterable[Gate]) -> Literal["pass", "fail", "not measured"]:
    """Fail if any gate fails; not measured if a bound lacks its figure or no gate has one; else pass."""
    outcomes = [g.outcome for g in gates]
    if "fail" in outcomes:
        return "fail"
    if "not measured" in outcomes or "pass" not in outcomes:
        return "not measured"
    return "pass"
