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

    SOURCE is a folder or hf://org/name@revision, which is read by byte ranges. It may be block FP8 in both
    dialects, FP8 with a scale a row, or INT4 or INT8 of compressed-tensors; what was not quantized keeps its
    bytes. Interrupted at any moment, the same command goes on with the first unfinished shard.
    """
    from packager.checkpoint.header import readable_bytes
    from packager.cli.source import opened
    from packager.quantize import dequantize

    folder = opened(source)
    manifest = dequantize(folder, out)
    metrics = manifest.metrics
    if as_json:
        print_sealed_json(out, manifest, source=folder.name)
        return
    tensors = metrics["tensors"]
    before, after = (readable_bytes(metrics["bytes"][key]) for key in ("source", "written"))
    click.echo(
        f"{tensors['dequantized']} weights from {metrics['source_scheme']} to BF16, {tensors['kept']} "
        f"tensors keep their bytes; {before} became {after}\n"
        f"{out}  {manifest.digest}"
    )
