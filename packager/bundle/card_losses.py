"""Where a release is worse than what it was made from: the part of a card that is most easily left out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from packager.bundle.card_parts import (
    Term,
    Words,
    number,
    panels_of,
    percent,
    said,
    scope,
    scopes,
    share,
    share_of,
)
from packager.bundle.card_settings import CardSettings

if TYPE_CHECKING:
    from validation.report import Report
    from validation.throughput import ThroughputRun


def losing(report: Report, settings: CardSettings) -> Iterator[Words]:
    """Where the release is worse than what it was made from, by the point estimate: every such place."""
    yield from _lost_items(report)
    yield from _lost_panels(report)
    yield from _lost_records(report, settings.min_long_accuracy)
    yield from _slower(report)


def _lost_items(report: Report) -> Iterator[Words]:
    if len(report.accuracy) < 2:
        return
    steps = [c.candidate for c in report.comparisons if c.reference == report.accuracy[0].label]
    last = report.accuracy[-1].label
    # The quantized weights by themselves, and all that is served.
    compared = [at for at, run in enumerate(report.accuracy) if run.label in (*steps[:1], last) and at]
    for at in compared:
        run = report.accuracy[at]
        for kind, below, one in scopes(report):
            found = share_of(run, kind, one.name)
            if kind == "overall" or found is None or found[1].accuracy >= one.accuracy:
                continue
            yield said(
                "lost_items",
                scope=scope(kind, one.name),
                candidate=Term(run.label),
                after=share(("accuracy", at, *found[0]), found[1], "accuracy"),
                before=share(("accuracy", 0, *below), one, "accuracy"),
                reference=Term(report.accuracy[0].label),
            )


def _lost_panels(report: Report) -> Iterator[Words]:
    """Rows of a panel's paired comparison whose difference is negative (benchmarks, rubrics)."""
    for at, panel, anchor in panels_of(report):
        if panel.key in ("verdicts", "matrix", "noise-floor", "safety", "short-context"):
            continue  # the items above, seen from elsewhere
        for t, table in enumerate(panel.tables):
            names = [column.name for column in table.columns]
            if not {"Difference", "Low", "High", "Task"} <= set(names):
                continue
            d = names.index("Difference")
            for r, row in enumerate(table.rows):
                lost = row[d]
                if not isinstance(lost, int | float) or lost >= 0:
                    continue
                where = ("panels", at, "tables", t, "rows", r)
                yield said(
                    "lost_panel",
                    panel=Term(panel.title),
                    task=Term(str(row[names.index("Task")])),
                    caption=Term(table.caption),
                    figure=number(lost, *where, d, anchor=anchor, digits=1, unit="points", signed=True),
                )


def _lost_records(report: Report, bound: float) -> Iterator[Words]:
    """Lengths and depths at which the release, as served last, reads too few records."""
    if not report.long_context:
        return
    at = len(report.long_context) - 1
    run = report.long_context[at]
    for row, one in enumerate(run.by_multiple):
        if one.accuracy < bound:
            where = ("long_context", at, "by_multiple", row)
            yield said(
                "lost_length",
                tokens=number(one.context_tokens, *where, "context_tokens", anchor="long-records", digits=0),
                bound=f"{100 * bound:g}",
                figure=share(where, one, "long-records"),
            )
    for row, cell in enumerate(run.grid):
        if cell.accuracy < bound and cell.depth_low is not None:
            where = ("long_context", at, "grid", row)
            yield said(
                "lost_depth",
                depth=percent(cell.depth_low, *where, "depth_low", anchor="long-records", digits=0),
                multiple=number(cell.multiple, *where, "multiple", anchor="long-records", unit="×"),
                figure=share(where, cell, "long-records"),
            )


def _slower(report: Report) -> Iterator[Words]:
    """Where a draft is slower than none: concurrencies of the sweep, and settings of a draft's evaluation."""
    for (at, plain), (next_at, drafted) in pairwise(enumerate(report.throughput)):
        if _drafts(plain) or not _drafts(drafted):
            continue
        for row, cell in enumerate(drafted.cells):
            other = next((i for i, c in enumerate(plain.cells) if c.concurrency == cell.concurrency), None)
            if other is None or cell.output_tokens_per_s >= plain.cells[other].output_tokens_per_s:
                continue
            yield said(
                "slower",
                concurrency=cell.concurrency,
                drafted=number(cell.output_tokens_per_s, "throughput", next_at, "cells", row,
                               "output_tokens_per_s", anchor="speed", digits=1),
                plain=number(plain.cells[other].output_tokens_per_s, "throughput", at, "cells", other,
                             "output_tokens_per_s", anchor="speed", digits=1),
            )  # fmt: skip
    for at, panel, anchor in panels_of(report):
        if not panel.key.startswith("draft-evaluation"):
            continue
        for t, table in enumerate(panel.tables):
            names = [column.name for column in table.columns]
            setting = next((n for n in ("concurrency", "up to") if n in names), None)
            if "speed" not in names or setting is None:
                continue
            for r, cells in enumerate(table.rows):
                speed = cells[names.index("speed")]
                if isinstance(speed, int | float) and speed < 1:
                    where = ("panels", at, "tables", t, "rows", r, names.index("speed"))
                    yield said(
                        "slower_at_concurrency" if setting == "concurrency" else "slower_at_length",
                        tokens=str(cells[names.index("K")]),
                        setting=str(cells[names.index(setting)]),
                        figure=number(speed, *where, anchor=anchor, digits=2, unit="×"),
                    )


def _drafts(run: ThroughputRun) -> bool:
    return any(cell.acceptance is not None for cell in run.cells)
