"""`packager draft evaluate`: what a draft is worth on its target."""

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
from packager.errors import BadInput, RemoteFailure, UsageProblem

if TYPE_CHECKING:
    from packager.release.draft_evaluation import DraftEvaluation

_LISTED = 5


def _long_prompts(source: Path | None, contexts: tuple[int, ...], count: int) -> list[dict[str, Any]]:
    """Records that fill each of `contexts` tokens; with a file of prompts, its own lengths have to do."""
    if source is not None or not contexts:
        return []
    from packager.nano import language
    from packager.nano.architecture import TRAINED_LENGTH

    if odd := [length for length in contexts if length % TRAINED_LENGTH]:
        raise UsageProblem(
            f"--context {odd[0]}: records are made for multiples of {TRAINED_LENGTH} tokens",
            "Choose such lengths, or give prompts of your own with --prompts.",
        )
    return [row for length in contexts for row in language.long_items(length // TRAINED_LENGTH, count)]


@click.command("evaluate")
@click.argument("target", type=DIRECTORY)
@click.argument("draft", type=DIRECTORY)
@click.option("--import", "imported", is_flag=True, help="Somebody else's DRAFT, in any form engines know.")
@measuring(count=60, repeats=1)
@click.option(
    "--tokens",
    callback=whole_numbers,
    metavar="N,N,…",
    default="3",
    show_default=True,
    help="Draft tokens a step: 1,3,5 or 1-7.",
)
@click.option(
    "--context",
    "contexts",
    callback=whole_numbers,
    metavar="N,N,…",
    help="Also by prompt length, up to each of these tokens.",
)
@click.option("--context-count", type=click.IntRange(min=1), default=12, show_default=True)
@click.option("--max-response-tokens", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--check-only", is_flag=True, help="Check the files; serve nothing.")
@click.option(
    "--out",
    type=FILE,
    help="Also write the evaluation, with the digests of what was measured, for `draft compare` and reports.",
)
@options.as_json
def evaluate_command(
    target: Path,
    draft: Path,
    imported: bool,
    source: Path | None,
    count: int,
    tokens: tuple[int, ...],
    concurrency: tuple[int, ...],
    contexts: tuple[int, ...],
    context_count: int,
    max_response_tokens: int,
    repeats: int,
    tensor_parallel: int,
    check_only: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Check DRAFT and measure on TARGET, served by vLLM, what it is worth.

    One server without a draft and one for each --tokens: acceptance by task and language, whether greedy
    output stays the same, speed against no draft at each --concurrency, where speculation stops to pay, and
    the settings to serve with.
    """
    from packager.artifact import is_sealed, read_manifest
    from packager.draft.imported import look_at
    from packager.release.draft_evaluation import Plan, evaluate_draft
    from packager.release.draft_record import KIND, SCHEMA_VERSION, measured, record_of, write_record
    from packager.serving import ServeSpec

    found = look_at(draft, target)
    for problem in found.problems:
        progress(f"problem: {problem}")
    names = {"target": target.resolve().name, "draft": draft.resolve().name}
    if check_only:
        document: dict[str, Any] = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            **names,
            "form": found.form,
            "problems": found.problems,
            "cannot_be_measured": found.obstacles,
        }
        text = f"{len(found.problems)} problems in {draft} ({found.form})"
        click.echo(json.dumps(document, ensure_ascii=False) if as_json else text)
        if found.problems:
            sys.exit(BadInput.exit_code)
        return
    if found.obstacles:
        raise BadInput(
            f"{draft} cannot be measured:\n" + "\n".join(f"  {one}" for one in found.obstacles),
            "Convert it, or ask its publisher; --check-only lists all problems.",
        )
    require_servable(target)
    plan = Plan(
        ServeSpec(target, tensor_parallel=tensor_parallel),
        draft,
        prompts_of(source, count),
        tokens,
        concurrency,
        max_response_tokens,
        repeats,
        contexts,
        _long_prompts(source, contexts, context_count),
    )
    if out is not None and not out.parent.is_dir():
        raise BadInput(f"{out.parent} is not a folder, so {out.name} cannot be written there")
    bound = measured(target, draft, plan.prompts, plan.long_prompts)
    metrics = {} if imported or not is_sealed(draft) else read_manifest(draft).metrics
    try:
        result = evaluate_draft(plan, metrics, progress)
    except RemoteFailure as err:
        if not found.problems:
            raise
        listed = "\n".join(f"  {one}" for one in found.problems)
        raise RemoteFailure(
            f"the engine failed with a draft that has problems:\n{listed}\n{err.message}", err.remedy
        ) from err
    record = record_of(result, bound, found, **names)
    if out is not None:
        write_record(out, record)
    if as_json:
        click.echo(json.dumps(record.model_dump(mode="json"), ensure_ascii=False))
    else:
        _print_evaluation(result, found.problems)


def _print_evaluation(result: DraftEvaluation, problems: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=WIDTH, highlight=False, markup=False)
    plan = result.plan
    fastest = f", fastest of {plan.repeats} passes" if plan.repeats > 1 else ""
    click.echo(f"{len(plan.prompts)} prompts, answers up to {plan.max_tokens} tokens{fastest}")

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("K", "at once", "tokens/s", "speed", "length"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("accepted by position", no_wrap=True)
    table.add_column("same", justify="right", no_wrap=True)
    for level, cell in result.without.cells.items():
        table.add_row("–", str(level), f"{cell.tokens_per_s:.0f}", "1.00x", "", "", "")
    for run in result.runs:
        for level, cell in run.cells.items():
            accepted, same = cell.acceptance, cell.identity
            table.add_row(
                str(run.tokens),
                str(level),
                f"{cell.tokens_per_s:.0f}",
                f"{result.speedups[run.tokens][level]:.2f}x",
                f"{accepted.length:.2f}" if accepted else "",
                _rates(accepted.per_position) if accepted else "",
                f"{same.identical}/{same.of}" if same else "",
            )
    console.print(table)

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("acceptance length", no_wrap=True)
    for run in result.runs:
        table.add_column(f"K={run.tokens}", justify="right", no_wrap=True)
    groups = [run.groups for run in result.runs if run.groups]
    for kind in ("by_task", "by_language"):
        for name in getattr(groups[0], kind):
            reports = [getattr(group, kind).get(name) for group in groups]
            table.add_row(name, *(f"{one.length:.2f}" if one else "–" for one in reports))
    for length in result.without.contexts:
        said = []
        for run in result.runs:
            long, ratio = run.contexts.get(length), result.context_speedups[run.tokens].get(length)
            if long is None or long.acceptance is None or ratio is None:
                said.append("–")
            else:
                said.append(f"{long.acceptance.length:.2f} ({ratio:.2f}x)")
        table.add_row(f"prompts up to {length} tokens (speed)", *said)
    console.print(table)

    _print_findings(result, problems)


def _print_findings(result: DraftEvaluation, problems: list[str]) -> None:
    import yaml

    click.echo("break-even concurrency")
    for tokens, crossing in result.break_even.items():
        click.echo(f"  K={tokens}: {crossing.text}")
    best = ", ".join(
        f"{level}: " + (f"K={tokens} ({ratio:.2f}x)" if tokens else "no draft")
        for level, (tokens, ratio) in result.best.items()
    )
    click.echo(f"best by concurrency  {best}")
    for tokens, agreed in result.predictions.items():
        verdict = "ALARM, over 5 %" if agreed.alarm else "they agree"
        click.echo(
            f"predicted length     K={tokens}: {agreed.predicted:.2f} against {agreed.served:.2f} served "
            f"({agreed.difference:+.1%}): {verdict}"
        )
    low, high = result.plan.concurrency[0], result.plan.concurrency[-1]
    if low != high:
        noise = result.batch_noise
        click.echo(
            f"without a draft      {noise.identical} of {noise.of} answers are the same at concurrency {low} "
            f"and {high}"
        )
    told = [
        (run.tokens, level, one)
        for run in result.runs
        for level, cell in run.cells.items()
        for one in (cell.identity.differences if cell.identity else ())
    ]
    if told:
        ties = sum(one.near_tie for *_, one in told)
        click.echo(f"answers that differ  {len(told)}, {ties} of them from a near tie of the target on:")
    for tokens, level, one in told[:_LISTED]:
        gap = f"{one.gap_nats:.3f} nats apart" if one.gap_nats is not None else "no near alternative"
        click.echo(f"  K={tokens}, {level} at once, {one.id}: token {one.position}, {gap}")
    if len(told) > _LISTED:
        click.echo(f"  … and {len(told) - _LISTED} more")
    if problems:
        click.echo(f"problems of the files: {len(problems)}, listed above")
    click.echo("settings to serve with (`serve` in a recipe, a profile in serve.yaml)")
    for line in yaml.safe_dump(result.serve_settings(), sort_keys=False).splitlines():
        click.echo(f"  {line}")


def _rates(rates: tuple[float, ...]) -> str:
    return " ".join(f"{rate:.2f}".removeprefix("0") for rate in rates)
