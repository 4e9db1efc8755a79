"""`packager quantize`: BF16 weights to block FP8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from packager.recipe import QuantizeSpec


@click.command(name="quantize")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--scheme", type=click.Choice(["fp8-block"]), default="fp8-block", show_default=True)
@click.option(
    "--dialect",
    type=click.Choice(["compressed-tensors", "deepseek"]),
    default="compressed-tensors",
    show_default=True,
    help="How the config and the scales are named; the data is the same.",
)
@click.option(
    "--scale-rounding",
    type=click.Choice(["power-of-two", "float32"]),
    default="power-of-two",
    show_default=True,
    help="Power-of-two scales survive Hopper's DeepGEMM unchanged.",
)
@click.option(
    "--shard-bytes",
    type=click.IntRange(min=1),
    default=5_000_000_000,
    show_default=True,
    help="Largest data section of an output shard.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    source: str,
    out: Path,
    scheme: Literal["fp8-block"],
    dialect: Literal["compressed-tensors", "deepseek"],
    scale_rounding: Literal["power-of-two", "float32"],
    shard_bytes: int,
    as_json: bool,
) -> None:
    """Write the BF16 checkpoint SOURCE as 128x128 block FP8 into the new folder OUT.

    Works shard by shard in little memory. Interrupted at any moment, the same command goes on with the first
    unfinished shard and ends in the same bytes.
    """
    from packager.checkpoint.source import locate
    from packager.quantize import quantize

    spec = QuantizeSpec(
        scheme=scheme, dialect=dialect, scale_rounding=scale_rounding, shard_bytes=shard_bytes
    )
    manifest = quantize(
        locate(source),
        out,
        spec,
        recipe_digest=spec.digest,
        progress=lambda line: click.echo(line, err=True),
    )
    if as_json:
        click.echo(json.dumps({"path": str(out), "digest": manifest.digest, "metrics": manifest.metrics}))
        return
    _print(out, manifest.digest, manifest.metrics)


def _print(out: Path, digest: str, metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from packager.checkpoint.header import readable_bytes

    table = Table(box=None, pad_edge=False)
    table.add_column("weights")
    for title in ("tensors", "SNR dB", "worst dB"):
        table.add_column(title, justify="right")
    for role, row in metrics["fidelity"].items():
        table.add_row(role, str(row["tensors"]), _decibels(row["snr_db"]), _decibels(row["worst_snr_db"]))
    console = Console(highlight=False)
    console.print(table)
    size = metrics["bytes"]
    click.echo(
        f"{metrics['tensors']['kept']} tensors keep their bytes; "
        f"{readable_bytes(size['source'])} became {readable_bytes(size['written'])}\n{out}  {digest}"
    )


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"
