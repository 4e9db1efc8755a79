"""What several verbs print: progress to stderr, and the JSON document of a stage's output to stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from packager.artifact import Manifest


def progress(line: str) -> None:
    """Print a line about work that goes on, to stderr."""
    click.echo(line, err=True)


def print_sealed_json(path: Path, manifest: Manifest, *, source: str) -> None:
    """Print where a sealed artifact lies, of what it was made, its digest and its metrics: one document."""
    document = {"path": str(path), "source": source, "digest": manifest.digest, "metrics": manifest.metrics}
    click.echo(json.dumps(document))
