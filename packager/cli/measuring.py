"""What the verbs of `packager validate` share: the server measured, runs as JSON, tables, progress."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.cli import options
from packager.cli.validate_served import served_options, serving, where
from packager.errors import BadInput

if TYPE_CHECKING:
    from pydantic import BaseModel

    from validation.endpoint import Target

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True)
class Server:
    """What the options that every measurement has say."""

    target: Target
    out: Path | None
    as_json: bool
    folder: Path | None = None
    """What is served for it; None: a server that runs."""
    options: dict[str, Any] = field(default_factory=dict)
    """As `served_options` gave them."""


def server_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that every measurement of a server has, handed over as one `Server`."""

    @functools.wraps(function)
    def packed(label: str, cache: Path, out: Path | None, as_json: bool, **own: Any) -> None:
        chosen = {name: own.pop(name) for name in where()}
        with serving(chosen, label=label, cache=cache) as target:
            function(Server(target, out, as_json, chosen["serve"], chosen), **own)

    shared = [
        *served_options(),
        click.option("--label", default="candidate", show_default=True, help="What tables call it."),
        click.option(
            "--cache",
            type=click.Path(file_okay=False, path_type=Path),
            default=Path(".packager-answers"),
            show_default=True,
            help="Folder that keeps answers and finished cells.",
        ),
        click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the run as JSON."),
        options.as_json,
    ]
    return functools.reduce(lambda f, option: option(f), reversed(shared), packed)


def read_run(kind: type[Any], path: Path) -> Any:
    """A run from the JSON that `--out` wrote.

    Raises:
        BadInput: it is not one of that kind.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as err:
        first = err.errors()[0]["msg"] if isinstance(err, ValidationError) else err.strerror
        raise BadInput(
            f"{path} is not the JSON of such a run: {first}", "Give a file written by the same verb's --out."
        ) from None


def write_run(document: BaseModel, out: Path | None) -> None:
    """Write a run as JSON, whole or not at all; nothing without a path."""
    if out is None:
        return
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def emit(**parts: Any) -> None:
    """Print one JSON document of the named parts: models, lists of models, or None."""
    import json

    def plain(value: Any) -> Any:
        return (
            [plain(v) for v in value] if isinstance(value, list) else value and value.model_dump(mode="json")
        )

    click.echo(json.dumps({name: plain(part) for name, part in parts.items()}, ensure_ascii=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under a header; the first column and verdicts to the left, the rest to the right."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k == 0 or name == "verdict" else "right")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def percent(share: float) -> str:
    """A share of one in percent, one place."""
    return f"{100 * share:.1f}"


def print_progress(done: int, total: int) -> None:
    """A line now and then: at each tenth of the items."""
    if done == total or done % max(1, total // 10) == 0:
        click.echo(f"{done} of {total} answered", err=True)
