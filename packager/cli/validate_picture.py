"""`packager validate picture`: a sweep drawn, in the terminal and as a page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from packager.cli import options
from packager.cli.measuring import EXISTING_FILE
from packager.cli.sweep_files import print_sweep_plots, read_sweep, sweep_options, write_sweep_report


@click.command()
@click.argument("sweep", type=EXISTING_FILE)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for a page with the pictures, and each of them as SVG.",
)
@sweep_options
@options.as_json
def picture(sweep: Path, report: Path | None, on: str | None, models: tuple[str, ...], as_json: bool) -> None:
    """Throughput over interactivity, ratios over concurrency, and context against speed.

    SWEEP is what `validate throughput --out` wrote. Rooflines are drawn where it says what it ran on and what
    was served, or --on and --model do.
    """
    from validation.sweep_panel import summary

    read = read_sweep(sweep, on, models)
    written = [] if report is None else write_sweep_report(report, read)
    if as_json:
        found = {"kind": "picture", "summary": summary(read), "marks": list(read.marks)}
        click.echo(json.dumps(found | {"written": [str(path) for path in written]}, ensure_ascii=False))
        return
    click.echo(summary(read))
    print_sweep_plots(read)
    for path in written:
        click.echo(f"wrote {path}", err=True)
