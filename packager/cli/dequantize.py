"""`packager dequantize`: quantized weights back to BF16."""

from __future__ import annotations

from pathlib import Path

import click

from packager.cli import options
from packager.cli.output import print_sealed_json


@click.command(name="dequantize")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@options.as_json
def command(source: str, out: Path, as_json: bool) -> None:
    """Write the quantized checkpoint SOURCE with BF16 weights into the new folder OUT.

    Reads block FP8 in both dialects, FP8 with a scale a row, and INT4 and INT8 of compressed-tensors; what
    was not quantized keeps its bytes. Interrupted at any moment, the same command goes on with the first
    unfinished shard.
    """
    from packager.checkpoint.header import readable_bytes
    from packager.checkpoint.source import locate
    from packager.quantize import dequantize

    manifest = dequantize(locate(source), out)
    metrics = manifest.metrics
    if as_json:
        print_sealed_json(out, manifest)
        return
    tensors = metrics["tensors"]
    before, after = (readable_bytes(metrics["bytes"][key]) for key in ("source", "written"))
    click.echo(
        f"{tensors['dequantized']} weights from {metrics['source_scheme']} to BF16, {tensors['kept']} "
        f"tensors keep their bytes; {before} became {after}\n"
        f"{out}  {manifest.digest}"
    )
