"""Which plots a report has, and what stands in each."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from validation.longcontext import LongCell, LongRun, LongShare
from validation.report.model import Report, signed
from validation.report.plots import (
    Group,
    Heat,
    Row,
    bars,
    heat_map,
    intervals,
    points_scale,
    share_scale,
    speed_scale,
)
from validation.tasks.accuracy import Share

_TONES = ("one", "two", "three")


def figures(report: Report) -> dict[str, Markup]:
    """Inline SVG by name; what was not measured has no plot."""
    plots = {}
    if report.accuracy:
        plots["accuracy"] = _accuracy(report)
    if report.comparisons:
        plots["differences"] = _differences(report)
    if report.long_context:
        plots["long"] = _long(report)
    for index, run in enumerate(report.long_context):
        if run.grid:
            plots[f"grid-{index}"] = depth_grid(run)
    if report.throughput:
        plots["throughput"] = _throughput(report)
    if any(cell.acceptance for run in report.throughput for cell in run.cells):
        plots["acceptance"] = _acceptance(report)
    return plots


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def accuracy_shares(report: Report) -> list[list[Share]]:
    """Per row (all, then tasks, then languages if several) the shares of every accuracy run."""
    rows = [[run.overall for run in report.accuracy]]
    rows += [list(shares) for shares in zip(*(run.by_task for run in report.accuracy), strict=True)]
    if len(report.accuracy[0].by_language) > 1:
        rows += [list(shares) for shares in zip(*(run.by_language for run in report.accuracy), strict=True)]
    return rows


def multiples(report: Report) -> list[int | float]:
    """The multiples of the trained length that any run has."""
    return sorted({s.multiple for run in report.long_context for s in run.by_multiple})


def at_multiple(shares: Sequence[LongShare], multiple: int | float) -> LongShare | None:
    """The share at one multiple, if it was measured."""
    return next((s for s in shares if s.multiple == multiple), None)


def _tone(index: int) -> str:
    return "ref" if index == 0 else _TONES[(index - 1) % len(_TONES)]


def _share_row(label: str, share: Share | LongShare, tone: str) -> Row:
    return Row(
        label, share.accuracy, percent(share.accuracy), tone, share.low, share.high, share.majority_share
    )


def _accuracy(report: Report) -> Markup:
    groups = []
    for shares in accuracy_shares(report)[: 1 + len(report.accuracy[0].by_task)]:
        name = "All tasks" if shares[0] is report.accuracy[0].overall else shares[0].name
        pairs = enumerate(zip(report.accuracy, shares, strict=True))
        groups.append(Group(name, [_share_row(run.label, s, _tone(i)) for i, (run, s) in pairs]))
    return intervals("Accuracy by task and model", groups, share_scale())


def _differences(report: Report) -> Markup:
    margins = sorted({-c.overall.margin_points for c in report.comparisons})
    reach = [*margins]
    groups = []
    for i, comparison in enumerate(report.comparisons):
        rows = []
        for p in (comparison.overall, *comparison.by_task):
            name = "all" if p is comparison.overall else p.scope
            rows.append(
                Row(
                    name,
                    p.difference_points,
                    signed(p.difference_points),
                    _tone(i + 1),
                    p.low_points,
                    p.high_points,
                )
            )
            reach += [p.low_points, p.high_points]
        groups.append(Group(f"{comparison.candidate} against {comparison.reference}", rows))
    marks = [(0.0, "zero"), *((m, "margin") for m in margins)]
    return intervals("Paired differences in percentage points", groups, points_scale(reach), marks)


def _long(report: Report) -> Markup:
    groups = []
    for multiple in multiples(report):
        shares = [
            (i, run.label, at_multiple(run.by_multiple, multiple))
            for i, run in enumerate(report.long_context)
        ]
        rows = [_share_row(label, s, _tone(i)) for i, label, s in shares if s is not None]
        groups.append(Group(f"{multiple:g}× the trained length", rows))
    return intervals("Retrieval from long records", groups, share_scale())


def depth_grid(run: LongRun) -> Markup:
    """Depth by length: the share found, and its Wilson interval, in per cent."""
    lengths = sorted({cell.multiple for cell in run.grid})
    depths = sorted({(c.depth_low or 0.0, c.depth_high or 0.0) for c in run.grid})
    at = {(c.multiple, c.depth_low or 0.0): c for c in run.grid}

    def heat(cell: LongCell | None) -> Heat | None:
        if cell is None:
            return None
        return Heat(cell.accuracy, f"{100 * cell.accuracy:.0f} %", f"{100 * cell.low:.0f}–{100 * cell.high:.0f}")

    rows = []
    for low, high in depths:
        label = f"{100 * low:.0f} %" if low == high else f"{100 * low:.0f} – {100 * high:.0f} %"
        rows.append((label, [heat(at.get((length, low))) for length in lengths]))
    columns = [_tokens(round(length * run.trained_length)) for length in lengths]
    title = f"Values found by depth and length, {run.label}"
    return heat_map(title, columns, rows, across="tokens, by depth in the record")


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count >= 8192 and count % 1024 == 0 else f"{count:,}"


def _throughput(report: Report) -> Markup:
    others = [run.label for run in report.throughput if run.label != report.throughput_baseline]
    groups = []
    for level in sorted({c.concurrency for run in report.throughput for c in run.cells}):
        rows = []
        for run in report.throughput:
            cell = run.at(level)
            if cell is not None:
                tone = _tone(others.index(run.label) + 1) if run.label in others else "ref"
                speed = cell.output_tokens_per_s
                rows.append(Row(run.label, speed, f"{speed:,.0f}", tone))
        groups.append(Group(f"Concurrency {level}", rows))
    speeds = [c.output_tokens_per_s for run in report.throughput for c in run.cells]
    return bars("Output tokens per second", groups, speed_scale(speeds))


def _acceptance(report: Report) -> Markup:
    groups = []
    for run in report.throughput:
        for cell in run.cells:
            if cell.acceptance is None:
                continue
            rates = enumerate(cell.acceptance.per_position, 1)
            heading = (
                f"{run.label}, concurrency {cell.concurrency}: {cell.acceptance.length:.2f} tokens a step"
            )
            groups.append(Group(heading, [Row(f"position {k}", r, percent(r), "one") for k, r in rates]))
    return bars("Accepted draft tokens by position", groups, share_scale())
