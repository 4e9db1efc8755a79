"""What several verbs print: progress to stderr, and the JSON document of a stage's output to stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from packager.artifact import Manifest
    from packager.draft.train import Progress


def progress(line: str) -> None:
    """Print a line about work that goes on, to stderr."""
    click.echo(line, err=True)


@contextmanager
def training_bar(
    steps: int, *, live: bool
) -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None] | None]]:
    """What takes lines and steps of a training run: a bar on a terminal if `live`, plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not live or not console.is_terminal:
        yield progress, None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=steps)

        def on_step(now: Progress) -> None:
            what = f"loss {now.loss:.3f}  acceptance length {now.accepted.length:.2f}"
            bar.update(task, completed=now.done, description=what)

        yield lambda line: bar.console.print(line, markup=False, highlight=False), on_step


def print_sealed_json(path: Path, manifest: Manifest, *, source: str) -> None:
    """Print where a sealed artifact lies, of what it was made, its digest and its metrics: one document."""
    document = {"path": str(path), "source": source, "digest": manifest.digest, "metrics": manifest.metrics}
    click.echo(json.dumps(document))
