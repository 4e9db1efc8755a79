"""`packager validate throughput`: one server under load, or several in turn over a whole sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from packager.cli import options, throughput_sweep
from packager.cli.measuring import (
    EXISTING_FILE,
    Server,
    emit,
    print_table,
    read_run,
    server_options,
    write_run,
)
from packager.cli.sweep_files import print_sweep_plots, write_sweep_report
from packager.errors import UsageProblem

_PROMPTS = 64


def _sweep_options(function: Callable[..., None]) -> Callable[..., None]:
    return functools.reduce(lambda f, option: option(f), reversed(throughput_sweep.sweep_options()), function)


@click.command()
@server_options
@click.option(
    "--items",
    "items_path",
    type=EXISTING_FILE,
    help="JSONL whose conversations are the prompts; with --shape the nano's questions if left out.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the model's tokenizer.  [default: that of --serve]",
)
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    help=f"First N items.  [default: {_PROMPTS}; in a sweep all, to make prompts of]",
)
@click.option(
    "--concurrency",
    default="1,8",
    show_default=True,
    callback=options.numbers,
    help="Requests in flight, by commas.",
)
@click.option(
    "--output-tokens",
    default="128",
    show_default=True,
    callback=options.numbers,
    help="Most of an answer; in a sweep several, by commas.",
)
@click.option("--baseline", type=EXISTING_FILE, help="Run of the baseline (its --out) to take the ratio to.")
@click.option(
    "--match", type=EXISTING_FILE, help="Give each answer as many tokens as in this run (its --out)."
)
@click.option("--plot", is_flag=True, help="Draw a sweep in the terminal too.")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for a page with a sweep's tables and pictures, and each picture as SVG.",
)
@_sweep_options
def throughput(
    server: Server,
    items_path: Path | None,
    tokenizer: Path | None,
    prompts: int | None,
    concurrency: list[int],
    output_tokens: list[int],
    baseline: Path | None,
    match: Path | None,
    plot: bool,
    report: Path | None,
    **own: Any,
) -> None:
    """Tokens a second and latencies under load, through `vllm bench serve`.

    With --input-tokens a sweep: candidate with and without its draft, and a --baseline-serve or
    --baseline-url, measured in turn over concurrency x input x output, several times. A cell that is done is
    kept in the cache and never measured again. A server that fails is named, the others go on, and the
    command exits 6 after all is written. vLLM and SGLang servers that run already are measured alike.

    With --shape and --baseline-shape the sweep needs no checkpoints: the engine fills configs with dummy
    weights, and drafts are accepted as often as --synthetic-acceptance says.
    """
    items = _items(items_path, shape=own["shape"] is not None)
    if throughput_sweep.asked_for(own):
        if baseline is not None or match is not None:
            raise UsageProblem(
                "--baseline and --match name runs of single servers",
                "In a sweep the baseline is served: --baseline-serve or --baseline-url.",
            )
        sweep = throughput_sweep.run_sweep(
            server,
            items[:prompts],
            own,
            tokenizer=tokenizer or server.folder,
            concurrency=concurrency,
            output_tokens=output_tokens,
        )
        write_run(sweep, server.out)
        if report is not None:
            write_sweep_report(report, sweep)
        if server.as_json:
            emit(sweep=sweep)
        else:
            throughput_sweep.show(sweep)
            if plot:
                print_sweep_plots(sweep)
        failure = throughput_sweep.failed(sweep)
        if failure is not None:
            raise failure
        return
    if plot or report is not None:
        raise UsageProblem("--plot and --report draw sweeps", "Give --input-tokens too.")
    if len(output_tokens) != 1:
        raise UsageProblem("several output lengths make a sweep", "Give --input-tokens too.")
    folder = tokenizer or server.folder
    if folder is None:
        raise UsageProblem("--url needs --tokenizer", "Give the folder of the model's tokenizer.")
    _single(server, items[: prompts or _PROMPTS], folder, concurrency, output_tokens[0], baseline, match)


def _items(path: Path | None, *, shape: bool) -> list[Any]:
    from validation.tasks import items_from, load_items

    if path is not None:
        return load_items(path)
    if not shape:
        raise click.UsageError("Missing option '--items'.")
    from packager.nano.language import heldout_items

    return items_from(heldout_items(40, 0))


def _single(
    server: Server,
    items: list[Any],
    tokenizer: Path,
    concurrency: list[int],
    output_tokens: int,
    baseline: Path | None,
    match: Path | None,
) -> None:
    from validation.throughput import ThroughputRun, compare_throughput, measure_throughput

    base = read_run(ThroughputRun, baseline) if baseline is not None else None
    run = measure_throughput(
        server.target,
        tokenizer=tokenizer,
        prompts=items,
        concurrency=concurrency,
        output_tokens=output_tokens,
        match=read_run(ThroughputRun, match) if match is not None else None,
    )
    write_run(run, server.out)
    ratios = compare_throughput(base, run) if base is not None else []
    if server.as_json:
        emit(run=run, ratios=ratios)
        return
    by_level = {r.concurrency: f"{r.ratio:.2f}" for r in ratios}
    header = ["concurrency", "tokens/s", "TTFT ms", "TPOT ms", "TPOT p99", "acceptance length", "ratio"]
    rows = [
        [
            c.concurrency,
            f"{c.output_tokens_per_s:.0f}",
            f"{c.ttft_ms.median:.1f}",
            f"{c.tpot_ms.median:.1f}",
            f"{c.tpot_ms.p99:.1f}",
            "–" if c.acceptance is None else f"{c.acceptance.length:.2f}",
            by_level.get(c.concurrency, "–"),
        ]
        for c in run.cells
    ]
    print_table(header, rows)
