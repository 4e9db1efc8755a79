"""Options that several verbs have: spelled once, so that they mean the same everywhere."""

from __future__ import annotations

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")

shard_bytes = click.option(
    "--shard-bytes",
    type=click.IntRange(min=1),
    default=5_000_000_000,
    show_default=True,
    help="Largest data section of an output shard.",
)
