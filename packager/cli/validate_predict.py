"""`packager validate predict`: speeds on hardware one does not have; published ones against the bound."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packager.cli import options
from packager.cli.measuring import EXISTING_FILE
from packager.cli.sweep_files import hardware_named, read_sweep, sweep_options
from packager.errors import GateFailed, UsageProblem

if TYPE_CHECKING:
    from validation.hardware import Hardware
    from validation.predict import Calibration, Cell, Prediction, Transfer

_FEWEST = 4
"""Cells that a fit needs."""
_GAINS = """\
Only the acceptance length bounds a gain. The last column is the ratio of the
bounds with and without the draft: gains lie above it where neighbouring tokens
share experts, or plain decoding stays further below its bound.
"""


@click.command()
@click.argument("sweep", required=False, type=EXISTING_FILE)
@click.option("--hardware", help="Cards to predict for, e.g. 2xh20. Without it only the fit is shown.")
@click.option(
    "--published", is_flag=True, help="Published speeds instead of a sweep, each against the bound."
)
@sweep_options
@options.as_json
def predict(
    sweep: Path | None,
    hardware: str | None,
    published: bool,
    on: str | None,
    models: tuple[str, ...],
    as_json: bool,
) -> None:
    """What measured cells say of speeds on other hardware, and how far such words can be trusted.

    SWEEP is what `validate throughput --out` wrote. Its cells calibrate the roofline: each is said by the
    others (held out), and for --hardware each is said twice: by that fit, and by the ratio of the two bounds
    alone. Both have intervals, of held-out errors and of efficiencies.

    With --published the speeds that others measured and published, each with its source, stand beside the
    bound; exits 4 if one were above it.
    """
    if published == (sweep is not None):
        raise UsageProblem(
            "give either SWEEP or --published", "For instance: packager validate predict --published"
        )
    target = hardware_named(hardware) if hardware else None
    if published:
        _published(target, as_json)
        return
    assert sweep is not None, "checked above"
    from validation.sweep_bound import step_cells

    read = read_sweep(sweep, on, models)
    _show(step_cells(read), target, read.marks, as_json)


def _published(target: Hardware | None, as_json: bool) -> None:
    from validation.published import compare_published, published_cells, published_file

    compared, sources = compare_published(), published_file().sources
    if not as_json:
        for quantity in dict.fromkeys(one.row.quantity for one in compared):
            drafts = any(one.roofline_gain for one in compared if one.row.quantity == quantity)
            heads = (
                f"{quantity:<27}{'cards':>7}{'weights':>8}{'at once':>8}{'said':>8}{'bound':>8}{'share':>6}"
            )
            click.echo(heads + (" of bounds" if drafts else ""))
            for one in (one for one in compared if one.row.quantity == quantity):
                row = one.row
                at = f"{one.concurrency}" if row.concurrency else f"({one.concurrency})"
                said, bound = (f"{v:,.{2 if v < 100 else 0}f}" for v in (row.value, one.bound))
                click.echo(
                    f"{row.id:<27}{row.hardware:>7}{row.precision:>8}{at:>8}{said:>8}{bound:>8}{one.share:>6.0%}"
                    + (f"{one.roofline_gain:>8.2f}" if one.roofline_gain else "")
                )
            click.echo(_GAINS if drafts else "")
        click.echo("At once, in brackets: not stated; that of the highest bound that fits in memory.\n")
        for key, text in sources.items():
            count = sum(one.row.source == key for one in compared)
            click.echo(textwrap.fill(f"{count:>3}  {text}", 79, subsequent_indent="     "))
        click.echo("\nThe step times among them as cells, of several engines and cards:\n")
    found = _show(published_cells(), target, (), as_json=False, silent=as_json)
    if as_json:
        document = {
            "kind": "published",
            "sources": sources,
            "rows": [one.model_dump(mode="json") for one in compared],
        }
        click.echo(json.dumps(document | found, ensure_ascii=False))
    wrong = [one.row.id for one in compared if one.share > 1]
    if wrong:
        raise GateFailed(
            f"{len(wrong)} published figures are above the bound: {', '.join(wrong)}",
            "The bound, or what the file says of them, is wrong.",
        )


def _show(
    cells: Sequence[Cell], target: Hardware | None, marks: Sequence[str], as_json: bool, silent: bool = False
) -> dict[str, object]:
    """Print fit and predictions, or one JSON document; returns what the document holds."""
    from validation.predict import calibrate, predict, transfer

    fit = calibrate(cells) if len(cells) >= _FEWEST else None
    said: list[tuple[Cell, Prediction | None, Transfer | None]] = []
    if target is not None:
        one_card = len({cell.card for cell in cells}) == 1
        moved = transfer(cells, target.card, ways=target.count) if one_card else [None] * len(cells)
        for cell, by_ratio in zip(cells, moved, strict=True):
            setting = cell.setting.model_copy(update={"tensor": target.count})
            by_fit = None
            if fit is not None:
                by_fit = predict(
                    fit, cell.model, target.card, setting, concurrency=cell.concurrency, context=cell.context
                )
            said.append((cell, by_fit, by_ratio))
    document: dict[str, object] = {
        "kind": "predict",
        "marks": list(marks),
        "median_error": fit.median_error if fit else None,
        "held_out": [{**one.model_dump(), "error": one.error} for one in fit.held_out] if fit else [],
        "hardware": target.label if target else None,
        "predictions": [
            {
                "label": cell.label,
                "by_fit": by_fit.model_dump(mode="json") if by_fit else None,
                "by_ratio": by_ratio.model_dump(mode="json") if by_ratio else None,
            }
            for cell, by_fit, by_ratio in said
        ],
    }
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False))
    elif not silent:
        for mark in marks:
            click.echo(f"not real: {mark}")
        _print_fit(cells, fit)
        if target is not None:
            _print_said(said, target, fit)
    return {name: document[name] for name in ("median_error", "held_out", "predictions")}


def _print_fit(cells: Sequence[Cell], fit: Calibration | None) -> None:
    if fit is None:
        click.echo(f"{len(cells)} cells are too few for a fit; {_FEWEST} are needed")
        return
    click.echo(f"{'a step, held out: ms':<45}{'measured':>10}{'said':>8}{'off':>6}{'of bound':>10}")
    for cell, held in zip(cells, fit.held_out, strict=True):
        click.echo(
            f"{cell.label[:44]:<45}{1000 * held.measured_s:>10.2f}{1000 * held.predicted_s:>8.2f}"
            f"{held.error:>+6.0%}{cell.bound.seconds / cell.seconds:>10.0%}"
        )
    worst = max(abs(one.error) for one in fit.held_out)
    click.echo(
        f"\nheld-out cells: median error {fit.median_error:.1%}, worst {worst:.0%}, of {fit.cells} cells"
    )
    seen = {name: fit.efficiency(name) for name in ("weights", "cache", "arithmetic", "links")}
    # Beyond twice the rate the cells are not limited by it at all.
    shares = [f"{name} {share:.0%}" for name, share in seen.items() if share is not None and share < 2]
    click.echo(f"of the hardware's rates: {', '.join(shares) or 'none seen'}")
    step, sequence = (1000 * value for value in fit.coefficients[4:])
    click.echo(f"host: {step:.2f} ms a step, {sequence:.3f} ms a sequence")


def _print_said(
    said: Sequence[tuple[Cell, Prediction | None, Transfer | None]], target: Hardware, fit: Calibration | None
) -> None:
    click.echo(f"\non {target.label}, output tokens/s while decoding, of all requests together:\n")
    click.echo(f"{'':<29}{'fit':>7}{'9 in 10':>14}{'ratio':>8}{'9 in 10':>14}{'at most':>8}")
    heading = ""
    for cell, by_fit, by_ratio in said:
        variant, _, place = cell.label.partition(", ")
        if place and variant != heading:
            heading = variant
            click.echo(heading)
        gain = cell.setting.draft.acceptance_length if cell.setting.draft else 1.0
        tokens = gain * cell.concurrency
        row = f"{(place or variant)[:28]:<29}"
        for one, width in ((by_fit, 7), (by_ratio, 8)):
            middle, between = "–", ""
            if one is not None:
                middle = f"{one.tokens_per_s:,.0f}"
                between = f"{tokens / one.high_s:,.0f}–{tokens / one.low_s:,.0f}"
            row += f"{middle:>{width}}{between:>14}"
        bound = by_fit or by_ratio
        click.echo(row + (f"{tokens / bound.bound.seconds:>8,.0f}" if bound else ""))
    if fit is not None:
        click.echo("\nfit: efficiencies and host time as measured; ratio: as far from the bound as here")
