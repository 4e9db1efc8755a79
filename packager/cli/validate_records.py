"""The records that `packager validate context` reads: a file's, or synthetic ones made for the model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.cli import options
from packager.errors import UsageProblem

if TYPE_CHECKING:
    from validation.conduct import Conduct
    from validation.longcontext import LongComparison, LongRun
    from validation.tasks import Item

_NAMES = ("items_path", "lengths", "depths", "per_cell", "tokenizer", "seed", "prefill_tokens_per_s", "gpus")


@dataclass(frozen=True)
class Records:
    """What the options of records say."""

    items_path: Path | None
    lengths: list[int] | None
    depths: int
    per_cell: int
    tokenizer: Path | None
    seed: int
    prefill_tokens_per_s: float | None
    gpus: int

    def items(self, trained_length: int) -> list[Item]:
        """The items; for synthetic ones, what they will cost is said on stderr first.

        Raises:
            UsageProblem: both or neither of a file and lengths are given, or lengths without a tokenizer.
            MeasurementError: the file or the tokenizer cannot be read, or a length is too short.
        """
        from validation.needles import needle_items, token_counter
        from validation.tasks import load_items

        if (self.items_path is None) == (self.lengths is None):
            raise UsageProblem(
                "records come from a file or are made", "Give one of --items FILE and --records LENGTHS."
            )
        if self.items_path is not None:
            return [item for item in load_items(self.items_path) if "multiple" in item.meta]
        if self.tokenizer is None or self.lengths is None:
            raise UsageProblem(
                "--records needs --tokenizer", "Give the model's folder: its tokenizer counts the lengths."
            )
        lengths = sorted(set(self.lengths))
        cells, tokens = len(lengths) * self.depths, sum(lengths) * self.depths * self.per_cell
        click.echo(
            f"{cells * self.per_cell} records, {self.per_cell} in each of {cells} cells: "
            f"{tokens / 1e6:.1f} million tokens to read{self._time(tokens)}",
            err=True,
        )
        return needle_items(
            lengths,
            trained_length=trained_length,
            tokens=token_counter(self.tokenizer),
            depths=self.depths,
            per_cell=self.per_cell,
            seed=self.seed,
        )

    def _time(self, tokens: int) -> str:
        if self.prefill_tokens_per_s is None:
            return " (--prefill-tokens-per-s and --gpus would say how many GPU-hours)"
        return f", {tokens / self.prefill_tokens_per_s / 3600 * self.gpus:.2g} GPU-hours at the speed stated"


def record_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say which records are read, handed over as one `Records`."""

    @functools.wraps(function)
    def packed(*others: Any, **given: Any) -> None:
        records = Records(**{name: given.pop(name) for name in _NAMES})
        function(*others, records=records, **given)

    shared = [
        click.option(
            "--items",
            "items_path",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="JSONL of {id, task, language, messages, answer, meta: {multiple, context_tokens, depth}}.",
        ),
        click.option(
            "--records",
            "lengths",
            callback=options.numbers,
            metavar="N,N,…",
            help="Make records of these lengths in tokens, such as 32768,65536,131072.",
        ),
        click.option("--depths", type=click.IntRange(min=1), default=5, show_default=True),
        click.option(
            "--per-cell",
            type=click.IntRange(min=1),
            default=8,
            show_default=True,
            help="Records a length and depth; 8: each kind in each language once.",
        ),
        click.option(
            "--tokenizer",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="Folder with the model's tokenizer.json.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the synthetic records."),
        click.option("--prefill-tokens-per-s", type=click.FloatRange(min=0, min_open=True)),
        click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True),
    ]
    return functools.reduce(lambda f, option: option(f), reversed(shared), packed)


def write_long_report(
    directory: Path, runs: Sequence[LongRun], comparison: LongComparison | None, conduct: Conduct
) -> None:
    """Write a report of long records alone: page, JSON, Markdown, JUnit."""
    from validation.report import ReportInputs, Subject, build_report, collect_environment, write_report

    names: dict[str, str] = {}
    for run in runs:
        names.setdefault(run.subject, run.label)
    inputs = ReportInputs(
        title=f"Long records, {runs[-1].label}",
        subjects=tuple(Subject(name=label, digest=digest) for digest, label in names.items()),
        weights_served="native",
        environment=collect_environment(),
        long_context=tuple(runs),
        long_comparison=comparison,
        conduct=conduct,
        notes=(
            "The server was named by its URL: machine and versions above are the client's; what is served, "
            "and that it is served as stored, is taken from --subject.",
        ),
    )
    for path in write_report(build_report(inputs), directory).values():
        click.echo(f"wrote {path}", err=True)


def print_grid(run: LongRun) -> None:
    """Depth by length and, where several kinds were asked for, kind by length: found of asked."""
    lengths = sorted({cell.multiple for cell in run.grid})
    heads = [f"{round(length * run.trained_length):>12,}" for length in lengths]
    rows: dict[str, dict[float, str]] = {}
    for cell in (*run.grid, *run.by_kind):
        name = cell.kind or f"depth {100 * (cell.depth_low or 0):.0f} %"
        if cell.depth_high is not None and cell.depth_high != cell.depth_low:
            name = f"depth {100 * (cell.depth_low or 0):.0f} - {100 * cell.depth_high:.0f} %"
        rows.setdefault(name, {})[cell.multiple] = f"{cell.correct} of {cell.n}"
    width = max(len(name) for name in rows)
    click.echo(f"\n{'found, by tokens':<{max(width, 16)}}{''.join(heads)}")
    for name, cells in rows.items():
        click.echo(f"{name:<{max(width, 16)}}{''.join(f'{cells.get(m, chr(8211)):>12}' for m in lengths)}")
