"""`packager publish`: a bundle to a hub or a directory, or a rehearsal of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from packager.cli import options
from packager.cli.output import progress
from packager.errors import UsageProblem


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("target", metavar="hf://ORG/NAME|dir:PATH")
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
    scheme, rest = _parse(target)
    if scheme == "dir":
        if rehearse:
            raise UsageProblem("a copy to a directory needs no rehearsal", "Leave --rehearse out.")
        from packager.publish.directory import copy_bundle

        done: Any = copy_bundle(bundle, Path(rest), public_key=key, progress=progress)
    elif rehearse:
        from packager.publish.rehearsal import rehearse as run

        done = run(bundle, rest, hub_dir, download_dir, progress, tag=tag, private=private, public_key=key)
    else:
        done = _publish(bundle, rest, tag, private, key, progress)
    document = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(done).items()}
    if as_json:
        click.echo(json.dumps(document))
    else:
        for name, value in document.items():
            click.echo(f"{name:<14} {value}")


def _parse(target: str) -> tuple[str, str]:
    """Scheme and rest of a target. Raises UsageProblem for what cannot be published to."""
    if target.startswith("dir:") and target != "dir:":
        return "dir", target.removeprefix("dir:")
    if target.startswith("hf://"):
        from packager.publish.hub import check_repo_id

        return "hf", check_repo_id(target.removeprefix("hf://"))
    if target.startswith(("ms://", "oci://")):
        raise UsageProblem(
            f"publishing to {target.split(':')[0]}:// is not supported yet", "Use hf://org/name or dir:PATH."
        )
    raise UsageProblem(f"{target} is no target", "Use hf://org/name or dir:PATH.")


def _publish(
    bundle: Path,
    repo_id: str,
    tag: str | None,
    private: bool,
    key: Path | None,
    progress: Callable[[str], None],
) -> Any:
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from packager.publish.hub import publish

    return publish(bundle, repo_id, tag=tag, private=private, public_key=key, progress=progress)
