"""Two models on the same items: the paired difference, its interval, the verdict, and every flip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from validation.document import Document
from validation.errors import MeasurementError
from validation.statistics import (
    Verdict,
    beyond_margin_p,
    detectable_difference,
    holm,
    mcnemar_exact,
    n_to_decide,
    non_inferiority,
    paired_difference,
)
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
    p_holm: float | None = None
    """`p_value` adjusted by Holm over the tasks (or steps) looked at together; None: looked at alone."""
    detectable_points: float | None = None
    """Loss that so many items find with 80 % power (one-sided 5 % test) at the discordance observed."""

    @property
    def margin(self) -> float:
        """The margin as a proportion."""
        return self.margin_points / 100


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
    reference: AccuracyRun,
    candidate: AccuracyRun,
    *,
    margin_points: float,
    task_margins: Mapping[str, float] | None = None,
    confidence: float = 0.95,
) -> AccuracyComparison:
    """Compare two runs over the same items against margins in percentage points, named beforehand.

    Args:
        reference, candidate: the two runs.
        margin_points: margin over all items, and of each task without one of its own.
        task_margins: margins of single tasks.
        confidence: of the intervals. Non-inferiority needs no adjustment over tasks (all must hold to claim
            all); that a task differs, or is inferior, is claimed by Holm's adjusted p-values.

    Raises:
        MeasurementError: the runs differ in items or sampling, so their answers do not pair; a margin is
            named for a task of which there are no items.
    """
    if reference.items_digest != candidate.items_digest:
        raise MeasurementError(
            f"{reference.label} and {candidate.label} answered different items; they do not pair"
        )
    if reference.sampling != candidate.sampling:
        raise MeasurementError(f"{reference.label} and {candidate.label} were sampled differently")
    pairs = list(zip(reference.results, candidate.results, strict=True))
    tasks = sorted({r.task for r, _ in pairs})
    margins = dict.fromkeys(tasks, margin_points) | dict(task_margins or {})
    if unknown := sorted(set(margins) - set(tasks)):
        raise MeasurementError(
            f"a margin is named for {', '.join(unknown)}, of which there are no items",
            f"The tasks are {', '.join(tasks)}.",
        )
    return AccuracyComparison(
        reference=reference.label,
        candidate=candidate.label,
        reference_subject=reference.subject,
        candidate_subject=candidate.subject,
        items_digest=reference.items_digest,
        overall=paired_outcomes("all", [(a.correct, b.correct) for a, b in pairs], margin_points, confidence),
        by_task=looked_at_together(
            [
                paired_outcomes(
                    task,
                    [(a.correct, b.correct) for a, b in pairs if a.task == task],
                    margins[task],
                    confidence,
                )
                for task in tasks
            ]
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
    detectable = detectable_difference(n, (lost + gained) / n)
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
        detectable_points=None if detectable is None else 100 * detectable,
    )


def looked_at_together(rows: Sequence[Paired]) -> tuple[Paired, ...]:
    """The rows with their p-values adjusted by Holm; "inferior" stands only where it survives adjustment.

    So the chance that any of several unchanged tasks is called inferior is no larger than that of one.
    """
    differs = holm([row.p_value for row in rows])
    beyond = holm(
        [beyond_margin_p(row.only_reference, row.only_candidate, row.n, row.margin) for row in rows]
    )
    adjusted = []
    for row, p_differs, p_beyond in zip(rows, differs, beyond, strict=True):
        update: dict[str, object] = {"p_holm": p_differs}
        if row.verdict == "inferior" and p_beyond >= (1 - row.confidence) / 2:
            confidence = 1 - (1 - row.confidence) / len(rows)
            update["verdict"] = "inconclusive"
            update["n_to_decide"] = n_to_decide(
                row.only_reference, row.only_candidate, row.n, row.margin, confidence
            )
        adjusted.append(row.model_copy(update=update))
    return tuple(adjusted)


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
