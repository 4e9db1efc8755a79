"""`packager extend-context`: a longer context through YaRN."""

from __future__ import annotations

from pathlib import Path

import click

from packager.cli import options
from packager.cli.output import print_sealed_json


@click.command(name="extend-context")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--length",
    type=click.IntRange(min=1),
    required=True,
    help="Tokens to serve; a multiple of the trained length.",
)
@options.as_json
def command(source: str, out: Path, length: int, as_json: bool) -> None:
    """Write the checkpoint SOURCE into the new folder OUT, configured for LENGTH tokens.

    The weights are linked, not copied; config.json and tokenizer_config.json are rewritten. SOURCE may be
    hf://org/name@revision: its weights are then streamed into OUT.
    """
    from packager.cli.source import opened
    from packager.context import extend
    from packager.recipe import ContextSpec

    spec = ContextSpec(length=length)
    folder = opened(source)
    manifest = extend(folder, out, spec, recipe_digest=spec.digest)
    if as_json:
        print_sealed_json(out, manifest, source=folder.name)
        return
    found = manifest.metrics
    click.echo(
        f"{found['original_length']:,} -> {found['length']:,} tokens: YaRN factor {found['factor']:g}, "
        f"mscale {found['mscale']:.4f}, ramp over pairs {found['ramp'][0]} to {found['ramp'][1]} "
        f"of {found['rotary_dim'] // 2}\n{out}  {manifest.digest}"
    )
