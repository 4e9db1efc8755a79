"""The cost of a context extension to short prompts, as a panel: static YaRN changes every length."""

from __future__ import annotations

from validation.longcontext import LongComparison
from validation.panel import Cell, Column, Panel, Table, Unfolding
from validation.report.model import signed
from validation.tasks.comparison import AccuracyComparison, Paired


def short_context_panel(comparison: AccuracyComparison, records: LongComparison | None = None) -> Panel:
    """What short prompts lose by the context patch: the same items before and after it, paired.

    Args:
        comparison: reference: the quantized model without the patch; candidate: the same weights with it.
        records: the same for long records, if they were read; lengths the model was trained to are added.
    """
    scopes: list[tuple[str, Paired]] = [("all short items", comparison.overall)]
    scopes += [(paired.scope, paired) for paired in comparison.by_task]
    if records is not None:
        within = [p for p in records.by_multiple if float(p.scope.rstrip("x")) <= 1]
        scopes += [(f"records of {p.scope} the trained length", p) for p in within]
    overall = comparison.overall
    rows: list[tuple[Cell, ...]] = []
    for name, p in scopes:
        counts = (
            p.n,
            p.both + p.only_reference,
            p.both + p.only_candidate,
            p.only_reference,
            p.only_candidate,
        )
        change = (p.difference_points, p.low_points, p.high_points, p.p_value, p.verdict)
        rows.append((name, *counts, *change))
    lost = [flip for flip in comparison.flips if flip.direction == "right to wrong"]
    return Panel(
        key="short-context",
        title="What the context extension costs short prompts",
        summary=f"{signed(overall.difference_points)} points ({signed(overall.low_points)} to "
        f"{signed(overall.high_points)}) on {overall.n} short items, {comparison.candidate} against "
        f"{comparison.reference}: {overall.verdict} at a margin of {overall.margin_points:g} points. "
        f"{overall.only_reference} items were lost, {overall.only_candidate} gained.",
        tables=(
            Table(
                caption=f"{comparison.candidate} against {comparison.reference}, the same items",
                columns=(
                    Column(name="Items of", kind="text"),
                    Column(name="Items"),
                    Column(name="Right before"),
                    Column(name="Right after"),
                    Column(name="Lost"),
                    Column(name="Gained"),
                    Column(name="Difference", unit="points", digits=1),
                    Column(name="from", digits=1),
                    Column(name="to", digits=1),
                    Column(name="p", digits=3),
                    Column(name="Verdict", kind="text"),
                ),
                rows=tuple(rows),
                brief=True,
            ),
        ),
        unfoldings=tuple(
            Unfolding(
                line=f"{flip.task}, {flip.id}: expected {flip.expected}, after the patch "
                f"{flip.candidate_answer or 'no answer'}",
                text=(
                    ("Question", flip.question),
                    (comparison.reference, flip.reference_text),
                    (comparison.candidate, flip.candidate_text),
                ),
            )
            for flip in lost
        ),
        notes=(
            "A static rotary patch changes every position, so prompts of the trained length pay for it too. "
            "Interval and p as in the paired differences above.",
        ),
        subjects=(comparison.reference_subject, comparison.candidate_subject),
    )
