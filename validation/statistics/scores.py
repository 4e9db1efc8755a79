"""Statistics of paired real-valued scores, such as rubric points: the mean difference and its interval.

Scores of one conversation (its turns, its samples, its criteria) are not independent, so what is resampled,
and what the degrees of freedom count, is conversations: one cluster each, all of its items together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from validation.statistics.pairs import Interval, normal_quantile, wilson

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.float64]]


class MeanDifference(NamedTuple):
    """Mean of candidate minus reference over the items, in the unit of the scores."""

    items: int
    clusters: int
    moved: int
    """Clusters whose scores differ at all; with few, an interval rests on few."""
    difference: float
    interval: Interval
    """Symmetric studentised bootstrap, clusters resampled."""
    t_interval: Interval
    """Student's, with the cluster-robust standard error and clusters - 1 degrees of freedom: a check."""
    p_value: float
    """Two-sided, of the t statistic."""
    standard_error: float


def paired_means(
    reference: Sequence[float],
    candidate: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    confidence: float = 0.95,
    span: float = 1.0,
    resamples: int = 4000,
    seed: int = 0,
) -> MeanDifference:
    """Mean difference of paired scores with a clustered bootstrap interval.

    The bootstrap is studentised and symmetric (Hall 1988, JRSS B 50:35-45): plain percentiles are too narrow
    with few conversations, and so are one-sided studentised ends where few of them move; `make bench-verdict`
    prints the coverage. Where all clusters differ by the same, or not at all, a bootstrap would claim an
    interval of no width; as far as a share of clusters of which none was seen can reach, each off by `span`,
    is then added on both sides, and p is that of a sign test. No interval knows of large losses so rare that
    the sample holds none.

    Args:
        reference, candidate: a score per item, items in the same order.
        clusters: the conversation of each item; None: each item is its own.
        confidence: of both intervals.
        span: largest difference that scores can have; 1.0 for shares of points.
        resamples: bootstrap samples.
        seed: of the resampling; the same input gives the same interval.

    Raises:
        ValueError: unequal lengths, fewer than two clusters, or a score that is not finite.
    """
    import numpy as np
    from scipy.stats import t as student

    names = list(range(len(reference))) if clusters is None else list(clusters)
    if not len(reference) == len(candidate) == len(names):
        raise ValueError(f"{len(reference)} and {len(candidate)} scores in {len(names)} clusters")
    order: dict[Hashable, int] = {}
    at = np.array([order.setdefault(name, len(order)) for name in names], dtype=np.intp)
    groups = len(order)
    if groups < 2:
        raise ValueError("scores of one conversation alone have no spread to judge a difference by")
    values = np.asarray(candidate, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a score that is not finite")
    sums, sizes = np.zeros(groups), np.zeros(groups)
    np.add.at(sums, at, values)
    np.add.at(sizes, at, 1.0)
    mean = float(sums.sum() / sizes.sum())
    error = float(_error(sums, sizes))
    moved = int((np.bincount(at, weights=values != 0, minlength=groups) > 0).sum())
    if error <= 1e-12 * span:
        half = span * wilson(0, groups, confidence).high
        alike = Interval(max(-span, mean - half), min(span, mean + half))
        p_value = 1.0 if abs(mean) <= 1e-12 * span else 2.0 * 0.5**groups  # a sign test
        return MeanDifference(len(values), groups, moved, mean, alike, alike, p_value, 0.0)
    generator = np.random.default_rng(seed)
    low, high = (
        float(end) for end in bootstrap_t(sums, sizes, confidence, generator, resamples=resamples, span=span)
    )
    half = float(student.ppf(0.5 + confidence / 2, groups - 1)) * error
    return MeanDifference(
        items=len(values),
        clusters=groups,
        moved=moved,
        difference=mean,
        interval=Interval(low, high),
        t_interval=Interval(mean - half, mean + half),
        p_value=float(2 * student.sf(abs(mean / error), groups - 1)),
        standard_error=error,
    )


def bootstrap_t(
    sums: Array,
    sizes: Array,
    confidence: float,
    generator: np.random.Generator,
    *,
    resamples: int = 4000,
    span: float = 1.0,
) -> tuple[Array, Array]:
    """Symmetric studentised bootstrap interval of the mean over items, clusters resampled.

    Args:
        sums, sizes: (G,) or (G, R): of each of G clusters the sum of its differences and its number of
            items; R data sets at once share the resampling.
        confidence: of the interval.
        generator: where the resampling comes from.
        resamples: bootstrap samples.
        span: no end lies further than this from zero.

    Returns:
        Lower and upper ends, () or (R,).
    """
    import numpy as np

    groups = sums.shape[0]
    mean, error = sums.sum(0) / sizes.sum(0), _error(sums, sizes)
    centred = sums - mean * sizes
    squares = (centred * centred, centred * sizes, sizes * sizes)
    ratios = []
    # A few hundred samples at a time: their weights, (samples, G), are what takes memory.
    step = max(1, 4_000_000 // groups)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = generator.multinomial(groups, np.full(groups, 1 / groups), size=size).astype(np.float64)
        count = weights @ sizes
        off = weights @ centred / count
        ss, sn, nn = (weights @ square for square in squares)
        spread = np.sqrt(np.maximum(ss - 2 * off * sn + off**2 * nn, 0.0) * groups / (groups - 1)) / count
        # A resample in which every cluster is the same has no spread of its own: infinitely far, unless it
        # hits the mean. Rounding leaves some 1e-16 of the squares, hence no exact zero.
        flat = spread <= 1e-7 * np.abs(error)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(off) / np.where(flat, 0.0, spread)
        ratios.append(np.where(flat & (np.abs(off) <= 1e-9 * span), 0.0, ratio))
    # An order statistic, not interpolated: an infinite neighbour must not make a finite one undefined.
    reach = np.quantile(np.concatenate(ratios), confidence, axis=0, method="inverted_cdf")
    with np.errstate(invalid="ignore"):
        reach = np.where(error == 0, 0.0, reach * error)
    return np.clip(mean - reach, -span, span), np.clip(mean + reach, -span, span)


def clusters_to_decide(
    difference: float, standard_error: float, clusters: int, margin: float, confidence: float = 0.95
) -> int | None:
    """Clusters with which an interval of this difference and spread clears the margin; None if none would."""
    gap = abs(difference + margin)
    if standard_error <= 0 or gap <= 1e-12:
        return None
    return max(clusters, math.ceil(clusters * (normal_quantile(confidence) * standard_error / gap) ** 2))


def detectable_mean(standard_error: float, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true loss that a one-sided test with this standard error finds with `power`."""
    z = normal_quantile(1 - 2 * alpha) + normal_quantile(2 * power - 1)
    return z * standard_error


def _error(sums: Array, sizes: Array) -> Array:
    """Cluster-robust standard error of sum(sums) / sum(sizes): linearised, with the G / (G - 1) factor."""
    import numpy as np

    groups, total = sums.shape[0], sizes.sum(0)
    residual = sums - sums.sum(0) / total * sizes
    result: Array = np.sqrt((residual**2).sum(0) * groups / (groups - 1)) / total
    return result
