"""The sweep of `packager validate throughput`: its options, what they ask for, and its tables."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.cli import options
from packager.cli.measuring import Server, print_table
from packager.cli.throughput_shapes import shape_options, shape_variants
from packager.cli.validate_served import served_options
from packager.errors import RemoteFailure, UsageProblem

if TYPE_CHECKING:
    from validation.sweep import Plan, ServedVariant
    from validation.sweep_model import CellRatio, Limits, Spanned, Sweep, SweepCell
    from validation.tasks import Item

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_WIDTH = 79
_LIMITS = ("ttft", "tpot", "e2el")


def sweep_options() -> list[Decorator]:
    """The options that make a sweep, besides those of the candidate and of any throughput."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    at_least_one = click.IntRange(min=1)
    return [
        click.option(
            "--input-tokens",
            callback=options.numbers,
            metavar="N,N,…",
            help="Sweep prompts of about so many tokens too: conversations of --items, joined or cut.",
        ),
        click.option("--repeats", type=at_least_one, help="Of each cell of a sweep.  [default: 3]"),
        click.option(
            "--requests",
            type=at_least_one,
            help="Of a sweep's cell and repeat; twice the concurrency at least.  [default: 16]",
        ),
        *served_options("baseline-"),
        click.option(
            "--baseline-tokenizer",
            type=folder,
            help="Folder with the baseline's tokenizer.  [default: its own, else the candidate's]",
        ),
        click.option(
            "--residency",
            type=click.Choice(["together", "alternate"]),
            help="All servers up, one asked at a time; or one up at a time, changing once a repeat.  "
            "[default: together on a processor, alternate on GPUs]",
        ),
        click.option(
            "--draft-tokens",
            type=at_least_one,
            help="Draft this many at any batch, whatever the bundle's profile says.",
        ),
        click.option(
            "--lengths",
            type=click.Choice(["matched", "fixed"]),
            help="Answers as long as the candidate's own, or as --output-tokens, past their end.  "
            "[default: matched; fixed with dummy weights]",
        ),
        click.option(
            "--goodput",
            metavar="ttft:MS,tpot:MS,e2el:MS",
            help="Limits that a good request keeps; any of the three.",
        ),
        click.option("--devices", type=at_least_one, default=1, help="GPUs of the server at --url."),
        click.option("--baseline-devices", type=at_least_one, default=1, help="Of that at --baseline-url."),
        click.option(
            "--stall-seconds",
            type=click.FloatRange(min=0, min_open=True),
            default=300.0,
            show_default=True,
            help="Without a token, after which a server counts as stalled.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of prompts."),
        *shape_options(),
    ]


def asked_for(own: dict[str, Any]) -> bool:
    """Whether the options mean a sweep rather than a single run."""
    given = ("input_tokens", "repeats", "requests", "residency", "draft_tokens", "lengths", "goodput")
    sides = ("baseline_serve", "baseline_url", "shape", "baseline_shape", "synthetic_acceptance")
    return any(own[name] for name in (*given, *sides))


def run_sweep(
    server: Server,
    items: Sequence[Item],
    own: dict[str, Any],
    *,
    tokenizer: Path | None,
    concurrency: Sequence[int],
    output_tokens: Sequence[int],
) -> Sweep:
    """Start what the options name and measure it.

    Args:
        own: as `sweep_options` gives them.

    Raises:
        UsageProblem: options that do not go together.
        BadInput: a folder that cannot be served.
    """
    from packager.serving.cpu import device
    from validation.sweep import Plan, measure_sweep
    from validation.sweep_bound import hardware_here

    if not own["input_tokens"]:
        raise UsageProblem("a sweep needs input lengths", "Give --input-tokens, such as 128,512.")
    say = _say
    cache = server.target.cache
    variants = [
        *_side(server.options, "", server.target.label, cache, tokenizer, own, say),
        *_side(own, "baseline_", "baseline", cache, own["baseline_tokenizer"] or tokenizer, own, say),
        *shape_variants(
            own,
            cache,
            input_tokens=own["input_tokens"],
            output_tokens=output_tokens,
            draft_tokens=own["draft_tokens"],
            say=say,
        ),
    ]
    variants.sort(key=lambda one: one.variant.role == "baseline")  # a candidate leads
    plan = Plan(
        concurrency=concurrency,
        input_tokens=own["input_tokens"],
        output_tokens=output_tokens,
        repeats=own["repeats"] or Plan.repeats,
        requests=own["requests"] or Plan.requests,
        residency=own["residency"] or ("together" if device() == "cpu" else "alternate"),
        lengths=own["lengths"],
        limits=limits_of(own["goodput"]),
        seed=own["seed"],
        stall_s=own["stall_seconds"],
    )
    _announce(plan, variants, say)
    sweep = measure_sweep(variants, items, plan, cache=cache, say=say)
    if not all(one.variant.command for one in variants):
        return sweep  # of a server that ran already it is not known where it runs
    # Now that the servers are stopped: bounds and pictures need the rates of what they ran on.
    return sweep.model_copy(update={"hardware": hardware_here(sweep.environment)})


