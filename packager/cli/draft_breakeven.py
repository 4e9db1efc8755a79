"""`packager draft breakeven`: what a draft would have to be worth, before one is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.cli import options
from packager.cli.draft_measuring import (
    DIRECTORY,
    FILE,
    WIDTH,
    measuring,
    prompts_of,
    require_servable,
    whole_numbers,
)
from packager.cli.output import progress
from packager.errors import UsageProblem
from packager.recipe import DraftSpec, load_recipe

if TYPE_CHECKING:
    from packager.release.draft_breakeven import Breakeven


@click.command("breakeven")
@click.argument("target", type=DIRECTORY)
@click.option("--recipe", type=FILE, help="Take the draft's shape from a release recipe.")
@click.option("--vocab-size", type=click.IntRange(min=1), help="Draft vocabulary.")
@click.option(
    "--aux-layers", callback=whole_numbers, metavar="N,N,…", help="Layers whose inputs feed the draft."
)
@click.option("--intermediate-size", type=click.IntRange(min=1))
@measuring(count=12, repeats=2)
@click.option("--tokens", type=click.IntRange(min=1), default=3, show_default=True, help="Draft tokens (K).")
@click.option("--output-tokens", type=click.IntRange(min=2), default=96, show_default=True)
@options.as_json
def breakeven_command(
    target: Path,
    recipe: Path | None,
    vocab_size: int | None,
    aux_layers: tuple[int, ...],
    intermediate_size: int | None,
    source: Path | None,
    count: int,
    tokens: int,
    concurrency: tuple[int, ...],
    output_tokens: int,
    repeats: int,
    tensor_parallel: int,
    as_json: bool,
) -> None:
    """The acceptance length at which a draft for TARGET would pay, before one is trained.

    Serves TARGET with an untrained draft of the right shape whose tokens vLLM accepts at random.
    """
    from packager.release.draft_breakeven import measure_breakeven
    from packager.serving import ServeSpec

    given: dict[str, Any] = load_recipe(recipe).draft.model_dump() if recipe else {"prompts": 1, "steps": 1}
    for key, value in (
        ("vocab_size", vocab_size),
        ("aux_layers", aux_layers or None),
        ("intermediate_size", intermediate_size),
    ):
        if value is not None:
            given[key] = value
    if missing := [key for key in ("vocab_size", "aux_layers") if key not in given]:
        raise UsageProblem(
            f"--{missing[0].replace('_', '-')} is missing", "Give it, or a recipe that has it with --recipe."
        )
    require_servable(target)
    serve = ServeSpec(target, tensor_parallel=tensor_parallel)
    found = measure_breakeven(
        serve,
        DraftSpec(**given),
        prompts_of(source, count),
        tokens=tokens,
        concurrency=concurrency,
        output_tokens=output_tokens,
        repeats=repeats,
        say=progress,
    )
    if as_json:
        document = {"kind": "draft breakeven", "schema_version": 1, "target": str(target), **found.as_dict()}
        click.echo(json.dumps(document, ensure_ascii=False))
    else:
        _print_breakeven(found)


def _print_breakeven(found: Breakeven) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from packager.release.draft_breakeven import SPEEDUPS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("at once", "tokens/s without", *(f"{ratio:g}x needs" for ratio in SPEEDUPS), "line within"):
        table.add_column(title, justify="right", no_wrap=True)
    for concurrency, level in found.levels.items():
        table.add_row(
            str(concurrency),
            f"{level.without:.0f}",
            *(_needed(level.length_for(ratio), found.tokens) for ratio in SPEEDUPS),
            f"{level.line.worst_residual:.1%}",
        )
    click.echo(f"acceptance length needed with {found.tokens} draft tokens")
    Console(file=sys.stdout, width=WIDTH, highlight=False, markup=False).print(table)


def _needed(length: float | None, tokens: int) -> str:
    if length is None or length > tokens + 1:
        return "out of reach"
    return "any" if length <= 1 else f"{length:.2f}"
