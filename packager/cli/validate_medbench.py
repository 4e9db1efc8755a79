"""`packager validate medbench` and `medaibench`: benchmarks whose ground truth is not public."""

from __future__ import annotations

from pathlib import Path

import click

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
from packager.cli.validate_benchmark import comparison_options, conclude, print_panel
from packager.errors import BadInput, GateFailed


@click.command()
@server_options
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="MedBench's folder: <task>.jsonl or <task>/*.jsonl.",
)
@click.option(
    "--upload", type=click.Path(dir_okay=False, path_type=Path), help="Pack the answers here (zip)."
)
@click.option("--accept-faults", is_flag=True, help="Pack although answers are missing or no letters.")
@click.option(
    "--dimensions",
    type=EXISTING_FILE,
    help="JSON object of task to dimension, for tasks that are not assigned.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@comparison_options
def medbench(
    server: Server,
    data: Path,
    upload: Path | None,
    accept_faults: bool,
    dimensions: Path | None,
    max_tokens: int,
    concurrency: int,
    reference: Path | None,
    margin_points: float,
    max_safety_flips: int | None,
    panel_out: Path | None,
) -> None:
    """Answer MedBench's files, check the answers, pack the upload; score what has labels, by dimension.

    Exits 3 if the answers cannot be packed, 4 if a loss beyond the margin is shown on the labelled items.
    """
    from validation.endpoint import Sampling
    from validation.medbench import (
        MedBenchRun,
        compare_medbench,
        measure_medbench,
        medbench_panel,
        pack,
        read_folder,
    )

    before = read_run(MedBenchRun, reference) if reference is not None else None
    files = read_folder(data, _mapping(dimensions) if dimensions is not None else None)
    run = measure_medbench(
        server.target,
        files,
        sampling=Sampling(max_tokens=max_tokens, top_logprobs=None),
        concurrency=concurrency,
        progress=print_progress,
    )
    write_run(run, server.out)
    comparison = compare_medbench(before, run, margin_points=margin_points) if before is not None else None
    panel = medbench_panel(run, comparison)
    write_run(panel, panel_out)
    if server.as_json:
        emit(run=run, comparison=comparison)
    else:
        print_panel(panel)
        for fault in run.faults[:20]:
            click.echo(f"  {fault}")
    if upload is not None:
        click.echo(f"packed {pack(files, run.answers, upload, faulty=accept_faults)}", err=True)
    if before is not None and comparison is not None and comparison.choices is not None:
        conclude(comparison.choices, before.choices, run.choices, max_safety_flips, as_json=server.as_json)
    if comparison is not None and comparison.inferior:
        raise GateFailed(
            f"{comparison.candidate} is inferior to {comparison.reference} on MedBench's labelled items, "
            f"margin {margin_points:g} points",
            "Read the flips in the JSON document (--json).",
        )


def _print_template(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from validation.medaibench import template

        click.echo(template(), nl=False)
        context.exit()


@click.command()
@click.option(
    "--template",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_template,
    help="Print a form to fill in, and end.",
)
@server_options
@click.option("--items", type=EXISTING_FILE, required=True, help="The form filled in (JSONL).")
@click.option("--max-tokens", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@comparison_options
def medaibench(
    server: Server,
    items: Path,
    max_tokens: int,
    concurrency: int,
    reference: Path | None,
    margin_points: float,
    max_safety_flips: int | None,
    panel_out: Path | None,
) -> None:
    """Labelled items of your own under MedAIBench's dimensions: its data is not public.

    --template prints a JSONL form, a row for each dimension. Exits 4 if a loss beyond the margin is shown.
    """
    from validation.endpoint import Sampling
    from validation.medaibench import MedAIBenchRun, load_form, measure_form, medaibench_panel
    from validation.tasks import compare_accuracy

    before = read_run(MedAIBenchRun, reference) if reference is not None else None
    run = measure_form(
        server.target,
        load_form(items),
        sampling=Sampling(max_tokens=max_tokens, top_logprobs=None),
        concurrency=concurrency,
        progress=print_progress,
    )
    write_run(run, server.out)
    comparison = (
        compare_accuracy(before.run, run.run, margin_points=margin_points) if before is not None else None
    )
    write_run(medaibench_panel(run, comparison), panel_out)
    if server.as_json:
        emit(run=run, comparison=comparison)
    else:
        print_table(
            ["dimension", "items", "right", "accuracy %", "95 % interval"],
            [
                [s.name, s.n, s.correct, percent(s.accuracy), f"{percent(s.low)} – {percent(s.high)}"]
                for s in (run.run.overall, *run.by_dimension)
            ],
        )
    if before is not None and comparison is not None:
        conclude(comparison, before.run, run.run, max_safety_flips, as_json=server.as_json)


def _mapping(path: Path) -> dict[str, str]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise BadInput(f"cannot read {path}: {err}", 'Give {"task": "dimension"}.') from None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise BadInput(f"{path} is not a JSON object of texts", 'Give {"task": "dimension"}.')
    return found
