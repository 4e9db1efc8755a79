"""`packager publish`: a bundle to a hub or a directory, or a rehearsal of it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from packager.cli import options
from packager.cli.output import progress
from packager.errors import UsageProblem
from packager.publish.targets import SCHEMES, order, parse


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("target", metavar="|".join(scheme.form for scheme in SCHEMES.values()))
@click.option("--tag", help="Tag of the new commit [default: bundle-<first digits of the digest>].")
@click.option("--private", is_flag=True, help="Make the repository private if it has to be created.")
@click.option("--key", type=click.Path(path_type=Path), help="Public key to check the signature with first.")
@click.option("--rehearse", is_flag=True, help="To a hub on this machine, then back and verified.")
@click.option("--hub-dir", type=click.Path(path_type=Path), default=Path("rehearsal/hub"), show_default=True,
              help="Where the rehearsal's hub keeps its state.")  # fmt: skip
@click.option("--download-dir", type=click.Path(path_type=Path), default=Path("rehearsal/download"),
              show_default=True, help="Where the rehearsal puts what it downloads.")  # fmt: skip
@options.as_json
def command(
    bundle: Path,
    target: str,
    tag: str | None,
    private: bool,
    key: Path | None,
    rehearse: bool,
    hub_dir: Path,
    download_dir: Path,
    as_json: bool,
) -> None:
    """Upload BUNDLE to TARGET as one transaction; the same command finishes one that was interrupted.

    The hub's token is the one of `hf auth login` or HF_TOKEN, its address HF_ENDPOINT.
    """
    scheme, address = parse(target)
    wanted = order(scheme, address, bundle, key, tag=tag, private=private)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if rehearse:
        if not target.startswith("hf://"):
            raise UsageProblem("only a publication to hf:// can be rehearsed", "Leave --rehearse out.")
        from packager.publish.rehearsal import rehearse as run

        done: Any = run(
            bundle, address, hub_dir, download_dir, progress, tag=tag, private=private, public_key=key
        )
    else:
        done = scheme.send(wanted, progress)
    document = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(done).items()}
    if as_json:
        click.echo(json.dumps(document))
    else:
        for name, value in document.items():
            click.echo(f"{name:<14} {value}")