def limits_of(text: str | None) -> Limits | None:
    """Limits written as `ttft:500,tpot:50`; UsageProblem if they are not."""
    from validation.sweep_model import Limits

    if not text:
        return None
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        try:
            if name not in _LIMITS or name in found or not float(value) > 0:
                raise ValueError
            found[name] = float(value)
        except ValueError:
            raise UsageProblem(
                f"--goodput does not understand {part!r}",
                "Give milliseconds: ttft:500,tpot:50,e2el:5000, or any of these.",
            ) from None
    return Limits(**{f"{name}_ms": value for name, value in found.items()})


def _side(
    chosen: dict[str, Any],
    prefix: str,
    name: str,
    cache: Path,
    tokenizer: Path | None,
    own: dict[str, Any],
    say: Callable[[str], None],
) -> list[ServedVariant]:
    """The candidate's variants, or the baseline's; none if there is no baseline."""
    from packager.release.served import servable
    from packager.release.sweep_variants import variants_of
    from validation.endpoint import Target
    from validation.sweep import running_variant

    stem, role = f"--{prefix.replace('_', '-')}", "baseline" if prefix else "candidate"
    url, folder = chosen[f"{prefix}url"], chosen[f"{prefix}serve"]
    if url is not None and folder is not None:
        raise UsageProblem(f"{stem}url and {stem}serve exclude each other", "Give one of them.")
    if url is not None:
        subject = chosen[f"{prefix}subject"]
        if subject is None:
            raise UsageProblem(f"{stem}url needs {stem}subject", "Give the digest of what is served.")
        if tokenizer is None:
            raise UsageProblem(f"{stem}url needs {stem}tokenizer", "Give the folder of its tokenizer.")
        target = Target(url, chosen[f"{prefix}model"], subject, name, cache)
        devices = own[f"{prefix}devices"]
        return [running_variant(name, role, target, tokenizer, devices=devices)]  # type: ignore[arg-type]
    if folder is None:
        return []
    found = servable(folder, with_draft=chosen[f"{prefix}draft"], context=chosen[f"{prefix}context"])
    return variants_of(
        found,
        name=name,
        role=role,  # type: ignore[arg-type]
        cache=cache,
        say=say,
        draft_tokens=None if prefix else own["draft_tokens"],
        both=not prefix,
    )


def _announce(plan: Plan, variants: Sequence[ServedVariant], say: Callable[[str], None]) -> None:
    cells = len(plan.concurrency) * len(plan.input_tokens) * len(plan.output_tokens)
    names = ", ".join(one.variant.name for one in variants)
    say(f"{cells} cells x {len(variants)} variants ({names}) x {plan.repeats} repeats, {plan.residency}")


def show(sweep: Sweep) -> None:
    """Print a sweep's tables, 80 columns wide, with what must be known to read them."""
    for mark in sweep.marks:
        click.echo(textwrap.fill(f"NOT REAL: {mark}", _WIDTH, subsequent_indent="  "))
    several = len({c.output_tokens for c in sweep.cells}) > 1
    for variant in sweep.variants:
        engine = " ".join(filter(None, (variant.engine, variant.engine_version)))
        many = "" if variant.devices == 1 else f", {variant.devices} GPUs"
        dummy = ", dummy weights" if variant.weights == "dummy" else ""
        click.echo(f"\n{variant.name} ({engine}{many}{dummy})")
        _print_cells(sweep, [c for c in sweep.cells if c.variant == variant.name])
    pairs = list(dict.fromkeys((r.candidate, r.baseline) for r in sweep.ratios))
    if pairs:
        click.echo("\noutput tokens/s over those of another in the same cell (95 % interval)")
        for k, (one, other) in enumerate(pairs):
            click.echo(f"  {'ABCDEFGH'[k % 8]}  {one} / {other}")
        _print_ratios(sweep, pairs, several)
    for line in _notes(sweep):
        click.echo(textwrap.fill(line, _WIDTH, subsequent_indent="  "))


