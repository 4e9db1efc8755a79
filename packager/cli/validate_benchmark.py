"""`packager validate benchmark`: public benchmarks by the names lm-eval gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.cli import validate_verdict
from packager.cli.measuring import (
    EXISTING_FILE,
    Server,
    emit,
    percent,
    print_progress,
    print_table,
    read_run,
    server_options,
    write_run,
)

if TYPE_CHECKING:
    from validation.panel import Panel
    from validation.tasks import AccuracyComparison, AccuracyRun

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def comparison_options(function: Callable[..., None]) -> Callable[..., None]:
    """`--reference`, `--margin-points`, `--max-safety-flips` and `--panel`."""
    declared = [
        click.option(
            "--reference", type=EXISTING_FILE, help="Run of the original (its --out) to compare with."
        ),
        click.option(
            "--margin-points",
            type=click.FloatRange(min=0, min_open=True),
            default=2.0,
            show_default=True,
            help="Loss in percentage points that still counts as non-inferior.",
        ),
        click.option(
            "--max-safety-flips",
            type=click.IntRange(min=0),
            help="Safety items that may turn from right to wrong.  [default: reported only]",
        ),
        click.option(
            "--panel",
            "panel_out",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Write the panel for a report as JSON.",
        ),
    ]
    return functools.reduce(lambda f, option: option(f), reversed(declared), function)


def _digests(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for value in values:
        task, _, digest = value.partition("=")
        if not task or not digest.startswith("sha256:"):
            raise click.UsageError(f"--expect takes TASK=sha256:…, got {value!r}")
        found[task] = digest
    return found


@click.command()
@server_options
@click.option(
    "--tasks",
    required=True,
    help="Names, groups or patterns by commas, such as multimedqa,cmmlu_anatomy,careqa_en,gsm8k.",
)
@click.option(
    "--style",
    type=click.Choice(["likelihood", "reasoning"]),
    default="likelihood",
    show_default=True,
    help="reasoning: multiple choices are asked in chat and thought through, ended with 'Answer: X'.",
)
@click.option("--data", type=_FOLDER, help="Folder with data sets as <organisation>/<name>, before the hub.")
@click.option("--include", type=_FOLDER, help="Folder with task definitions (YAML) of your own.")
@click.option("--limit", type=click.IntRange(min=1), help="First N items of each task.")
@click.option("--fewshot", type=click.IntRange(min=0), help="Examples in the prompt.  [default: the task's]")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Of an answer.  [default: the task's; 4096 with reasoning]",
)
@click.option("--plain", is_flag=True, help="Generate after plain text instead of in chat: code completion.")
@click.option(
    "--allow-code-execution",
    is_flag=True,
    help="Let tasks such as humaneval run code that the model wrote, on this machine. Use a container.",
)
@click.option(
    "--expect",
    multiple=True,
    callback=_digests,
    metavar="TASK=DIGEST",
    help="Refuse other data than an earlier run's (its items_digest); may be repeated.",
)
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@comparison_options
def benchmark(
    server: Server,
    tasks: str,
    style: Any,
    data: Path | None,
    include: Path | None,
    limit: int | None,
    fewshot: int | None,
    max_tokens: int | None,
    plain: bool,
    allow_code_execution: bool,
    expect: dict[str, str],
    concurrency: int,
    reference: Path | None,
    margin_points: float,
    max_safety_flips: int | None,
    panel_out: Path | None,
) -> None:
    """Public benchmarks through lm-eval's task definitions, every item kept; with --reference, compared.

    Multiple choices need a server that gives log-probabilities of the prompt (vLLM does). Data comes from
    --data or the hub; what is missing is said with the command that gets it. Exits 4 if a loss beyond the
    margin is shown.
    """
    from validation.public_benchmarks import (
        BenchmarkRun,
        benchmarks_panel,
        compare_benchmarks,
        measure_benchmarks,
    )

    before = read_run(BenchmarkRun, reference) if reference is not None else None
    run = measure_benchmarks(
        server.target,
        [name.strip() for name in tasks.split(",") if name.strip()],
        style=style,
        data=data,
        include=include,
        limit=limit,
        fewshot=fewshot,
        max_tokens=max_tokens,
        chat=not plain,
        unsafe_code=allow_code_execution,
        expected=expect,
        concurrency=concurrency,
        progress=print_progress,
    )
    write_run(run, server.out)
    comparison = compare_benchmarks(before, run, margin_points=margin_points) if before is not None else None
    write_run(benchmarks_panel(run, comparison), panel_out)
    if server.as_json:
        emit(run=run, comparison=comparison)
    else:
        if run.items is not None:
            shares = (run.items.overall, *run.items.by_task)
            print_table(
                ["task", "items", "right", "accuracy %", "95 % interval"],
                [
                    [s.name, s.n, s.correct, percent(s.accuracy), f"{percent(s.low)} – {percent(s.high)}"]
                    for s in shares
                ],
            )
        if run.scores:
            print_table(
                ["task", "metric", "filter", "value"],
                [[s.task, s.metric, s.filter, f"{s.value:.4f}"] for s in run.scores],
            )
    if before is not None and comparison is not None:
        conclude(comparison, before.items, run.items, max_safety_flips, as_json=server.as_json)


def conclude(
    comparison: AccuracyComparison,
    before: AccuracyRun | None,
    run: AccuracyRun | None,
    max_safety_flips: int | None,
    *,
    as_json: bool,
) -> None:
    """Print a comparison's verdicts and what became of safety items.

    Raises:
        GateFailed: a loss beyond the margin is shown, or too many safety items turned wrong.
    """
    from validation.safety import check_safety, safety_gate
    from validation.verdict import verdict_gates

    assert before is not None and run is not None, "a comparison is of two runs"
    safety = check_safety(before, run, margin_points=comparison.overall.margin_points)
    gates = verdict_gates("not inferior", comparison)
    found = validate_verdict.Found(
        comparison, safety, (*gates, safety_gate(safety, max_safety_flips, run.label))
    )
    if not as_json:
        validate_verdict.show(found)
    validate_verdict.require(found)


def print_panel(panel: Panel) -> None:
    """A panel's summary and tables, numbers at the places that their columns say."""
    click.echo(panel.summary)
    for table in panel.tables:
        click.echo(f"\n{table.caption}")
        print_table(
            [f"{c.name} {c.unit}".strip() for c in table.columns],
            [
                [
                    "–" if cell is None else f"{cell:.{c.digits}f}" if c.digits is not None else cell
                    for cell, c in zip(row, table.columns, strict=True)
                ]
                for row in table.rows
            ],
        )
