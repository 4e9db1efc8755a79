"""`packager relabel`: the same FP8 bytes under the other naming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import click


@click.command(name="relabel")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dialect",
    type=click.Choice(["compressed-tensors", "deepseek"]),
    required=True,
    help="The dialect to write.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    source: str, out: Path, dialect: Literal["compressed-tensors", "deepseek"], as_json: bool
) -> None:
    """Write the block-FP8 checkpoint SOURCE into the new folder OUT under another dialect.

    SOURCE is a folder or hf://org/name@revision, which is read by byte ranges. Only tensor names, headers and
    the config change; the data is copied and its hash recorded.
    """
    from packager.cli.source import opened
    from packager.quantize import relabel

    folder = opened(source)
    manifest = relabel(folder, out, dialect)
    if as_json:
        document = {"path": str(out), "source": folder.name, "digest": manifest.digest}
        click.echo(json.dumps({**document, "metrics": manifest.metrics}))
    else:
        shards = len(manifest.metrics["data_sha256"])
        click.echo(f"{shards} shard(s) in the {dialect} dialect, data unchanged\n{out}  {manifest.digest}")
