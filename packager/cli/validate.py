"""`packager validate`: measure a server that is running, or check a checkpoint, and judge what is found."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from packager.cli.validate_benchmark import benchmark
from packager.cli.validate_claims import claims
from packager.cli.validate_healthbench import healthbench
from packager.cli.validate_medbench import medaibench, medbench
from packager.cli.validate_picture import picture
from packager.cli.validate_predict import predict
from packager.cli.validate_records import Records, print_grid, record_options, write_long_report
from packager.cli.validate_report import ruler_plan, schema
from packager.cli.validate_served import served_options
from packager.cli.validate_structure import structure
from packager.cli.validate_throughput import throughput
from packager.errors import GateFailed


@click.group()
def command() -> None:
    """Measure a served model and judge the figures, or check a checkpoint's structure.

    With --serve a server is started for the measurement and stopped after it; with --url a running
    OpenAI-compatible one is asked. Answers are kept in the cache folder: a command that was killed goes on
    where it stopped, and an item that was answered is never asked again for the same --subject.
    """


for _verb in (
    benchmark,
    claims,
    healthbench,
    medaibench,
    medbench,
    ruler_plan,
    schema,
    structure,
    throughput,
):
    command.add_command(_verb)
for _verb in (picture, predict):
    command.add_command(_verb)


def _reference_options(function: Callable[..., None]) -> Callable[..., None]:
    return functools.reduce(lambda f, option: option(f), reversed(served_options("reference-")), function)


_items = click.option(
    "--items",
    "items_path",
    type=EXISTING_FILE,
    required=True,
    help="JSONL of {id, task, language, messages, answer, meta}.",
)


@command.command()
@server_options
@_items
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@validate_verdict.options
def accuracy(
    server: Server,
    items_path: Path,
    concurrency: int,
    max_tokens: int,
    asked: validate_verdict.Asked,
) -> None:
    """Exact-match accuracy on items with known answers; with --reference, the paired verdict.

    Exits 4 if the rule fails: by default, if a loss beyond the margin is shown. An inconclusive comparison
    says with how many items it would be decided.
    """
    from validation.endpoint import Sampling
    from validation.noise import NoiseFloor, measure_noise
    from validation.tasks import AccuracyRun, load_items, measure_accuracy

    before = read_run(AccuracyRun, asked.reference) if asked.reference is not None else None
    floor = read_run(NoiseFloor, asked.noise) if asked.noise is not None else None
    items = load_items(items_path)
    run = measure_accuracy(
        server.target,
        items,
        concurrency=concurrency,
        sampling=Sampling(max_tokens=max_tokens),
        progress=print_progress,
    )
    write_run(run, server.out)
    noise = None
    if asked.again is not None:
        noise = measure_noise(
            server.target,
            items,
            run,
            margin_points=asked.margin_points,
            first_concurrency=concurrency,
            progress=print_progress,
        )
        write_run(noise, asked.again)
    found = None if before is None else validate_verdict.conclude(asked, before, run, floor)
    if server.as_json:
        emit(
            run=run,
            comparison=found and found.comparison,
            safety=found and found.safety,
            gates=found and [*found.gates],
            noise=noise,
        )
    else:
        header = ["task", "items", "right", "accuracy %", "95 % interval", "commonest answer %"]
        print_table(
            header,
            [
                [
                    s.name,
                    s.n,
                    s.correct,
                    percent(s.accuracy),
                    f"{percent(s.low)} – {percent(s.high)}",
                    percent(s.majority_share),
                ]
                for s in (run.overall, *run.by_task, *run.by_language)
            ],
        )
        if noise is not None:
            validate_verdict.show_noise(noise)
        if found is not None:
            validate_verdict.show(found)
    if found is not None:
        validate_verdict.require(found)


@command.command()
@server_options
@_items
@_reference_options
@click.option("--reference-label", default="reference", show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=100, show_default=True, help="First N items.")
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--top-logprobs",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Tokens listed at each position of the texts that both score; 0: texts are compared alone.",
)
@click.option(
    "--experts",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Texts on which the experts of both checkpoints are compared; both must be given as folders.",
)
@click.option("--max-mean-kl", type=float, help="Alarm above this mean KL divergence, nats a token.")
@click.option("--max-p99-kl", type=float, help="Alarm above this 99th percentile of it.")
def fidelity(
    server: Server,
    items_path: Path,
    reference_label: str,
    prompts: int,
    concurrency: int,
    max_tokens: int,
    top_logprobs: int,
    experts: int,
    max_mean_kl: float | None,
    max_p99_kl: float | None,
    **reference: Any,
) -> None:
    """Two servers compared: greedy answers token for token, and what each thinks of every token of them.

    The reference is asked first, and its server, if it is ours, stopped before the candidate's starts. Its
    answers are kept: once they are in the cache, its server need not run any more. Exits 4 if an alarm of
    the token distributions goes off.
    """
    from packager.cli.validate_fidelity import measure, show
    from validation.fidelity import Bounds
    from validation.tasks import load_items

    original: Path | None = reference["reference_serve"]
    folders = (original, server.folder) if original is not None and server.folder is not None else None
    if experts and (folders is None or not top_logprobs):
        raise click.UsageError("--experts needs --serve, --reference-serve and --top-logprobs")
    named = {"max_mean_kl_nats": max_mean_kl, "max_p99_kl_nats": max_p99_kl}
    found = measure(
        server.target,
        load_items(items_path)[:prompts],
        reference,
        label=reference_label,
        concurrency=concurrency,
        max_tokens=max_tokens,
        top=top_logprobs,
        bounds=Bounds(**{name: bound for name, bound in named.items() if bound is not None}),
        progress=print_progress,
        cache=server.target.cache,
        folders=folders,
        texts=experts,
    )
    write_run(found.fidelity or found.identity, server.out)
    if server.as_json:
        emit(identity=found.identity, fidelity=found.fidelity, experts=found.experts)
    else:
        show(found, print_table, click.echo)
    if found.raised:
        names = "; ".join(gate.name for gate in found.raised)
        raise GateFailed(
            f"{found.identity.candidate} is further from {found.identity.reference} than the bounds allow: "
            f"{names}",
            "See the figures above; `packager verify --against` tells damage from rounding.",
        )


@command.command()
@server_options
@record_options
@click.option("--trained-length", type=click.IntRange(min=1), required=True, help="Tokens before extension.")
@click.option(
    "--before", type=EXISTING_FILE, help="Run before the context patch (its --out) to compare with."
)
@click.option("--concurrency", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--report", type=click.Path(file_okay=False, path_type=Path), help="Folder for a page with the heat map."
)
def context(
    server: Server,
    records: Records,
    trained_length: int,
    before: Path | None,
    concurrency: int,
    max_tokens: int,
    report: Path | None,
) -> None:
    """Retrieval from long records, by length and depth.

    Give --items of your own, or --records with lengths: then a dose, an allergy, a laboratory value or the
    later of two conflicting notes is to be found in synthetic records, English and Chinese, whose length the
    model's own --tokenizer counts.
    """
    from validation.conduct import Stopwatch
    from validation.endpoint import Sampling
    from validation.longcontext import LongRun, compare_long, measure_long

    earlier = read_run(LongRun, before) if before is not None else None
    items = records.items(trained_length)
    watch = Stopwatch()
    with watch.step(f"long records, {server.target.label}", server.target.subject):
        run = measure_long(
            server.target,
            items,
            trained_length=trained_length,
            concurrency=concurrency,
            sampling=Sampling(max_tokens=max_tokens, top_logprobs=None),
            progress=print_progress,
        )
    write_run(run, server.out)
    comparison = compare_long(earlier, run) if earlier is not None else None
    if report is not None:
        write_long_report(report, [run] if earlier is None else [earlier, run], comparison, watch.conduct())
    if server.as_json:
        emit(run=run, comparison=comparison)
        return
    paired = {p.scope: p for p in comparison.by_multiple} if comparison is not None else {}
    rows = []
    for s in run.by_multiple:
        p = paired.get(f"{s.multiple:g}x")
        change = (
            "" if p is None else f"{p.difference_points:+.1f} ({p.low_points:+.1f} to {p.high_points:+.1f})"
        )
        interval = f"{percent(s.low)} – {percent(s.high)}"
        rows.append(
            [f"{s.multiple:g}x", s.context_tokens, s.n, s.refused, percent(s.accuracy), interval, change]
        )
    print_table(
        ["length", "tokens", "records", "refused", "found %", "95 % interval", "change, points"], rows
    )
    print_grid(run)
