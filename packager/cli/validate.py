"""`packager validate`: measure a server that is running, or check a checkpoint, and judge what is found."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.cli import options
from packager.cli.validate_claims import claims
from packager.cli.validate_structure import structure
from packager.errors import BadInput, GateFailed

if TYPE_CHECKING:
    from pydantic import BaseModel

    from validation.endpoint import Target
    from validation.tasks import AccuracyComparison

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group()
def command() -> None:
    """Measure a running OpenAI-compatible server and judge the figures, or check a checkpoint's structure.

    Start a server with `packager serve`. Answers are kept in the cache folder: a command that was killed goes
    on where it stopped, and an item that was answered is never asked again for the same --subject.
    """


command.add_command(structure)
command.add_command(claims)


@dataclass(frozen=True)
class _Server:
    """What the options that every measurement has say."""

    target: Target
    out: Path | None
    as_json: bool


def _server(function: Callable[..., None]) -> Callable[..., None]:
    """The options that every measurement of a server has, handed over as one `_Server`."""

    @functools.wraps(function)
    def packed(
        url: str,
        model: str,
        subject: str,
        label: str,
        cache: Path,
        out: Path | None,
        as_json: bool,
        **own: Any,
    ) -> None:
        from validation.endpoint import Target

        function(_Server(Target(url, model, subject, label, cache), out, as_json), **own)

    shared = [
        click.option("--url", required=True, help="Base URL of the server, without /v1."),
        click.option("--model", default="model", show_default=True, help="Name the server serves under."),
        click.option(
            "--subject",
            required=True,
            help="Digest of what is served (see `packager inspect`); binds the evidence.",
        ),
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


def _levels(_context: click.Context, _option: click.Parameter, value: str) -> list[int]:
    """Numbers of 1 or more, by commas."""
    try:
        levels = [int(level) for level in value.split(",")]
        if min(levels) < 1:
            raise ValueError
    except ValueError:
        raise click.UsageError(
            f"--concurrency takes numbers of 1 or more, such as 1,8; got {value!r}"
        ) from None
    return levels


_items = click.option(
    "--items",
    "items_path",
    type=_FILE,
    required=True,
    help="JSONL of {id, task, language, messages, answer, meta}.",
)


@command.command()
@_server
@_items
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--reference", type=_FILE, help="Run of the original model (its --out) to compare with.")
@click.option(
    "--margin-points",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Loss in percentage points that still counts as non-inferior.",
)
def accuracy(
    server: _Server,
    items_path: Path,
    concurrency: int,
    max_tokens: int,
    reference: Path | None,
    margin_points: float,
) -> None:
    """Exact-match accuracy on items with known answers; with --reference, the paired comparison.

    Exits 4 if the comparison shows a loss beyond the margin. An inconclusive comparison exits 0 and says so.
    """
    from validation.endpoint import Sampling
    from validation.tasks import AccuracyRun, compare_accuracy, load_items, measure_accuracy

    before = _read(AccuracyRun, reference) if reference is not None else None
    run = measure_accuracy(
        server.target,
        load_items(items_path),
        concurrency=concurrency,
        sampling=Sampling(max_tokens=max_tokens),
        progress=_progress,
    )
    _write(run, server.out)
    comparison = compare_accuracy(before, run, margin_points=margin_points) if before is not None else None
    if server.as_json:
        _emit(run=run, comparison=comparison)
    else:
        header = ["task", "items", "right", "accuracy %", "95 % interval", "commonest answer %"]
        _table(
            header,
            [
                [
                    s.name,
                    s.n,
                    s.correct,
                    _pc(s.accuracy),
                    f"{_pc(s.low)} – {_pc(s.high)}",
                    _pc(s.majority_share),
                ]
                for s in (run.overall, *run.by_task, *run.by_language)
            ],
        )
        if comparison is not None:
            _print_comparison(comparison)
    if comparison is not None and comparison.overall.verdict == "inferior":
        paired = comparison.overall
        raise GateFailed(
            f"{run.label} is inferior to {comparison.reference}: {paired.difference_points:+.1f} points, "
            f"interval {paired.low_points:+.1f} to {paired.high_points:+.1f}, margin {margin_points:g}",
            "Read the flips in the JSON document.",
        )


@command.command()
@_server
@_items
@click.option("--reference-url", required=True, help="Base URL of the server to compare with.")
@click.option("--reference-model", default="model", show_default=True)
@click.option("--reference-subject", required=True, help="Digest of what that server serves.")
@click.option("--reference-label", default="reference", show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=100, show_default=True, help="First N items.")
@click.option("--concurrency", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True)
def fidelity(
    server: _Server,
    items_path: Path,
    reference_url: str,
    reference_model: str,
    reference_subject: str,
    reference_label: str,
    prompts: int,
    concurrency: int,
    max_tokens: int,
) -> None:
    """Greedy output of two servers, token for token, and whether each difference starts at a near tie.

    The reference's answers are kept too: once they are in the cache, its server need not run any more.
    """
    from validation.endpoint import Sampling
    from validation.identity import collect_outputs, compare_outputs
    from validation.tasks import load_items

    items = load_items(items_path)[:prompts]
    sampling = Sampling(max_tokens=max_tokens)
    reference = replace(
        server.target,
        url=reference_url,
        model=reference_model,
        subject=reference_subject,
        label=reference_label,
    )
    result = compare_outputs(
        *(
            collect_outputs(target, items, concurrency=concurrency, sampling=sampling, progress=_progress)
            for target in (reference, server.target)
        )
    )
    _write(result, server.out)
    if server.as_json:
        _emit(identity=result)
        return
    click.echo(f"{result.identical} of {result.n} greedy answers are identical")
    if result.differences:
        _table(
            ["prompt", "parts at token", "gap, nats", "near tie"],
            [
                [
                    d.id,
                    d.position,
                    "–" if d.gap_nats is None else f"{d.gap_nats:.3f}",
                    "yes" if d.near_tie else "no",
                ]
                for d in result.differences
            ],
        )
    if result.noise is not None:
        click.echo(
            f"log-probabilities of the same token differ by {result.noise.median:.2g} nats in the median, "
            f"{result.noise.p99:.2g} at the 99th percentile ({result.noise.tokens} tokens)"
        )


@command.command()
@_server
@_items
@click.option("--trained-length", type=click.IntRange(min=1), required=True, help="Tokens before extension.")
@click.option("--before", type=_FILE, help="Run before the context patch (its --out) to compare with.")
@click.option("--concurrency", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=64, show_default=True)
def context(
    server: _Server,
    items_path: Path,
    trained_length: int,
    before: Path | None,
    concurrency: int,
    max_tokens: int,
) -> None:
    """Retrieval from long records, by multiple of the trained length."""
    from validation.endpoint import Sampling
    from validation.longcontext import LongRun, compare_long, measure_long
    from validation.tasks import load_items

    earlier = _read(LongRun, before) if before is not None else None
    items = [item for item in load_items(items_path) if "multiple" in item.meta]
    run = measure_long(
        server.target,
        items,
        trained_length=trained_length,
        concurrency=concurrency,
        sampling=Sampling(max_tokens=max_tokens, top_logprobs=None),
        progress=_progress,
    )
    _write(run, server.out)
    comparison = compare_long(earlier, run) if earlier is not None else None
    if server.as_json:
        _emit(run=run, comparison=comparison)
        return
    paired = {p.scope: p for p in comparison.by_multiple} if comparison is not None else {}
    rows = []
    for s in run.by_multiple:
        p = paired.get(f"{s.multiple}x")
        change = (
            "" if p is None else f"{p.difference_points:+.1f} ({p.low_points:+.1f} to {p.high_points:+.1f})"
        )
        interval = f"{_pc(s.low)} – {_pc(s.high)}"
        rows.append([f"{s.multiple}x", s.context_tokens, s.n, s.refused, _pc(s.accuracy), interval, change])
    _table(["length", "tokens", "records", "refused", "found %", "95 % interval", "change, points"], rows)


@command.command()
@_server
@click.option(
    "--items", "items_path", type=_FILE, required=True, help="JSONL whose conversations are the prompts."
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with the model's tokenizer.",
)
@click.option("--prompts", type=click.IntRange(min=1), default=64, show_default=True, help="First N items.")
@click.option(
    "--concurrency",
    default="1,8",
    show_default=True,
    callback=_levels,
    help="Requests in flight, by commas.",
)
@click.option("--output-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--baseline", type=_FILE, help="Run of the baseline (its --out) to take the ratio to.")
@click.option("--match", type=_FILE, help="Give each answer as many tokens as in this run (its --out).")
def throughput(
    server: _Server,
    items_path: Path,
    tokenizer: Path,
    prompts: int,
    concurrency: list[int],
    output_tokens: int,
    baseline: Path | None,
    match: Path | None,
) -> None:
    """Tokens a second and latencies under load, through `vllm bench serve`."""
    from validation.tasks import load_items
    from validation.throughput import ThroughputRun, compare_throughput, measure_throughput

    base = _read(ThroughputRun, baseline) if baseline is not None else None
    run = measure_throughput(
        server.target,
        tokenizer=tokenizer,
        prompts=load_items(items_path)[:prompts],
        concurrency=concurrency,
        output_tokens=output_tokens,
        match=_read(ThroughputRun, match) if match is not None else None,
    )
    _write(run, server.out)
    ratios = compare_throughput(base, run) if base is not None else []
    if server.as_json:
        _emit(run=run, ratios=ratios)
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
    _table(header, rows)


def _print_comparison(comparison: AccuracyComparison) -> None:
    click.echo(f"\n{comparison.candidate} against {comparison.reference}")
    rows = []
    for p in (comparison.overall, *comparison.by_task):
        verdict = (
            p.verdict if p.n_to_decide is None else f"{p.verdict} (about {p.n_to_decide} items would decide)"
        )
        interval = f"{p.low_points:+.1f} to {p.high_points:+.1f}"
        counts = [p.only_reference, p.only_candidate, f"{p.p_value:.3g}"]
        rows.append([p.scope, p.n, f"{p.difference_points:+.1f}", interval, *counts, verdict])
    _table(["task", "items", "points", "95 % interval", "lost", "gained", "p", "verdict"], rows)


def _read(kind: type[Any], path: Path) -> Any:
    from pydantic import ValidationError

    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as err:
        first = err.errors()[0]["msg"] if isinstance(err, ValidationError) else err.strerror
        raise BadInput(
            f"{path} is not the JSON of such a run: {first}", "Give a file written by the same verb's --out."
        ) from None


def _write(document: BaseModel, out: Path | None) -> None:
    if out is None:
        return
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def _emit(**parts: Any) -> None:
    import json

    def plain(value: Any) -> Any:
        return (
            [plain(v) for v in value] if isinstance(value, list) else value and value.model_dump(mode="json")
        )

    click.echo(json.dumps({name: plain(part) for name, part in parts.items()}, ensure_ascii=False))


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k == 0 or name == "verdict" else "right")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def _pc(share: float) -> str:
    return f"{100 * share:.1f}"


def _progress(done: int, total: int) -> None:
    """A line now and then: at each tenth of the items."""
    if done == total or done % max(1, total // 10) == 0:
        click.echo(f"{done} of {total} answered", err=True)
