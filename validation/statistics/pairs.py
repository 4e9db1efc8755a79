"""Statistics of paired yes/no outcomes: did the same items stay right?

Two models answer the same items, so what matters is the discordant pairs: items that only the reference
gets right (`only_reference`) and items that only the candidate gets right (`only_candidate`). Everything here
is exact or the root of a closed form, and needs the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal, NamedTuple

Verdict = Literal["non-inferior", "inferior", "inconclusive"]


class Interval(NamedTuple):
    """A confidence interval; both ends in the unit of the estimate."""

    low: float
    high: float


def normal_quantile(confidence: float) -> float:
    """z such that a standard normal lies within ±z with probability `confidence`."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def mcnemar_exact(only_reference: int, only_candidate: int) -> float:
    """Two-sided exact McNemar p-value: a binomial test of the discordant pairs against one half.

    Source: McNemar 1947; the exact form doubles the smaller binomial tail and is capped at 1.
    """
    _check_counts(only_reference, only_candidate)
    discordant = only_reference + only_candidate
    if discordant == 0:
        return 1.0
    smaller = min(only_reference, only_candidate)
    # Integers until the last step, so exact for any count: 2 * (sum of binomials) / 2**discordant, at most 1.
    term = tail = 1
    for k in range(smaller):
        term = term * (discordant - k) // (k + 1)
        tail += term
    return min(1.0, tail / (1 << (discordant - 1)))


def loss_p(only_reference: int, only_candidate: int) -> float:
    """Exact one-sided p-value of "the candidate is no worse": a fair coin's chance of so many losses or more.

    Rejecting it at a level errs no more often than that level says, at any number of items.
    """
    _check_counts(only_reference, only_candidate)
    discordant = only_reference + only_candidate
    # The shorter tail is summed in integers: at least so many losses are at most so many gains.
    short = min(only_reference - 1, only_candidate)
    term, tail = 1, 1 if short >= 0 else 0
    for k in range(short):
        term = term * (discordant - k) // (k + 1)
        tail += term
    whole = 1 << discordant
    return (tail if short == only_candidate else whole - tail) / whole


def beyond_margin_p(only_reference: int, only_candidate: int, n: int, margin: float) -> float:
    """One-sided p-value of "the loss is at most `margin`", by Tango's score test.

    It is below half of one minus the confidence exactly where the whole interval lies beyond the margin.
    """
    return NormalDist().cdf(paired_score(only_reference, only_candidate, n, -margin))


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927); (0, 1) when n is 0."""
    _check_counts(successes, n)
    if successes > n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    z2 = normal_quantile(confidence) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # The ends are 0 and 1 exactly at the extremes; rounding must not move them inside.
    return Interval(0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


def paired_score(only_reference: int, only_candidate: int, n: int, delta: float) -> float:
    """Tango's score statistic for the hypothesis that the paired difference equals `delta`.

    The difference is candidate minus reference, as a proportion of all n pairs. Under the hypothesis the
    statistic is about standard normal. Source: Tango 1998, Statistics in Medicine 17:891-908, eq. 5-7.
    """
    gained, lost = only_candidate, only_reference
    # Constrained maximum-likelihood estimate of the probability of a loss, given the difference.
    a = 2.0 * n
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1.0 - delta)
    q_lost = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * q_lost + delta * (1 - delta))
    numerator = gained - lost - n * delta
    if variance <= 0:
        return 0.0 if numerator == 0 else math.copysign(math.inf, numerator)
    return numerator / math.sqrt(variance)


def paired_difference(only_reference: int, only_candidate: int, n: int, confidence: float = 0.95) -> Interval:
    """Tango's score interval of the paired difference candidate - reference, in [-1, 1].

    Unlike the Wald interval it has the right width when few or no pairs are discordant, the usual case for
    a quantized model: with no discordant pair among n it is ±z²/(n + z²), not zero.
    """
    _check_counts(only_reference, only_candidate, n)
    if only_reference + only_candidate > n:
        raise ValueError(f"{only_reference} + {only_candidate} discordant pairs among {n}")
    if n == 0:
        return Interval(-1.0, 1.0)
    z = normal_quantile(confidence)
    estimate = (only_candidate - only_reference) / n

    def excess(delta: float) -> float:
        return paired_score(only_reference, only_candidate, n, delta)

    # The statistic falls monotonically in delta: +z at the lower end, -z at the upper one.
    low = _root(lambda d: excess(d) - z, -1.0, estimate)
    high = _root(lambda d: excess(d) + z, estimate, 1.0)
    return Interval(low, high)


def non_inferiority(interval: Interval, margin: float) -> Verdict:
    """Three-way verdict on an interval of candidate - reference for a loss margin (same unit, positive)."""
    if margin <= 0:
        raise ValueError(f"the margin must be positive, got {margin}")
    if interval.low > -margin:
        return "non-inferior"
    if interval.high < -margin:
        return "inferior"
    return "inconclusive"


def n_to_decide(
    only_reference: int, only_candidate: int, n: int, margin: float, confidence: float = 0.95
) -> int | None:
    """Pairs that would decide if discordance and difference stayed as observed; None if no n would.

    Scales the observed counts and asks for the smallest n (to 1 %) whose interval clears the margin on one
    side. With no discordance seen, the rule of three stands in: 3/n discordant pairs, half of them losses.
    """
    if n == 0:
        return None
    lost, gained = only_reference / n, only_candidate / n
    if only_reference + only_candidate == 0:
        lost = gained = min(0.5, 1.5 / n)
    if math.isclose(gained - lost, -margin, abs_tol=1e-12):
        return None

    def decided(size: int) -> bool:
        losses = round(lost * size)
        gains = min(round(gained * size), size - losses)  # both may be rounded up
        interval = paired_difference(losses, gains, size, confidence)
        return non_inferiority(interval, margin) != "inconclusive"

    low, high = n, n
    while not decided(high):
        low, high = high, high * 2
        if high > 10_000_000:
            return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Zero of a falling function by bisection; without a change of sign, the end where it would lie."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _check_counts(*counts: int) -> None:
    if any(c < 0 for c in counts):
        raise ValueError(f"counts must not be negative: {counts}")
