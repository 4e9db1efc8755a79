"""`packager publish`: a bundle to a hub or a directory, a rehearsal of it, or the list of its calls."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from packager.cli import options
from packager.cli.output import progress
from packager.errors import UsageProblem
from packager.publish.targets import SCHEMES, order, parse

_COLUMNS = 80


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("target", metavar="|".join(scheme.form for scheme in SCHEMES.values()))
@click.option("--tag", help="Tag of the new commit [default: bundle-<first digits of the digest>].")
@click.option("--private", is_flag=True, help="Make the repository private if it has to be created.")
@click.option("--gated", type=click.Choice(["auto", "manual"]), help="Readers have to ask for access.")
@click.option(
    "--collection", "collections", multiple=True, metavar="ORG/SLUG", help="Add it to a collection."
)
@click.option("--deprecate", metavar="TAG", help="Mark an older tag: this publication takes its place.")
@click.option("--reason", help="Why that tag should not be used any more.")
@click.option("--key", type=click.Path(path_type=Path), help="Public key to check the signature with first.")
@click.option("--dry-run", is_flag=True, help="Show every call that would be made; write nothing.")
@click.option("--offline", is_flag=True, help="With --dry-run: ask the hub nothing either.")
@click.option("--rehearse", is_flag=True, help="To a hub on this machine, then back and verified.")
@click.option("--hub-dir", type=click.Path(path_type=Path),
              help="Keep the rehearsal's hub here [default: nothing is kept].")  # fmt: skip
@click.option("--download-dir", type=click.Path(path_type=Path),
              help="Keep what the rehearsal downloads here.")  # fmt: skip
@options.as_json
def command(
    bundle: Path,
    target: str,
    key: Path | None,
    rehearse: bool,
    hub_dir: Path | None,
    download_dir: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Upload BUNDLE to TARGET as one transaction; the same command finishes one that was interrupted.

    The hub's token is the one of `hf auth login` or HF_TOKEN, or in CI the one that the hub gives for the
    job's identity (trusted publishing); its address is HF_ENDPOINT.
    """
    scheme, address = parse(target)
    wanted = order(scheme, address, bundle, key, **settings)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if rehearse:
        if not target.startswith("hf://"):
            raise UsageProblem("only a publication to hf:// can be rehearsed", "Leave --rehearse out.")
        if wanted.dry_run:
            raise UsageProblem("a rehearsal writes, a dry run does not", "Leave one of the two out.")
        from packager.publish.rehearsal import rehearse as run

        done: Any = run(
            bundle, address, hub_dir, download_dir, _say, tag=wanted.tag, private=wanted.private,
            gated=wanted.gated, public_key=key,
        )  # fmt: skip
    else:
        if hub_dir or download_dir:
            raise UsageProblem("--hub-dir and --download-dir belong to --rehearse", "Leave them out.")
        done = scheme.send(wanted, _say)
    if as_json:
        click.echo(json.dumps(asdict(done), default=str))
    elif hasattr(done, "lines"):
        click.echo("\n".join(done.lines()))
    else:
        for name, value in asdict(done).items():
            click.echo(f"{name:<8} {value}")


def _say(line: str) -> None:
    progress(textwrap.fill(line, _COLUMNS, subsequent_indent="  ", break_long_words=False))
