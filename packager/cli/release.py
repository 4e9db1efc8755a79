"""`packager release`: a recipe from its source to a rehearsed publication."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packager.errors import UsageProblem

if TYPE_CHECKING:
    from packager.release import DryRun, Outcome


@click.command()
@click.argument("recipe")
@click.option("--workspace", type=click.Path(path_type=Path), help="Folder in which the release grows.")
@click.option("--dry-run", is_flag=True, help="Print what each stage reads, writes and needs; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(recipe: str, workspace: Path | None, dry_run: bool, as_json: bool) -> None:
    """Run RECIPE, a YAML file or the name of a shipped one, stage by stage.

    Finished stages are skipped; killed at any moment, the same command continues.
    """
    from packager.recipe import load_recipe
    from packager.release import plan_release, release, shipped_recipe

    path = shipped_recipe(recipe)
    loaded = load_recipe(path)
    if dry_run:
        planned = plan_release(loaded, path)
        click.echo(planned.to_json() if as_json else _dry_run_text(planned), nl=not as_json)
        return
    if workspace is None:
        raise UsageProblem("a release needs a workspace", "Give --workspace DIR, or --dry-run.")
    began = time.monotonic()

    def say(line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        click.echo(f"[{minutes:2d}:{seconds:02d}] {line}", err=True)

    outcome = release(loaded, workspace, say)
    if as_json:
        click.echo(json.dumps(outcome.document(), indent=2, ensure_ascii=False))
    else:
        _print_outcome(outcome)
