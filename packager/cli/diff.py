"""`packager diff`: two checkpoints, tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from packager.quantize.compare import Comparison


@click.command(name="diff")
@click.argument("first")
@click.argument("second")
@click.option(
    "--limit", type=click.IntRange(min=0), default=20, show_default=True, help="Tensors to list, worst first."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(first: str, second: str, limit: int, as_json: bool) -> None:
    """Compare the weights of two checkpoints after dequantization.

    A difference is the signal-to-noise ratio 10 log10(sum a^2 / sum (a-b)^2), FIRST being the signal.
    Exits 0 whether they differ or not; the JSON document says `equal`.
    """
    from packager.checkpoint.source import locate
    from packager.quantize import diff

    found = diff(locate(first), locate(second))
    if as_json:
        document = {"first": first, "second": second, "equal": found.equal, **asdict(found)}
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    _print(found, limit)


def _print(found: Comparison, limit: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

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
        table = Table(box=None, pad_edge=False)
        table.add_column("weight", overflow="fold")
        table.add_column("stored as", no_wrap=True)
        table.add_column("SNR dB", justify="right", no_wrap=True)
        table.add_column("largest", justify="right", no_wrap=True)
        for row in found.differing[:limit]:
            ratio = "not finite" if row.snr_db is None else f"{row.snr_db:.2f}"
            kinds = "/".join(dict.fromkeys(row.dtypes))
            table.add_row(escape(row.name), kinds, ratio, f"{row.max_abs:.3g}")
        console.print(table)
    if found.equal:
        click.echo(f"equal: {found.identical} weights")
    else:
        click.echo(f"{found.identical} weights equal, {len(found.differing)} differ")
