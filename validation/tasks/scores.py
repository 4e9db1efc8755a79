"""Two models by real-valued scores of the same items, such as rubric points: difference and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from validation.document import Document
from validation.errors import MeasurementError
from validation.panel import Column, Table
from validation.statistics import (
    Verdict,
    clusters_to_decide,
    detectable_mean,
    holm,
    non_inferiority,
    paired_means,
)

FEW = 40
"""Conversations that must differ at all for the interval to be taken at its word; see `paired_means`."""


class Score(Document):
    """The score of one item as one model answered it."""

    id: str
    task: str
    conversation: str
    """Items of one conversation are resampled together."""
    score: float


class PairedScores(Document):
    """Candidate minus reference over the same items, in points (hundredths of a score of one)."""

    scope: str
    items: int
    conversations: int
    moved: int
    """Conversations whose scores differ at all."""
    reference_points: float
    candidate_points: float
    difference_points: float
    low_points: float
    high_points: float
    """95 % interval by the symmetric studentised bootstrap, conversations resampled."""
    t_low_points: float
    t_high_points: float
    """Student's interval with the cluster-robust error: a check on the bootstrap."""
    confidence: float
    p_value: float
    p_holm: float | None = None
    """Adjusted by Holm over the tasks."""
    margin_points: float
    detectable_points: float
    """Loss that so many conversations find with 80 % power (one-sided 5 % test) at the spread observed."""
    verdict: Verdict
    conversations_to_decide: int | None
    """When inconclusive: conversations that would decide if difference and spread stayed as observed."""


class ScoreComparison(Document):
    """A candidate against a reference by scores."""

    schema_version: int = 1
    reference: str
    candidate: str
    overall: PairedScores
    by_task: tuple[PairedScores, ...]


def compare_scores(
    reference: Sequence[Score],
    candidate: Sequence[Score],
    *,
    labels: tuple[str, str],
    margin_points: float,
    task_margins: Mapping[str, float] | None = None,
    confidence: float = 0.95,
    span: float = 1.0,
    seed: int = 0,
) -> ScoreComparison:
    """Pair two lists of scores by id.

    Args:
        reference, candidate: scores between 0 and 1 (rubric scores may be negative); any order.
        labels: what tables call the two.
        margin_points: loss that counts as none, in points; of each task without one of its own too.
        task_margins: margins of single tasks.
        confidence: of the intervals.
        span: largest difference that two scores of an item can have; beyond 1 where scores may be negative.
        seed: of the resampling.

    Raises:
        MeasurementError: the ids differ or repeat, a task has fewer than two conversations, or a margin is
            named for a task without items.
    """
    first, second = ({s.id: s for s in scores} for scores in (reference, candidate))
    if len(first) < len(reference) or len(second) < len(candidate):
        raise MeasurementError("an item is scored twice")
    if odd := sorted(first.keys() ^ second.keys()):
        raise MeasurementError(
            f"{len(odd)} items are scored for one of {labels[0]} and {labels[1]} alone, {odd[0]} first",
            "Score the same items for both: a missing score would count for or against one of them.",
        )
    tasks = sorted({s.task for s in reference})
    margins = dict.fromkeys(tasks, margin_points) | dict(task_margins or {})
    if unknown := sorted(set(margins) - set(tasks)):
        raise MeasurementError(f"a margin is named for {', '.join(unknown)}, of which there are no items")

    def paired(scope: str, ids: Sequence[str], margin: float) -> PairedScores:
        before, after = [first[i].score for i in ids], [second[i].score for i in ids]
        try:
            found = paired_means(
                before,
                after,
                [first[i].conversation for i in ids],
                confidence=confidence,
                span=span,
                seed=seed,
            )
        except ValueError as err:
            raise MeasurementError(f"{scope}: {err}") from None
        verdict = non_inferiority(found.interval, margin / 100)
        return PairedScores(
            scope=scope,
            items=found.items,
            conversations=found.clusters,
            moved=found.moved,
            reference_points=100 * sum(before) / len(before),
            candidate_points=100 * sum(after) / len(after),
            difference_points=100 * found.difference,
            low_points=100 * found.interval.low,
            high_points=100 * found.interval.high,
            t_low_points=100 * found.t_interval.low,
            t_high_points=100 * found.t_interval.high,
            confidence=confidence,
            p_value=found.p_value,
            margin_points=margin,
            detectable_points=100 * detectable_mean(found.standard_error),
            verdict=verdict,
            conversations_to_decide=clusters_to_decide(
                found.difference, found.standard_error, found.clusters, margin / 100, confidence
            )
            if verdict == "inconclusive"
            else None,
        )

    ids = list(first)
    rows = [paired(task, [i for i in ids if first[i].task == task], margins[task]) for task in tasks]
    adjusted = holm([row.p_value for row in rows])
    return ScoreComparison(
        reference=labels[0],
        candidate=labels[1],
        overall=paired("all", ids, margin_points),
        by_task=tuple(row.model_copy(update={"p_holm": p}) for row, p in zip(rows, adjusted, strict=True)),
    )


def score_table(comparison: ScoreComparison) -> Table:
    """The comparison as a table of a panel."""

    def points(name: str) -> Column:
        return Column(name=name, unit="points", digits=2)

    return Table(
        caption=f"{comparison.candidate} against {comparison.reference}",
        columns=(
            Column(name="Task", kind="text"),
            Column(name="Items", digits=0),
            Column(name="Conversations", digits=0),
            Column(name="That differ", digits=0),
            *(points(name) for name in (comparison.reference, comparison.candidate)),
            *(points(name) for name in ("Difference", "Low", "High", "Margin")),
            Column(name="p, Holm", digits=4),
            points("Detectable loss"),
            Column(name="Verdict", kind="text"),
            Column(name="Conversations to decide", digits=0),
        ),
        rows=tuple(
            (
                "All" if row is comparison.overall else row.scope,
                row.items,
                row.conversations,
                row.moved,
                row.reference_points,
                row.candidate_points,
                row.difference_points,
                row.low_points,
                row.high_points,
                row.margin_points,
                row.p_holm,
                row.detectable_points,
                row.verdict if row.moved >= FEW or row.moved == 0 else f"{row.verdict} (few differ)",
                row.conversations_to_decide,
            )
            for row in (comparison.overall, *comparison.by_task)
        ),
    )
