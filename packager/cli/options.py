"""Options that several verbs have: spelled once, so that they mean the same everywhere."""

from __future__ import annotations

import click


def numbers(_context: click.Context, option: click.Parameter, value: str | None) -> list[int] | None:
    """Callback: numbers of 1 or more, by commas; None stays None."""
    if value is None:
        return None
    try:
        found = [int(number) for number in value.split(",")]
        if min(found) < 1:
            raise ValueError
    except ValueError:
        raise click.UsageError(
            f"{option.opts[0]} takes numbers of 1 or more, such as 1,8; got {value!r}"
        ) from None
    return found


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")

shard_bytes = click.option(
    "--shard-bytes",
    type=click.IntRange(min=1),
    default=5_000_000_000,
    show_default=True,
    help="Largest data section of an output shard.",
)
