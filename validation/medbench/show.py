"""MedBench as a reader of the report meets it."""

from __future__ import annotations

from validation.medbench.run import MedBenchComparison, MedBenchRun, TaskShare
from validation.panel import Column, Panel, Table, Unfolding
from validation.tasks.scores import score_table
from validation.tasks.show import flip_unfoldings
from validation.verdict import verdict_panel


def medbench_panel(run: MedBenchRun, comparison: MedBenchComparison | None = None) -> Panel:
    """The five dimensions, the tasks, and what changed against the reference."""
    labelled = sum(t.labelled for t in run.by_task)
    summary = (
        f"{len(run.answers):,} questions of {len(run.by_task)} tasks answered; {labelled:,} have labels. "
    )
    summary += (
        f"{len(run.faults):,} answers are not in the form asked for."
        if run.faults
        else "All answers are filled and in the form asked for."
    )
    tables = [
        _table("Dimensions", "dimension", run.by_dimension),
        _table("Tasks", "task", run.by_task),
    ]
    if comparison is not None:
        if comparison.choices is not None:
            tables.append(verdict_panel((comparison.choices,)).tables[0])
        if comparison.open is not None:
            tables.append(score_table(comparison.open))
    return Panel(
        key="medbench",
        title=f"MedBench, {run.label}",
        summary=summary,
        tables=tuple(tables),
        unfoldings=(
            *(Unfolding(line=fault, text=()) for fault in run.faults[:50]),
            *(flip_unfoldings(comparison.choices) if comparison and comparison.choices else ()),
        ),
        notes=(
            "A score is the mean over a task's labelled items: 1 for the right letters, for open answers the "
            "recall of the reference's key points word for word, a lower bound. The leaderboard's figures "
            "come from its server and are not these.",
            f"Data {run.data_digest}.",
        ),
        subjects=(run.subject,),
    )


def _table(caption: str, first: str, shares: tuple[TaskShare, ...]) -> Table:
    return Table(
        caption=caption,
        columns=(
            Column(name=first, kind="text"),
            Column(name="dimension", kind="text"),
            Column(name="items", digits=0),
            Column(name="labelled", digits=0),
            Column(name="choices right", digits=0),
            Column(name="score", unit="%", digits=1),
        ),
        rows=tuple(
            (
                s.name,
                s.dimension,
                s.items,
                s.labelled,
                s.choices_right,
                None if s.score is None else 100 * s.score,
            )
            for s in shares
        ),
    )
