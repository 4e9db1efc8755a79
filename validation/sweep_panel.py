"""An interleaved sweep as a panel of the report: pictures, cells, ratios, and what failed."""

from __future__ import annotations

from statistics import median

from validation.panel import Column, Panel, Table
from validation.report.chart import inline_svg
from validation.sweep_bound import bound_of
from validation.sweep_model import Spanned, Sweep, SweepCell
from validation.sweep_pictures import pictures

_RESIDENCY = {
    "together": "all servers up, asked in turn, cell by cell",
    "alternate": "one server up at a time, all of them in every repeat",
}
_LENGTHS = {
    "matched": "the candidate's end by themselves; the others give as many tokens to the same prompt",
    "fixed": "every answer has the full length, past its own end",
}


def sweep_panel(sweep: Sweep) -> Panel:
    """Everything that a reader needs of a sweep; marked where weights or acceptance are not real."""
    tables = [_ratios(sweep), _cells(sweep)] if sweep.ratios else [_cells(sweep)]
    if sweep.failures:
        tables.append(_failures(sweep))
    notes = [f"Not real: {mark}." for mark in sweep.marks]
    if any(one.low is None for one in sweep.ratios):
        notes.append("One repeat shows no spread: such ratios have no interval, and decide no claim.")
    if sweep.hardware is None or all(one.model is None for one in sweep.variants):
        notes.append("No roofline: the sweep does not say what hardware it ran on, or what its models are.")
    if sweep.prefix_caching == "as served":
        notes.append("A server that ran already may keep prefixes; its prompts differ from cell to cell.")
    return Panel(
        key="throughput-sweep",
        title="Throughput, variants in turn",
        summary=summary(sweep),
        tables=tuple(tables),
        plots=tuple((one.caption, str(inline_svg(one))) for one in pictures(sweep)),
        notes=tuple(notes),
        conditions=(
            ("Measured by", sweep.tool),
            ("Order", f"{sweep.order}, {sweep.repeats} repeats: {_RESIDENCY[sweep.residency]}"),
            ("Answers", _LENGTHS[sweep.lengths]),
            ("Prompts", sweep.prompts_digest),
            *(("Served as", f"{one.name}: {' '.join(one.command)}") for one in sweep.variants if one.command),
        ),
        subjects=tuple(dict.fromkeys(one.subject for one in sweep.variants)),
    )


def summary(sweep: Sweep) -> str:
    """What was found, in a sentence or two; what is not real comes first."""
    said = [f"Not real ({'; '.join(sweep.marks)})."] if sweep.marks else []
    for candidate, baseline in dict.fromkeys((one.candidate, one.baseline) for one in sweep.ratios):
        own = [one for one in sweep.ratios if (one.candidate, one.baseline) == (candidate, baseline)]
        values = sorted(one.ratio for one in own)
        faster = sum(one.low is not None and one.low > 1 for one in own)
        slower = sum(one.high is not None and one.high < 1 for one in own)
        said.append(
            f"{candidate} gives {values[0]:.2f} to {values[-1]:.2f} times the output tokens/s of {baseline}, "
            f"median {median(values):.2f}; by the whole interval faster in {faster} and slower in {slower} "
            f"of {len(own)} cells."
        )
    if not sweep.ratios:
        said.append(
            f"{sum(cell.measured for cell in sweep.cells)} of {len(sweep.cells)} cells were measured."
        )
    if sweep.failures:
        said.append(f"Not measured: {len(sweep.failures)} of {len(sweep.cells)} cells.")
    return " ".join(said)


def _ratios(sweep: Sweep) -> Table:
    order = {one.name: at for at, one in enumerate(sweep.variants)}
    rows = sorted(
        sweep.ratios,
        key=lambda r: (order[r.candidate], order[r.baseline], r.input_tokens, r.output_tokens, r.concurrency),
    )
    return Table(
        caption="Ratios of output tokens/s, with 95 % intervals over paired repeats",
        columns=(
            Column(name="Ratio", kind="text"),
            Column(name="At once"),
            Column(name="In", unit="tokens"),
            Column(name="Out", unit="tokens"),
            Column(name="Ratio", digits=2),
            Column(name="Low", digits=2),
            Column(name="High", digits=2),
        ),
        rows=tuple(
            (
                f"{one.candidate} / {one.baseline}",
                one.concurrency,
                one.input_tokens,
                one.output_tokens,
                one.ratio,
                one.low,
                one.high,
            )
            for one in rows
        ),
        brief=True,
    )


def _cells(sweep: Sweep) -> Table:
    bounds = [bound_of(sweep, cell) for cell in sweep.cells]
    power = any(cell.power_w for cell in sweep.cells)
    good = sweep.limits is not None and sweep.limits.given
    columns = [
        Column(name="Variant", kind="text"),
        Column(name="At once"),
        Column(name="In", unit="tokens"),
        Column(name="Out", unit="tokens"),
        Column(name="Output", unit="tokens/s", digits=1),
        Column(name="Lowest", digits=1),
        Column(name="Highest", digits=1),
        Column(name="By device", unit="tokens/s", digits=1),
        Column(name="Of a user", unit="tokens/s", digits=1),
        Column(name="First token", unit="ms", digits=1),
        Column(name="Acceptance", digits=2),
    ]
    columns += [Column(name="Of the roofline", unit="%", digits=1)] if any(bounds) else []
    columns += [Column(name="Goodput", unit="requests/s", digits=2)] if good else []
    columns += [Column(name="Power", unit="W", digits=0)] if power else []
    rows = []
    for cell, bound in zip(sweep.cells, bounds, strict=True):
        speed = cell.output_tokens_per_s
        row: list[str | int | float | None] = [
            cell.variant,
            cell.concurrency,
            round(cell.prompt_tokens or cell.input_tokens),
            round(cell.answer_tokens or cell.output_tokens),
            _middle(speed),
            speed.low if speed else None,
            speed.high if speed else None,
            *map(_middle, (cell.per_device, cell.per_user, cell.ttft_ms, cell.acceptance_length)),
        ]
        if any(bounds):
            row.append(100 * speed.median / bound.tokens_per_s if speed and bound else None)
        row += [_middle(cell.goodput)] if good else []
        row += [_middle(cell.power_w)] if power else []
        rows.append(tuple(row))
    return Table(caption="Every cell: medians over the repeats", columns=tuple(columns), rows=tuple(rows))


def _failures(sweep: Sweep) -> Table:
    def row(cell: SweepCell) -> tuple[str | int, ...]:
        assert cell.failure is not None, "only failures are shown"
        where = (
            f"{cell.variant}, {cell.concurrency} at once, {cell.input_tokens} in, {cell.output_tokens} out"
        )
        return where, cell.failure.kind, cell.failure.message

    return Table(
        caption="What was not measured",
        columns=(
            Column(name="Cell", kind="text"),
            Column(name="What", kind="text"),
            Column(name="Why", kind="text"),
        ),
        rows=tuple(map(row, sweep.failures)),
    )


def _middle(spanned: Spanned | None) -> float | None:
    return None if spanned is None else spanned.median
