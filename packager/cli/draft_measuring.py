"""What `draft evaluate` and `draft breakeven` share: options of a measurement, prompts, the check before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from packager.errors import BadInput

WIDTH = 80
"""Columns of the tables printed."""
DIRECTORY = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def whole_numbers(
    ctx: click.Context,  # noqa: ARG001 - the calling convention of click
    param: click.Parameter,
    value: str | None,
) -> tuple[int, ...]:
    """Whole numbers from 1 on, each once, ascending: of `1,3,5`, or of a range `1-7`."""
    found: set[int] = set()
    try:
        for part in value.split(",") if value else ():
            low, to, high = part.partition("-")
            found.update(range(int(low), int(high if to else low) + 1))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers such as 1,3,5 or 1-7", param=param) from None
    if value and (not found or min(found) < 1):
        raise click.BadParameter(f"{value!r}: give numbers from 1 on", param=param)
    return tuple(sorted(found))


def measuring(*, count: int, repeats: int) -> Decorator:
    """The options of a measurement on a served target, with these defaults: `source`, `count`,
    `concurrency`, `repeats`, `tensor_parallel`."""
    options = (
        click.option(
            "--prompts", "source", type=FILE, help="JSONL of chat messages; without it held-out nano items."
        ),
        click.option(
            "--count", type=click.IntRange(min=1), default=count, show_default=True, help="Prompts."
        ),
        click.option(
            "--concurrency",
            callback=whole_numbers,
            metavar="N,N,…",
            default="1",
            show_default=True,
            help="For instance 1,16.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(min=1),
            default=repeats,
            show_default=True,
            help="Timed passes; the fastest counts.",
        ),
        click.option("--tensor-parallel", type=click.IntRange(min=1), default=1, show_default=True),
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def prompts_of(source: Path | None, count: int) -> list[dict[str, Any]]:
    """The prompts of a file, or held-out items of the nano's language, `count` at most."""
    if source is None:
        from packager.nano import language

        # Tasks in turn, so that a smaller count still has some of each.
        per_task = -(-count // len(language.TASKS))
        items = language.heldout_items(per_task)
        return [items[task * per_task + i] for i in range(per_task) for task in range(len(language.TASKS))][
            :count
        ]
    from packager.draft.prompts import read_prompts_file

    return read_prompts_file(source)[:count]


def require_servable(target: Path) -> None:
    """Raise BadInput if this machine's vLLM has no kernels for the weights of `target`."""
    from packager.serving import fp8_runs_here
    from packager.serving.serve_file import is_fp8

    runs, reason = fp8_runs_here()
    if is_fp8(target) and not runs:
        raise BadInput(
            f"{target} is FP8, and {reason}",
            f"Run `packager dequantize {target} OUT` and give OUT.",
        )
