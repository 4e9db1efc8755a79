"""`packager diff`: two checkpoints, tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from packager.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from packager.quantize.compare import Comparison, ScaleComparison


@click.command(name="diff")
@click.argument("first")
@click.argument("second")
@click.option(
    "--limit", type=click.IntRange(min=0), default=20, show_default=True, help="Tensors to list, worst first."
)
@click.option("--by-layer", is_flag=True, help="Sum up by layer as well as by role.")
@options.as_json
def command(first: str, second: str, limit: int, by_layer: bool, as_json: bool) -> None:
    """Compare the weights of two checkpoints after dequantization, and their scales where both have any.

    Either is a folder, or hf://org/name@revision, which is read by byte ranges; it may be BF16, FP8 in either
    dialect, INT4 or INT8. A difference is the signal-to-noise ratio 10 log10(sum a^2 / sum (a-b)^2), FIRST
    being the signal. Exits 0 whether they differ or not; the JSON document says `equal`.
    """
    from packager.cli.source import opened
    from packager.quantize import diff

    a, b = opened(first), opened(second)
    found = diff(a, b)
    if as_json:
        document = {"first": a.name, "second": b.name, "equal": found.equal, **asdict(found)}
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    _print(found, limit, by_layer)


def _print(found: Comparison, limit: int, by_layer: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for title, names in (
        ("only in the first", found.only_first),
        ("only in the second", found.only_second),
        ("of another shape", found.misshapen),
    ):
        for name in names[:limit]:
            console.print(f"{title}: {escape(name)}", soft_wrap=True)
        if len(names) > limit:
            console.print(f"{title}: … and {len(names) - limit} more")
    if found.differing and limit:
        _print_weights(found, limit, console)
    if found.roles:
        _print_sums("role", found.roles, console)
    if found.layers and by_layer:
        _print_sums("layer", found.layers, console)
    click.echo(_scales_line(found.scales))
    if found.equal:
        click.echo(f"equal: {found.identical} weights")
    else:
        click.echo(f"{found.identical} weights equal, {len(found.differing)} differ")


def _print_weights(found: Comparison, limit: int, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("weight", overflow="fold")
    for title in ("differ", "SNR dB", "largest"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.differing[:limit]:
        ratio = "not finite" if row.snr_db is None else f"{row.snr_db:.2f}"
        kinds = "/".join(dict.fromkeys(row.dtypes))
        largest = "not finite" if row.max_abs is None else f"{row.max_abs:.3g}"
        table.add_row(escape(row.name), str(row.elements), ratio, largest)
        table.add_row(escape(f"  {kinds}, first at {list(row.first)}"))
    console.print(table)
    click.echo()


def _print_sums(title: str, sums: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column(title)
    for name in ("differ", "SNR dB", "worst dB"):
        table.add_column(name, justify="right")
    for name, row in sums.items():
        cells = ("–" if row[key] is None else f"{row[key]:.2f}" for key in ("snr_db", "worst_snr_db"))
        table.add_row(name, str(row["tensors"]), *cells)
    console.print(table)
    click.echo()


def _scales_line(scales: ScaleComparison) -> str:
    if not scales.compared:
        return "scales: none to compare"
    if not scales.differing:
        return f"scales: {scales.compared} equal"
    ratio = "" if scales.largest_ratio is None else f", at most {scales.largest_ratio:.6g} times"
    return (
        f"scales: {scales.differing} of {scales.compared} differ, in {scales.weights} weights{ratio}\n"
        f"        {scales.where}"
    )
