"""Would another judge have said the same? Two judges on the same answers."""

from __future__ import annotations

from collections.abc import Sequence

from validation.document import Document
from validation.errors import MeasurementError
from validation.healthbench.run import RubricRun
from validation.statistics import paired_means


class Kappa(Document):
    """Agreement of two judges over the criteria that both graded."""

    scope: str
    n: int
    both_met: int
    only_first: int
    only_second: int
    both_unmet: int
    agreement: float | None
    """Share of criteria judged alike."""
    kappa: float | None
    """Cohen's kappa; None where chance alone would agree fully."""


class JudgeSwap(Document):
    """The same answers graded by two judges."""

    schema_version: int = 1
    benchmark: str
    label: str
    subject: str
    first: str
    second: str
    overall: Kappa
    positive: Kappa
    """Criteria with positive points."""
    negative: Kappa
    """Criteria with negative points."""
    n: int
    """Examples with a score from both."""
    difference_points: float | None
    """Mean score by the second judge minus that by the first, unclipped, in points of 100; None: fewer than
    two examples."""
    low_points: float | None
    high_points: float | None


def kappa_of(scope: str, pairs: Sequence[tuple[bool, bool]]) -> Kappa:
    """Cohen's kappa (Cohen 1960) of two judges' verdicts."""
    n = len(pairs)
    both = sum(a and b for a, b in pairs)
    first, second = sum(a for a, _ in pairs), sum(b for _, b in pairs)
    alike = both + n - first - second + both
    # In whole numbers, n squared times each: no rounding decides whether chance agrees fully.
    chance = first * second + (n - first) * (n - second)
    return Kappa(
        scope=scope,
        n=n,
        both_met=both,
        only_first=first - both,
        only_second=second - both,
        both_unmet=n - first - second + both,
        agreement=alike / n if n else None,
        kappa=(alike * n - chance) / (n * n - chance) if n * n > chance else None,
    )


def compare_judges(first: RubricRun, second: RubricRun, *, seed: int = 0) -> JudgeSwap:
    """Agreement of two judges and what the score becomes under the other.

    Raises:
        MeasurementError: the runs are not of the same answers to the same rows.
    """
    texts = [[r.text for r in run.results] for run in (first, second)]
    if first.data_digest != second.data_digest or first.subject != second.subject or texts[0] != texts[1]:
        raise MeasurementError("the two judges did not grade the same answers")
    results = list(zip(first.results, second.results, strict=True))
    pairs = [
        (item.points, a, b)
        for one, other in results
        for item, a, b in zip(one.items, one.met, other.met, strict=True)
        if a is not None and b is not None
    ]
    scored = [(a.score, b.score) for a, b in results if a.score is not None and b.score is not None]
    change = paired_means(*zip(*scored, strict=True), seed=seed) if len(scored) > 1 else None
    return JudgeSwap(
        benchmark=first.benchmark,
        label=first.label,
        subject=first.subject,
        first=first.judge.name,
        second=second.judge.name,
        overall=kappa_of("all criteria", [(a, b) for _, a, b in pairs]),
        positive=kappa_of("positive points", [(a, b) for points, a, b in pairs if points > 0]),
        negative=kappa_of("negative points", [(a, b) for points, a, b in pairs if points < 0]),
        n=len(scored),
        difference_points=None if change is None else 100 * change.difference,
        low_points=None if change is None else 100 * change.interval.low,
        high_points=None if change is None else 100 * change.interval.high,
    )
