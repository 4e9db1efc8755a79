"""`packager validate structure`: is a checkpoint what its config says, and will engines load it?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.cli import options
from packager.errors import BadInput, IntegrityFailure

if TYPE_CHECKING:
    from rich.console import Console

    from packager.proof.structure import Structure

_MARK = {"ok": "", "note": "note: ", "problem": "NO: "}


@click.command(name="structure")
@click.argument("checkpoint")
@click.option("--source", metavar="SOURCE", help="The checkpoint it was made from, to compare names with.")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "sglang"]),
    help="Fail on what this engine refuses.  [default: on what both do]",
)
@click.option("--headers-only", is_flag=True, help="Do not read codes and scales.")
@options.as_json
def structure(
    checkpoint: str, source: str | None, engine: str | None, headers_only: bool, as_json: bool
) -> None:
    """Check names, shapes, scales and settings of CHECKPOINT; no server is needed.

    Every quantized weight has its scale as the dialect in config.json wants it, nothing else is quantized, no
    code is NaN, every scale is a positive number, the index and the list of skipped modules agree with what
    is stored. Says for 1 to 8 GPUs whether the shapes divide, and what vLLM and SGLang make of it.

    Exits 3 with every problem listed, or 5 if CHECKPOINT is not what SOURCE was.
    """
    from packager.checkpoint.source import locate
    from packager.proof.structure import check_structure

    path = locate(checkpoint)
    original: Path | None = locate(source) if source is not None else None
    found = check_structure(path, source=original, read_data=not headers_only, engine=engine)
    if as_json:
        click.echo(json.dumps(_document(found), ensure_ascii=False))
    else:
        _print(found)
    if not found.sound:
        failure = IntegrityFailure if found.differs_from_source else BadInput
        raise failure(
            f"{checkpoint} has {len(found.problems)} structural problem(s), the first: {found.problems[0]}",
            "All are in the report. Convert the source again, or mend config.json where it is at fault.",
        )


def _document(found: Structure) -> dict[str, Any]:
    document = {**asdict(found), "sound": found.sound}
    for split, row in zip(found.parallel, document["parallel"], strict=True):
        row["possible"] = split.possible
    return document


def _print(found: Structure) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    scheme = f"{found.scheme}, {found.dialect} dialect" if found.scheme else "no quantization stated"
    click.echo(f"{found.architecture}: {scheme}")
    read = "codes and scales read" if found.data_read else "headers only"
    click.echo(
        f"{found.quantized} quantized weights, {found.scales} scales, {found.kept} other tensors ({read})\n"
    )
    _print_parallel(found, console)
    _print_engines(found, console)
    for problem in found.problems:
        console.print(escape(f"problem: {problem}"), soft_wrap=True)
    click.echo("sound" if found.sound else f"{len(found.problems)} problem(s)")


def _print_parallel(found: Structure, console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("GPUs", "heads", "KV heads", "dense width", "expert width", "vocabulary"):
        table.add_column(title, justify="right")
    table.add_column("")
    for split in found.parallel:
        widths = (split.heads, split.kv_heads, split.dense_width, split.expert_width, split.vocabulary)
        cells = ("–" if width is None else str(width) for width in widths)
        table.add_row(str(split.size), *cells, "yes" if split.possible else "no")
    console.print(table)
    for split in found.parallel:
        if not split.possible:
            more = f" (and {len(split.reasons) - 1} more)" if len(split.reasons) > 1 else ""
            console.print(f"{split.size}: {split.reasons[0]}{more}")
    click.echo()


def _print_engines(found: Structure, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("vLLM", "SGLang"):
        table.add_column(title, overflow="fold", ratio=1)
    for need in found.engines:
        cells = (escape(_MARK[verdict.level] + verdict.text) for verdict in (need.vllm, need.sglang))
        table.add_row(need.matter, *cells)
    console.print(table)
    click.echo()
