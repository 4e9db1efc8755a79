"""`packager validate healthbench`: HealthBench, or rubrics of the user's own, graded by a qualified judge."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.cli.measuring import (
    Server,
    emit,
    print_progress,
    read_run,
    server_options,
    write_run,
)
from packager.cli.validate_benchmark import comparison_options, print_panel
from packager.errors import BadInput, GateFailed, UsageProblem

if TYPE_CHECKING:
    from validation.healthbench import Judge, MetaRows, Qualification, Rubrics

PACKAGED = "package:nano"
"""Instead of a path or a URL: the nano's rubrics, its meta-evaluation, its judge by rule."""


@click.command()
@server_options
@click.option(
    "--rows",
    required=True,
    help=f"JSONL of rubrics, a folder with HealthBench's files, or {PACKAGED}.",
)
@click.option("--subset", type=click.Choice(["main", "hard", "consensus"]), default="main", show_default=True)
@click.option("--rows-digest", help="sha256:… that the rows must have.")
@click.option("--examples", type=click.IntRange(min=1), help="Draw this many conversations.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--judge-url", required=True, help=f"Base URL of the judge, without /v1; {PACKAGED}: the judge by rule."
)
@click.option("--judge-model", default="model", show_default=True)
@click.option(
    "--judge-subject",
    help="What judgements are kept under; without it, model and URL. Name it where the URL changes.",
)
@click.option("--judge-key-env", help="Environment variable that holds the judge's API key.")
@click.option("--judge-concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--judge-timeout", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True
)
@click.option("--meta", help="Meta-evaluation that the judge must pass: a file, or HealthBench's folder.")
@click.option("--min-balanced-f1", type=click.FloatRange(0, 1), default=0.7, show_default=True)
@click.option("--min-category-f1", type=click.FloatRange(0, 1), help="Bound on each criterion's balanced F1.")
@click.option("--second-judge-url", help="Another judge over the same answers: agreement, other score.")
@click.option("--second-judge-model", default="model", show_default=True)
@click.option("--second-judge-subject")
@click.option("--min-score", type=click.FloatRange(0, 1), help="Gate: lowest score, 0 to 1.")
@click.option("--max-new-harm", type=click.IntRange(min=0), help="Gate: harm criteria newly met, at most.")
@comparison_options
def healthbench(server: Server, **own: Any) -> None:
    """Rubric scores by a judge: one call a criterion, HealthBench's grader prompt and arithmetic.

    The judge is first put to --meta; without it, or below --min-balanced-f1, the score does not count and
    gates read "not measured". Exits 4 if the comparison shows a loss beyond the margin, or a gate that was
    named fails or could not be measured.

    A criterion without a readable judgement is "not graded": its conversation is left out of the score, and
    counted.
    """
    from validation.endpoint import Sampling
    from validation.gates import failed
    from validation.healthbench import (
        RubricRun,
        compare_judges,
        compare_rubrics,
        measure_rubrics,
        qualify,
        rubric_gates,
        rubric_panel,
    )

    if own["max_new_harm"] is not None and own["reference"] is None:
        raise UsageProblem("--max-new-harm needs --reference: new against what?")
    before = read_run(RubricRun, own["reference"]) if own["reference"] is not None else None
    cache = server.target.cache
    rubrics, meta = _data(cache, own)

    def qualified(judge: Judge) -> Qualification | None:
        if meta is None:
            return None
        found = qualify(
            judge,
            meta,
            min_balanced_f1=own["min_balanced_f1"],
            min_category_f1=own["min_category_f1"],
            progress=print_progress,
        )
        said = "not defined" if found.overall.balanced_f1 is None else f"{found.overall.balanced_f1:.3f}"
        click.echo(
            f"judge {found.judge.name}: balanced F1 {said}, "
            + ("qualified" if found.qualified else f"not qualified: {'; '.join(found.reasons)}"),
            err=True,
        )
        return found

    def run_by(judge: Judge) -> RubricRun:
        return measure_rubrics(
            server.target,
            judge,
            rubrics,
            qualification=qualified(judge),
            sampling=Sampling(max_tokens=own["max_tokens"], top_logprobs=None),
            concurrency=own["concurrency"],
            progress=print_progress,
        )

    with ExitStack() as stack:
        judge = stack.enter_context(_judge("judge", cache, own))
        other = None
        if own["second_judge_url"] is not None:
            other = stack.enter_context(_judge("second_judge", cache, own))
            if (other.subject, other.model) == (judge.subject, judge.model):
                raise UsageProblem(
                    "the second judge is the first", "Name another, or --second-judge-subject."
                )
        run = run_by(judge)
        write_run(run, server.out)
        swap = compare_judges(run, run_by(other)) if other is not None else None
    comparison = (
        compare_rubrics(before, run, margin_points=own["margin_points"]) if before is not None else None
    )
    gates = rubric_gates(run, comparison, min_score=own["min_score"], max_new_harm=own["max_new_harm"])
    runs = [found for found in (before, run) if found is not None]
    panel = rubric_panel(runs, [comparison] if comparison else [], swap)
    write_run(panel, own["panel_out"])
    if server.as_json:
        emit(run=run, comparison=comparison, swap=swap, gates=list(gates), panel=panel)
    else:
        print_panel(panel)
    missed = [f"{g.name}: {g.measured:.4g}, bound {g.bound:g}" for g in failed(gates)]
    missed += [f"{g.name}: not measured ({g.note})" for g in gates if g.outcome == "not measured"]
    if comparison is not None and comparison.counts and comparison.scores.overall.verdict == "inferior":
        paired = comparison.scores.overall
        missed.append(
            f"{run.label} is inferior to {comparison.reference}: {paired.difference_points:+.1f} points, "
            f"interval {paired.low_points:+.1f} to {paired.high_points:+.1f}"
        )
    if missed:
        raise GateFailed("; ".join(missed), "Read the criteria in the JSON document.")


def _data(cache: Path, own: dict[str, Any]) -> tuple[Rubrics, MetaRows | None]:
    """The rows that are asked, and the meta-evaluation, if there is one."""
    from validation.healthbench import load_meta, load_rubrics

    rows, meta = own["rows"], own["meta"]
    if rows == PACKAGED:
        from packager.nano.rubrics import write_rubrics

        paths = write_rubrics(cache / "nano-rubrics", per_task=20)
        rows, meta = str(paths["rows"]), meta or str(paths["meta"])
    rubrics = load_rubrics(Path(rows), subset=own["subset"], digest=own["rows_digest"])
    return rubrics.sample(own["examples"]), load_meta(Path(meta)) if meta is not None else None


@contextmanager
def _judge(which: str, cache: Path, own: dict[str, Any]) -> Iterator[Judge]:
    """The judge that options starting with `which` name; the one by rule runs until the command ends."""
    from validation.healthbench import Judge

    url, model, subject = (own[f"{which}_{what}"] for what in ("url", "model", "subject"))
    patience = {"concurrency": own["judge_concurrency"], "timeout_s": own["judge_timeout"]}
    if url == PACKAGED:
        from packager.nano.rubric_judge import MODEL, RubricJudge

        with RubricJudge() as served:
            yield Judge(served.url, MODEL, served.subject, cache, name="judge by rule", **patience)
        return
    name = own["judge_key_env"]
    key = os.environ.get(name) if name else None
    if name and not key:
        raise BadInput(f"the environment variable {name} holds no key", "Set it, or correct --judge-key-env.")
    yield Judge(url, model, subject or f"{model} at {url}", cache, api_key=key, **patience)
