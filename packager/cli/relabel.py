"""`packager relabel`: the same FP8 bytes under the other naming."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from packager.cli import options
from packager.cli.output import print_sealed_json
from packager.recipe import Dialect


@click.command(name="relabel")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dialect",
    type=click.Choice(get_args(Dialect)),
    required=True,
    help="The dialect to write.",
)
@options.as_json
def command(source: str, out: Path, dialect: Dialect, as_json: bool) -> None:
    """Write the block-FP8 checkpoint SOURCE into the new folder OUT under another dialect.

    SOURCE is a folder or hf://org/name@revision, which is read by byte ranges. Only tensor names, headers and
    the config change; the data is copied and its hash recorded.
    """
    from packager.cli.source import opened
    from packager.quantize import relabel

    folder = opened(source)
    manifest = relabel(folder, out, dialect)
    if as_json:
        print_sealed_json(out, manifest, source=folder.name)
    else:
        shards = len(manifest.metrics["data_sha256"])
        click.echo(f"{shards} shard(s) in the {dialect} dialect, data unchanged\n{out}  {manifest.digest}")
