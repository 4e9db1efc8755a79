"""Public benchmarks as a reader of the report meets them."""

from __future__ import annotations

from validation.panel import Column, Panel, Table
from validation.public_benchmarks.run import BenchmarkRun
from validation.tasks import AccuracyComparison
from validation.tasks.show import flip_unfoldings, share_table
from validation.verdict import verdict_panel


def benchmarks_panel(
    run: BenchmarkRun, comparison: AccuracyComparison | None = None, *, part: int | None = None
) -> Panel:
    """Accuracy by task, lm-eval's own averages, the data, and what changed against the reference.

    Args:
        part: number of the panel, where a report has several.
    """
    tables: list[Table] = []
    summary = f"{len(run.data)} tasks, {sum(d.items for d in run.data):,} items."
    if run.items is not None:
        overall = run.items.overall
        summary += f" {overall.correct:,} of {overall.n:,} right ({100 * overall.accuracy:.1f} %)."
        tables.append(share_table("By task", "task", (overall, *run.items.by_task)))
    if comparison is not None:
        summary += f" Against {comparison.reference}: {comparison.overall.verdict}."
        tables.append(verdict_panel((comparison,)).tables[0])
    if run.scores:
        tables.append(
            Table(
                caption="Averages as lm-eval gives them",
                columns=(
                    Column(name="task", kind="text"),
                    Column(name="metric", kind="text"),
                    Column(name="filter", kind="text"),
                    Column(name="value", digits=4),
                    Column(name="items", digits=0),
                ),
                rows=tuple((s.task, s.metric, s.filter, s.value, s.items) for s in run.scores),
            )
        )
    tables.append(
        Table(
            caption="Data",
            columns=tuple(
                Column(name=name, kind="text")
                for name in ("task", "data set", "split", "revision", "fingerprint", "digest of the items")
            ),
            rows=tuple(
                (
                    d.task,
                    d.dataset if d.config is None else f"{d.dataset}, {d.config}",
                    d.split,
                    d.revision,
                    d.fingerprint,
                    d.items_digest,
                )
                for d in run.data
            ),
        )
    )
    how = {
        "likelihood": "A multiple choice is the likeliest continuation of plain text, as lm-eval defines it.",
        "reasoning": "Multiple choices were asked in chat and thought through; the last `Answer:` counts.",
    }[run.style]
    return Panel(
        key=f"benchmarks-{run.style}" + (f"-{part}" if part is not None else ""),
        title=f"Public benchmarks, {run.label}" + (", with reasoning" if run.style == "reasoning" else ""),
        summary=summary,
        tables=tuple(tables),
        unfoldings=flip_unfoldings(comparison) if comparison is not None else (),
        notes=(how, f"Tasks, prompts and metrics: lm-eval {run.lm_eval}."),
        subjects=(run.subject,),
    )
