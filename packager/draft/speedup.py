"""What a draft's speed measurements mean: break-even concurrency, the draft length to use, the acceptance
needed. Arithmetic only; the measuring is elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import linear_regression
from typing import Any

from packager.recipe import SpeculationRange

ALARM_SHARE = 0.05
"""Predicted and served acceptance length may differ by this share of the served one."""


@dataclass(frozen=True)
class BreakEven:
    """Where speculation stops to pay for one draft length, over the concurrencies measured."""

    concurrency: float | None
    """Interpolated concurrency at which the speed-up is 1; None: it is above 1 (or below) everywhere."""
    pays_from_the_start: bool
    """Whether the speed-up at the lowest concurrency is above 1."""
    lowest: int
    highest: int

    @property
    def text(self) -> str:
        """For a table."""
        if not self.pays_from_the_start:
            return f"does not pay at {self.lowest}"
        if self.concurrency is None:
            return f"none up to {self.highest}"
        return f"about {self.concurrency:.1f}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "concurrency": self.concurrency,
            "pays_at_lowest": self.pays_from_the_start,
            "measured": [self.lowest, self.highest],
            "text": self.text,
        }


def break_even(speedups: Mapping[int, float]) -> BreakEven:
    """The first crossing of 1.0, linear in the logarithm of the concurrency between two measured ones.

    Args:
        speedups: output tokens/s with over without the draft, by concurrency; not empty.
    """
    points = sorted(speedups.items())
    crossing = None
    if points[0][1] > 1:
        for (low, above), (high, below) in pairwise(points):
            if below <= 1:
                share = (above - 1) / (above - below)
                crossing = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
                break
    return BreakEven(crossing, points[0][1] > 1, points[0][0], points[-1][0])


def best_tokens(speedups: Mapping[int, Mapping[int, float]]) -> dict[int, tuple[int, float]]:
    """Draft length and speed-up that are fastest at each concurrency; (0, 1.0) where no draft length pays.

    Args:
        speedups: by draft length K, by concurrency. A concurrency counts for the lengths measured at it.
    """
    best: dict[int, tuple[int, float]] = {}
    for level in sorted({level for row in speedups.values() for level in row}):
        length, ratio = max(
            ((k, row[level]) for k, row in sorted(speedups.items()) if level in row), key=lambda pair: pair[1]
        )
        best[level] = (length, ratio) if ratio > 1 else (0, 1.0)
    return best


def schedule(best: Mapping[int, int]) -> tuple[SpeculationRange, ...]:
    """Serve settings from the best draft length at each measured concurrency.

    Between two measured concurrencies with different lengths the change is at their geometric mean, rounded
    down: a doubling of the batch counts alike everywhere. The last range has no upper end.
    """
    points = sorted(best.items())
    ranges: list[SpeculationRange] = []
    for (low, length), (high, after) in pairwise(points):
        if after != length:
            ranges.append(
                SpeculationRange(max_concurrency=math.isqrt(low * high), num_speculative_tokens=length)
            )
    return (*ranges, SpeculationRange(num_speculative_tokens=points[-1][1]))


def paying_context(speedups: Mapping[int, float]) -> int | None:
    """The longest context up to which every measured length pays, if a longer one does not; None: all pay.

    0: not even the shortest pays.
    """
    longest = 0
    for length, ratio in sorted(speedups.items()):
        if ratio <= 1:
            return longest
        longest = length
    return None


@dataclass(frozen=True)
class NeededAcceptance:
    """Speed as a straight line over acceptance length, and what it takes to reach a speed-up."""

    slope: float
    """Tokens/s per token of acceptance length."""
    offset: float
    worst_residual: float
    """Largest distance of a measured point from the line, as a share of the point."""

    def length_for(self, tokens_per_s: float) -> float | None:
        """Acceptance length at that speed; None: speed does not grow with acceptance."""
        return (tokens_per_s - self.offset) / self.slope if self.slope > 0 else None


def needed_acceptance(points: Sequence[tuple[float, float]]) -> NeededAcceptance:
    """Least-squares line through (acceptance length, output tokens/s), two points or more.

    The time of a draft-and-verify step hardly depends on how many tokens it yields, so speed is close to
    proportional to the acceptance length; `worst_residual` says how close.

    Raises:
        ValueError: fewer than two different lengths.
    """
    lengths, speeds = [point[0] for point in points], [point[1] for point in points]
    if len(set(lengths)) < 2:
        raise ValueError("a line needs two acceptance lengths")
    slope, offset = linear_regression(lengths, speeds)
    residual = max(abs(slope * x + offset - y) / y for x, y in points)
    return NeededAcceptance(slope, offset, residual)


@dataclass(frozen=True)
class Agreement:
    """Acceptance length predicted by teacher forcing against the served one."""

    predicted: float
    served: float

    @property
    def difference(self) -> float:
        """(predicted - served) / served."""
        return (self.predicted - self.served) / self.served

    @property
    def alarm(self) -> bool:
        """Whether they part by more than `ALARM_SHARE`: layer ids, positions or weights differ in serving."""
        return abs(self.difference) > ALARM_SHARE

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "predicted": self.predicted,
            "served": self.served,
            "difference": self.difference,
            "alarm": self.alarm,
        }


def agreement(
    metrics: Mapping[str, Any], tokens: int, served: float, drafts: Mapping[str, int] | None = None
) -> Agreement | None:
    """Compare with the prediction that training sealed; None where it made none for `tokens`.

    Tasks differ in how well they are drafted, so a prediction is for a mixture of them. With `drafts`, and a
    prediction for each of its tasks, it is made for the mixture that was served.

    Args:
        metrics: of the draft's manifest, with `predicted_acceptance`.
        tokens: draft tokens a step, K.
        served: acceptance length at that K.
        drafts: how many drafts of each task were served.
    """
    sealed = metrics.get("predicted_acceptance") or {}
    rates = (sealed.get("by_tokens") or {}).get(str(tokens))
    if not rates:
        return None
    predicted = 1.0 + sum(map(float, rates))
    by_task = {task: found.get(str(tokens)) for task, found in (sealed.get("by_task") or {}).items()}
    if drafts and all(by_task.get(task) for task in drafts):
        mixed = sum(count * sum(map(float, by_task[task])) for task, count in drafts.items())
        predicted = 1.0 + mixed / sum(drafts.values())
    return Agreement(predicted, served)
