"""Accuracy by task as a table, and flips as unfoldings, of a panel."""

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
