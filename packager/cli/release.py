"""`packager release`: a recipe from its source to a rehearsed publication."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packager.cli import options
from packager.cli.executor import executor_options
from packager.errors import UsageProblem

if TYPE_CHECKING:
    from packager.quantize.convert import Executor
    from packager.recipe import Recipe
    from packager.release import DryRun, Outcome

WIDTH = 80


@click.command()
@click.argument("recipe")
@click.option("--workspace", type=click.Path(path_type=Path), help="Folder in which the release grows.")
@click.option("--signing-key", type=click.Path(path_type=Path), help="Private key; else the workspace's own.")
@executor_options
@click.option("--junit", type=click.Path(path_type=Path), help="Write stages and gates here as JUnit XML.")
@click.option(
    "--summary", type=click.Path(path_type=Path), help="Append a summary here ($GITHUB_STEP_SUMMARY)."
)
@click.option("--dry-run", is_flag=True, help="Print what each stage reads, writes and needs; run nothing.")
@options.as_json
def command(
    recipe: str,
    workspace: Path | None,
    signing_key: Path | None,
    executor: Executor,
    ray_address: str | None,
    junit: Path | None,
    summary: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run RECIPE, a YAML file or the name of a shipped one, stage by stage.

    Finished stages are skipped; killed at any moment, the same command continues. The last stage rehearses
    the publication on a loopback hub; `packager publish` does the real one.

    The recipe says what is released; --executor says where its weights are converted, which leaves no trace
    in the output. --junit and --summary are written whether it ends well or not.
    """
    from packager.recipe import load_recipe
    from packager.release import plan_release, release, shipped_recipe

    path = shipped_recipe(recipe)
    loaded = load_recipe(path)
    if dry_run:
        planned = plan_release(loaded, path)
        if as_json:
            click.echo(json.dumps(planned.document(), indent=2, ensure_ascii=False))
        else:
            _print_plan(planned)
        return
    if workspace is None:
        raise UsageProblem("a release needs a workspace", "Give --workspace DIR, or --dry-run.")
    began = time.monotonic()

    def say(line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - began), 60)
        click.echo(f"[{minutes:2d}:{seconds:02d}] {line}", err=True)

    failure: BaseException | None = None
    try:
        outcome = release(
            loaded, workspace, say, signing_key=signing_key, executor=executor, ray_address=ray_address
        )
    except BaseException as err:
        failure = err
        raise
    finally:
        _for_ci(loaded, workspace, junit, summary, failure)
    if as_json:
        click.echo(json.dumps(outcome.document(), indent=2, ensure_ascii=False))
    else:
        _print_outcome(outcome)


def _for_ci(
    recipe: Recipe, root: Path, junit: Path | None, summary: Path | None, failure: BaseException | None
) -> None:
    from packager.release.for_ci import append_summary, write_junit
    from packager.release.workspace import Workspace

    workspace = Workspace(root)
    if junit is not None:
        write_junit(junit, recipe, workspace, failure)
    if summary is not None:
        append_summary(summary, recipe, workspace, failure)


def _print_outcome(outcome: Outcome) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from packager.release.figures import stage_figures

    if outcome.nothing_to_do:
        click.echo(
            f"Nothing to do: every stage of {outcome.recipe.name} is done in {outcome.workspace.root}."
        )
    table = Table(title=outcome.recipe.name, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("figures")
    for stage in outcome.stages:
        figures = [f"{name}: {value}" for name, value in stage_figures(stage).items()]
        table.add_row(stage.name, _seconds(stage.seconds), "\n".join(figures))
    Console(file=sys.stdout, width=WIDTH, highlight=False).print(table)
    if outcome.weights_served == "dequantized":
        weights = outcome.recipe.quantize.weights
        note = f"{weights} weights were served dequantized; the evidence says so. {outcome.why_dequantized}"
        click.echo(_field("note", note))
    answer, speed = outcome.answer, outcome.metrics("validate")
    rates, concurrency = speed["tokens_per_s"], speed["concurrency"]
    ratio = rates["with_draft"] / rates["without_draft"]
    verdict = "right" if answer.right else f"wrong, expected {answer.expected}"
    click.echo(_field("question", answer.question))
    click.echo(_field("answer", answer.answer))
    click.echo(_field("", f"({verdict}; from the bundle as downloaded)"))
    click.echo(
        _field(
            "speed",
            f"{rates['with_draft']:.0f} tokens/s with the draft, {rates['without_draft']:.0f} without: "
            f"{ratio:.2f}x at concurrency {concurrency}",
        )
    )
    click.echo(_field("report", str(outcome.workspace.evidence / "report.html")))
    click.echo(_field("bundle", f"{outcome.workspace.bundle} (as downloaded: {outcome.workspace.published})"))


def _print_plan(plan: DryRun) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    sizes = plan.sizes
    click.echo(f"Dry run of {plan.recipe}: {plan.source}, for {plan.hardware}")
    click.echo(
        f"{sizes.parameters:,} parameters, {sizes.active_parameters:,} active for a token; "
        f"{_bytes(sizes.source)} BF16 to {_bytes(sizes.fp8)} {plan.weights}, draft {_bytes(sizes.draft)},\n"
        f"KV cache {sizes.kv_token / 1024:.0f} KiB a token"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("stage", "reads", "writes", "memory", "cards"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    table.add_column("needs (! not here)", no_wrap=True)
    for stage in plan.stages:
        needs = [f"! {need}" if need in stage.missing else need for need in stage.needs]
        table.add_row(
            stage.name,
            _bytes(stage.reads),
            _bytes(stage.writes),
            _bytes(stage.memory),
            _bytes(stage.cards),
            "\n".join(needs) or "nothing more",
        )
    Console(file=sys.stdout, width=WIDTH, highlight=False).print(table)
    click.echo(
        f"peak disk: {_bytes(plan.peak_disk)} (source, states and the rehearsal's two copies included)"
    )
    click.echo("gates:")
    for name, bound in plan.gates:
        click.echo(f"  {name}: {bound}" if isinstance(bound, str) else f"  {name}: {bound:g}")
    if plan.missing:
        click.echo("missing here:")
        for line in plan.missing:
            click.echo(textwrap.fill(line, WIDTH, initial_indent="  - ", subsequent_indent="    "))
    else:
        click.echo("nothing is missing: this machine can run it")


def _field(name: str, text: str) -> str:
    """`name` in a column of ten, `text` beside it, wrapped; its own line breaks are kept."""
    lines: list[str] = []
    for paragraph in text.strip().splitlines() or [""]:
        lines += textwrap.wrap(paragraph, WIDTH - 10, break_on_hyphens=False, break_long_words=False) or [""]
    return "\n".join(f"{name if at == 0 else '':<10}{line}" for at, line in enumerate(lines))


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _bytes(count: int) -> str:
    if count == 0:
        return "-"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