def _print_cells(sweep: Sweep, cells: Sequence[SweepCell]) -> None:
    drafted = any(c.acceptance_length for c in cells)
    power = any(c.power_w for c in cells)
    header = ["in", "out", "ans", "conc", "tok/s", "range", "/user", "TTFT", "e2e95"]
    header += ["good"] * (sweep.limits is not None) + ["acc."] * drafted + ["W"] * power
    rows: list[list[object]] = []
    failed: list[str] = []
    for c in cells:
        given = "" if c.answer_tokens is None else f"{c.answer_tokens:.0f}"
        row: list[object] = [c.input_tokens, c.output_tokens, given, c.concurrency]
        if c.failure is not None:
            failed.append(
                f"  {c.input_tokens} in, {c.output_tokens} out, {c.concurrency} at once: {c.failure.kind}"
            )
            continue
        speed = c.output_tokens_per_s
        row += [_figure(speed), "" if speed is None else f"{_short(speed.low)}–{_short(speed.high)}"]
        ends = [r.e2el_ms.p95 for r in c.repeats if r.e2el_ms is not None and r.e2el_ms.p95 is not None]
        row += [
            _figure(c.per_user),
            _figure(c.ttft_ms),
            _short(sorted(ends)[len(ends) // 2]) if ends else "–",
        ]
        row += [_figure(c.goodput, 2)] * (sweep.limits is not None)
        row += [_figure(c.acceptance_length, 2)] * drafted + [_figure(c.power_w)] * power
        rows.append(row)
    if rows:
        print_table(header, rows)
    for line in failed:
        click.echo(line)


def _print_ratios(sweep: Sweep, pairs: Sequence[tuple[str, str]], several: bool) -> None:
    found = {
        (r.candidate, r.baseline, r.concurrency, r.input_tokens, r.output_tokens): r for r in sweep.ratios
    }
    places = dict.fromkeys((c.input_tokens, c.output_tokens, c.concurrency) for c in sweep.cells)
    header = ["in", *["out"] * several, "at once", *("ABCDEFGH"[k % 8] for k in range(len(pairs)))]
    rows = [
        [
            i,
            *[o] * several,
            c,
            *(_interval(found.get((one, other, c, i, o))) for one, other in pairs),
        ]
        for i, o, c in places
    ]
    print_table(header, rows)


def _notes(sweep: Sweep) -> list[str]:
    lengths = {
        "matched": "Answers end by the first variant's own end; the others give as many tokens.",
        "fixed": "Every answer has the full length, past its own end.",
    }
    said = ["", lengths[sweep.lengths], "Prompts differ by cell and repeat."]
    said.append("ans: tokens of a mean answer. conc: requests at once.")
    said.append("range: lowest and highest repeat. /user: 1000 / TPOT.")
    said.append("TTFT: median; e2e95: 95th percentile of a whole answer; both in ms.")
    said.append("acc.: acceptance length. good: requests/s within the limits of --goodput.")
    if sweep.repeats == 1:
        said.append("One repeat: no interval. Give --repeats 3 or more.")
    elif sweep.repeats < 4:
        said.append(f"{sweep.repeats} repeats: intervals are wide, as they have to be.")
    if sweep.prefix_caching == "as served":
        said.append("A server that ran already may keep a prefix cache; shared beginnings would gain by it.")
    said += dict.fromkeys(note for variant in sweep.variants for note in variant.notes)
    if not any(c.power_w for c in sweep.cells):
        said.append("Power: not measured, nothing here tells it.")
    return said


def failed(sweep: Sweep) -> RemoteFailure | None:
    """The error that a sweep with failures ends with, each named once, with the tail of its log."""
    cells = sweep.failures
    if not cells:
        return None
    blocks: dict[tuple[str, str, str], tuple[int, tuple[str, ...]]] = {}
    for cell in cells:
        failure = cell.failure
        assert failure is not None
        key = (cell.variant, failure.kind, failure.message)
        blocks[key] = (blocks.get(key, (0, ()))[0] + 1, failure.log_tail)
    lines = [f"{len(cells)} of {len(sweep.cells)} cells were not measured"]
    for (variant, kind, message), (count, tail) in blocks.items():
        lines.append(f"{variant}, {count} {'cell' if count == 1 else 'cells'}: {kind}: {message}")
        if kind != "not tried":  # its log stands under what it was given up for
            lines += [f"  | {line}" for line in tail]
    return RemoteFailure(
        "\n".join(lines), "What was measured is kept; the same command tries the rest again."
    )


def _figure(value: Spanned | None, digits: int | None = None) -> str:
    if value is None:
        return "–"
    return _short(value.median) if digits is None else f"{value.median:.{digits}f}"


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _interval(ratio: CellRatio | None) -> str:
    if ratio is None:
        return "–"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.ratio:.2f}"
    return f"{ratio.ratio:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _say(line: str) -> None:
    click.echo(line, err=True)
