"""`packager draft compare`: measured drafts side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packager.cli import options
from packager.cli.draft_measuring import FILE, WIDTH

if TYPE_CHECKING:
    from rich.table import Table as Printed

    from validation.panel import Column, Table


@click.command("compare")
@click.argument("evaluations", nargs=-1, required=True, type=FILE)
@options.as_json
def compare_command(evaluations: tuple[Path, ...], as_json: bool) -> None:
    """Lay EVALUATIONS, files of `draft evaluate --out`, side by side; differences are to the first.

    All must have been measured on the same target with the same prompts. With --json the panel that a
    release's report shows when its recipe names these files under validate.draft_evaluations.
    """
    from packager.release.draft_panels import comparison_panel
    from packager.release.draft_record import read_record

    panel = comparison_panel([read_record(path) for path in evaluations])
    if as_json:
        click.echo(json.dumps(panel.model_dump(mode="json"), ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(file=sys.stdout, width=WIDTH, highlight=False, markup=False)
    console.print(panel.summary)
    for table in panel.tables:
        console.print(_printed(table))
    for note in panel.notes:
        console.print(note)


def _printed(table: Table) -> Printed:
    from rich import box
    from rich.table import Table as Printed

    printed = Printed(box=box.SIMPLE_HEAD, pad_edge=False, title=table.caption, title_justify="left")
    for column in table.columns:
        printed.add_column(column.name, justify="left" if column.kind == "text" else "right")
    for row in table.rows:
        printed.add_row(*(_shown(value, column) for value, column in zip(row, table.columns, strict=True)))
    return printed


def _shown(value: str | int | float | None, column: Column) -> str:
    if value is None:
        return "–"
    if isinstance(value, str) or column.digits is None:
        return str(value)
    return f"{value:.{column.digits}f}"
