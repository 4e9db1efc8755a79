"""Two models on the same items: the paired difference, its interval, the verdict, and every flip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from validation.document import Document
from validation.errors import MeasurementError
from validation.statistics import Verdict, mcnemar_exact, n_to_decide, non_inferiority, paired_difference
from validation.tasks.accuracy import AccuracyRun, ItemResult


class Paired(Document):
    """Paired outcomes of a reference and a candidate on the same n items. Points are percentage points."""

    scope: str
    n: int
    both: int
    only_reference: int
    only_candidate: int
    neither: int
    difference_points: float
    """Candidate minus reference."""
    low_points: float
    high_points: float
    confidence: float
    p_value: float
    """Exact McNemar, two-sided."""
    margin_points: float
    verdict: Verdict
    n_to_decide: int | None
    """When inconclusive: items that would decide if discordance stayed as observed."""


class Flip(Document):
    """An item that one model gets right and the other wrong, with what each said."""

    id: str
    task: str
    language: str
    direction: Literal["right to wrong", "wrong to right"]
    """From the reference to the candidate."""
    question: str
    expected: str
    reference_answer: str | None
    candidate_answer: str | None
    reference_text: str
    candidate_text: str


class AccuracyComparison(Document):
    """A candidate against a reference on the same items."""

    schema_version: int = 1
    reference: str
    candidate: str
    reference_subject: str
    candidate_subject: str
    items_digest: str
    overall: Paired
    by_task: tuple[Paired, ...]
    flips: tuple[Flip, ...]


def compare_accuracy(
    reference: AccuracyRun, candidate: AccuracyRun, *, margin_points: float, confidence: float = 0.95
) -> AccuracyComparison:
    """Compare two runs over the same items against a margin in percentage points.

    Raises:
        MeasurementError: the runs differ in items or sampling, so their answers do not pair.
    """
    if reference.items_digest != candidate.items_digest:
        raise MeasurementError(
            f"{reference.label} and {candidate.label} answered different items; they do not pair"
        )
    if reference.sampling != candidate.sampling:
        raise MeasurementError(f"{reference.label} and {candidate.label} were sampled differently")
    pairs = list(zip(reference.results, candidate.results, strict=True))
    tasks = sorted({r.task for r, _ in pairs})
    return AccuracyComparison(
        reference=reference.label,
        candidate=candidate.label,
        reference_subject=reference.subject,
        candidate_subject=candidate.subject,
        items_digest=reference.items_digest,
        overall=paired_outcomes("all", [(a.correct, b.correct) for a, b in pairs], margin_points, confidence),
        by_task=tuple(
            paired_outcomes(
                task, [(a.correct, b.correct) for a, b in pairs if a.task == task], margin_points, confidence
            )
            for task in tasks
        ),
        flips=tuple(_flip(a, b) for a, b in pairs if a.correct != b.correct),
    )


def paired_outcomes(
    scope: str, pairs: Sequence[tuple[bool, bool]], margin_points: float, confidence: float = 0.95
) -> Paired:
    """The paired table of (reference right, candidate right) and what follows from it."""
    n = len(pairs)
    both = sum(a and b for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    gained = sum(b and not a for a, b in pairs)
    interval = paired_difference(lost, gained, n, confidence)
    verdict = non_inferiority(interval, margin_points / 100)
    return Paired(
        scope=scope,
        n=n,
        both=both,
        only_reference=lost,
        only_candidate=gained,
        neither=n - both - lost - gained,
        difference_points=100 * (gained - lost) / n,
        low_points=100 * interval.low,
        high_points=100 * interval.high,
        confidence=confidence,
        p_value=mcnemar_exact(lost, gained),
        margin_points=margin_points,
        verdict=verdict,
        n_to_decide=(
            n_to_decide(lost, gained, n, margin_points / 100, confidence)
            if verdict == "inconclusive"
            else None
        ),
    )


def _flip(a: ItemResult, b: ItemResult) -> Flip:
    return Flip(
        id=a.id,
        task=a.task,
        language=a.language,
        direction="right to wrong" if a.correct else "wrong to right",
        question=a.question,
        expected=a.expected,
        reference_answer=a.extracted,
        candidate_answer=b.extracted,
        reference_text=a.text,
        candidate_text=b.text,
    )
