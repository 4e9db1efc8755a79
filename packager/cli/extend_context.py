"""`packager extend-context`: a longer context through YaRN."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from packager.cli import options
from packager.cli.output import print_sealed_json
from packager.errors import UsageProblem

_UNDO = "sha256:" + hashlib.sha256(b"undo").hexdigest()
"""In place of a recipe's digest: undoing has no settings."""


@click.command(name="extend-context")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--length",
    type=click.IntRange(min=1),
    help="Tokens to serve; a multiple of the trained length.",
)
@click.option("--undo", "undoing", is_flag=True, help="The other way: configure OUT for the trained length.")
@options.as_json
def command(source: str, out: Path, length: int | None, undoing: bool, as_json: bool) -> None:
    """Write the checkpoint SOURCE into the new folder OUT, configured for LENGTH tokens.

    SOURCE is a model or its EAGLE3 draft. The weights are linked, not copied; config.json and
    tokenizer_config.json are rewritten, and --undo gives them back as they were. SOURCE may be
    hf://org/name@revision: its weights are then streamed into OUT.
    """
    from packager.cli.source import opened
    from packager.context import extend, undo
    from packager.recipe import ContextSpec

    if undoing == (length is not None):
        raise UsageProblem("give either --length or --undo", "`--length 131072` extends, `--undo` reverts.")
    folder = opened(source)
    if length is None:
        manifest = undo(folder, out, recipe_digest=_UNDO)
        if as_json:
            print_sealed_json(out, manifest, source=folder.name)
            return
        found = manifest.metrics
        lengths = f"{found['extended_length']:,} -> {found['length']:,} tokens"
        click.echo(f"{lengths}: as trained\n{out}  {manifest.digest}")
        return
    spec = ContextSpec(length=length)
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
