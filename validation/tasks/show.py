"""Accuracy and comparisons of items as tables and unfoldings of a panel."""

from __future__ import annotations

from validation.panel import Column, Table, Unfolding
from validation.tasks.accuracy import Share
from validation.tasks.comparison import AccuracyComparison


def share_table(caption: str, first: str, shares: tuple[Share, ...]) -> Table:
    """Shares with their 95 % intervals and the majority baseline, in percent."""
    return Table(
        caption=caption,
        columns=(
            Column(name=first, kind="text"),
            Column(name="items", digits=0),
            Column(name="right", digits=0),
            Column(name="accuracy", unit="%", digits=1),
            Column(name="95 % low", unit="%", digits=1),
            Column(name="95 % high", unit="%", digits=1),
            Column(name="commonest answer", unit="%", digits=1),
        ),
        rows=tuple(
            (
                s.name,
                s.n,
                s.correct,
                100 * s.accuracy,
                100 * s.low,
                100 * s.high,
                100 * s.majority_share,
            )
            for s in shares
        ),
    )


def comparison_table(comparison: AccuracyComparison) -> Table:
    """The paired comparison by task, in percentage points."""
    return Table(
        caption=f"{comparison.candidate} against {comparison.reference}",
        columns=(
            Column(name="task", kind="text"),
            Column(name="items", digits=0),
            Column(name="difference", unit="points", digits=1),
            Column(name="low", unit="points", digits=1),
            Column(name="high", unit="points", digits=1),
            Column(name="lost", digits=0),
            Column(name="gained", digits=0),
            Column(name="p", digits=4),
            Column(name="margin", unit="points", digits=1),
            Column(name="verdict", kind="text"),
        ),
        rows=tuple(
            (
                p.scope,
                p.n,
                p.difference_points,
                p.low_points,
                p.high_points,
                p.only_reference,
                p.only_candidate,
                p.p_value,
                p.margin_points,
                p.verdict
                if p.n_to_decide is None
                else f"{p.verdict} (about {p.n_to_decide} items would decide)",
            )
            for p in (comparison.overall, *comparison.by_task)
        ),
    )


def flip_unfoldings(comparison: AccuracyComparison) -> tuple[Unfolding, ...]:
    """Every flip with both texts, losses first."""
    flips = sorted(comparison.flips, key=lambda f: (f.direction != "right to wrong", f.task, f.id))
    return tuple(
        Unfolding(
            line=f"{flip.id} ({flip.task}): {flip.direction}, "
            f"{flip.reference_answer or '–'} → {flip.candidate_answer or '–'}",
            text=(
                ("Question", flip.question),
                ("Expected", flip.expected),
                (comparison.reference, flip.reference_text),
                (comparison.candidate, flip.candidate_text),
            ),
        )
        for flip in flips
    )
