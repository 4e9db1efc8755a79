"""`packager plan`: will it fit, a bound on speed, the exact serve command."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import click

from packager.cli import options
from packager.errors import UsageProblem
from packager.serving.engine import ServeSpec, sglang_command, vllm_command
from packager.serving.plan import (
    COUNTS,
    Fit,
    Plan,
    held_precision,
    make_plan,
    model_bytes,
    over_concurrency,
    shape_config,
    split_problem,
)
from packager.serving.tuned_kernels import Kernels, Tuned, kernels, shipped
from validation.errors import MeasurementError
from validation.hardware import GB, Hardware, hardware_file, parse_hardware
from validation.models import Precision
from validation.roofline import Rate

_WIDTH = 79
_RELEASED = Path("BUNDLE")
"""Stands in the command for the folder that a release makes."""


@click.command(name="plan")
@click.argument("source", required=False)
@click.option("--shape", help="A published architecture instead of a directory, e.g. ling-flash-2.0.")
@click.option("--hardware", help="Number x card, e.g. 2xh20. Default: the smallest that fits.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens. Default: what the config says.")
@click.option("--concurrency", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default=None,
    help="Of the weights served; another than SOURCE has is computed from its config. fp8: a scale for each "
    "128x128 weights; fp8-channel, int8: one a row; int4: one for 128 columns.  [default: that of SOURCE if "
    "it is quantized, else fp8]",
)
@click.option("--draft/--no-draft", "with_draft", default=True, help="Serve with an EAGLE3 draft.")
@click.option(
    "--draft-vocab",
    type=click.IntRange(min=1),
    help="Draft vocabulary where no draft lies in SOURCE. Default: 32000 or the model's own if smaller.",
)
@click.option("--draft-tokens", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--acceptance-length",
    type=click.FloatRange(min=1),
    help="Tokens a target step yields with the draft: an assumption, for a bound with the draft.",
)
@click.option("--plot", is_flag=True, help="Draw the bound over concurrency, in the terminal.")
@options.as_json
def command(
    source: str | None,
    shape: str | None,
    hardware: str | None,
    context: int | None,
    concurrency: int,
    precision: Precision | None,
    with_draft: bool,
    draft_vocab: int | None,
    draft_tokens: int,
    acceptance_length: float | None,
    plot: bool,
    as_json: bool,
) -> None:
    """Whether the model in SOURCE can be served, and how fast at best.

    SOURCE is a folder with config.json, or hf://org/name@revision, of which only headers are read.

    Weights need not be there: bytes are computed from config.json. The bound on speed is what bandwidth and
    arithmetic allow; no engine reaches it.
    """
    from packager.checkpoint.source import CONFIG_NAME, open_folder
    from packager.layouts import Described

    if (source is None) == (shape is None):
        raise UsageProblem(
            "give either SOURCE or --shape", "For instance: packager plan --shape ling-flash-2.0"
        )
    if shape is not None:
        folder, config = None, shape_config(shape)
    else:
        folder = open_folder(str(source))
        config = Described.parse(folder.json(CONFIG_NAME), folder.where(CONFIG_NAME))
    if acceptance_length is not None and acceptance_length > draft_tokens + 1:
        raise UsageProblem(
            f"{draft_tokens} draft tokens cannot yield {acceptance_length} tokens a step",
            f"--acceptance-length is at most {draft_tokens + 1} here.",
        )
    held = held_precision(config)
    precision = precision or ("fp8" if held == "bf16" else held)
    own_draft = folder.child("draft") if folder else None
    model = model_bytes(
        config,
        precision,
        directory=folder,
        draft=own_draft if with_draft else None,
        draft_vocab=(draft_vocab or min(32000, config.vocab_size)) if with_draft and not own_draft else None,
    )
    length = context or config.max_position_embeddings
    plan = make_plan(
        model,
        _cards(hardware) if hardware else None,
        context=length,
        concurrency=concurrency,
        acceptance_length=acceptance_length,
        draft_tokens=draft_tokens,
    )
    as_it_is = folder is not None and precision == held
    served = folder.path if folder and as_it_is else None
    draft_path = own_draft.path if own_draft else None
    made_by = "`packager release` or `packager bundle` makes"
    if folder and folder.path is None and as_it_is:
        made_by = f"`hf download {' --revision '.join(folder.name.removeprefix('hf://').split('@'))}` prints"
    chosen = plan.fit if plan.fits else plan.alternative
    serve: dict[str, list[str]] = {}
    if chosen is not None:
        spec = ServeSpec(
            model=served or _RELEASED,
            draft=None if not with_draft else draft_path or (served or _RELEASED) / "draft",
            num_speculative_tokens=draft_tokens,
            max_model_len=length,
            tensor_parallel=chosen.hardware.count,
        )
        serve = {"vLLM": vllm_command(spec, target="cuda"), "SGLang": sglang_command(spec)}
    trained = config.max_position_embeddings
    longer = trained if length > trained else None
    if as_json:
        click.echo(json.dumps(_document(plan, serve, longer), indent=2))
    else:
        _print(plan, serve, None if served else made_by, longer, acceptance_length)
        if plot and plan.fits:
            _plot(over_concurrency(plan))


def _cards(text: str) -> Hardware:
    try:
        return parse_hardware(text)
    except MeasurementError as err:
        raise UsageProblem(err.message, err.remedy) from None


def _document(plan: Plan, serve: dict[str, list[str]], longer: int | None) -> dict[str, Any]:
    model = plan.model
    return {
        "kind": "plan",
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "precision": model.precision,
        "weights_bytes": model.weights,
        "weights_from": model.weights_source,
        "draft_bytes": model.draft,
        "draft_from": model.draft_source,
        "kv_bytes_per_token": model.kv_per_token,
        "context": plan.context,
        "needs_context_extension": longer is not None,
        "concurrency": plan.concurrency,
        "hardware": plan.fit.hardware.label,
        "fits": plan.fits,
        "problem": plan.fit.problem,
        "weights_bytes_per_card": int(plan.fit.weights_per_card),
        "usable_bytes_per_card": int(plan.fit.hardware.usable_per_card),
        "kv_cache_tokens": plan.fit.kv_tokens,
        "requests_of_full_context": plan.fit.sequences(plan.context),
        "context_at_concurrency": plan.context_at_concurrency,
        "decode_bounds": [_bound(bound) for bound in plan.bounds],
        "decode_bounds_with_draft": [_bound(bound) for bound in plan.draft_bounds],
        "smallest_that_fits": plan.alternative.hardware.label if plan.alternative else None,
        "smallest_of_these_cards": plan.same_card.hardware.label if plan.same_card else None,
        "splits": [
            {
                "hardware": split.fit.hardware.label,
                "fits": split.fit.problem is None,
                "problem": split.fit.problem,
                "expert_parallel": split.expert_parallel,
                "kv_cache_tokens": split.fit.kv_tokens,
            }
            for split in plan.splits
        ],
        "kernels": _kernels_document(plan),
        "prefill_seconds_bound": plan.prefill.seconds if plan.prefill else None,
        "over_concurrency": [_bound(bound) for bound in over_concurrency(plan)] if plan.fits else [],
        "serve_command": serve.get("vLLM"),
        "sglang_command": serve.get("SGLang"),
    }


def _kernels_of(plan: Plan) -> tuple[Kernels, ...]:
    """For each way to split the model over cards like those planned for."""
    model, key = plan.model, plan.fit.hardware.key
    possible = [count for count in COUNTS if split_problem(model.layout, count, model.precision) is None]
    return tuple(kernels(model.layout, model.precision, key, count) for count in possible)


def _kernels_document(plan: Plan) -> dict[str, Any]:
    def tuned(one: Tuned | None) -> dict[str, Any] | None:
        if one is None:
            return None
        return {"file": one.file, "tuned": one.found, "read": one.used, "kernel": one.why}

    return {
        "vllm": shipped().release,
        "names_from": "the installed vLLM" if shipped().installed else "the packager's own list",
        "splits": [
            {
                "cards": one.ways,
                "fused_moe": tuned(one.experts),
                "fused_moe_expert_parallel": tuned(one.whole_experts),
                "dense": [tuned(matrix) for matrix in one.dense],
            }
            for one in _kernels_of(plan)
        ],
    }


def _bound(bound: Rate) -> dict[str, Any]:
    return {
        "concurrency": bound.concurrency,
        "context": bound.context,
        "tokens_per_s": round(bound.tokens_per_s, 1),
        "tokens_per_s_each": round(bound.each, 1),
        "limited_by": bound.limited_by,
    }


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _size(count: float) -> str:
    for unit, scale in (("GB", GB), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def _print(
    plan: Plan, serve: dict[str, list[str]], made_by: str | None, longer: int | None, acceptance: float | None
) -> None:
    model, found = plan.model, plan.fit
    share = hardware_file().engine
    rows = [
        (
            "parameters",
            f"{_count(model.parameters)}, {_count(model.active_parameters)} active a token",
        ),
        ("weights", f"{_size(model.weights)} in {model.precision.upper()} ({model.weights_source})"),
        ("draft", f"{_size(model.draft)} ({model.draft_source})" if model.draft else "none"),
        ("KV cache", f"{_size(model.kv_per_token)} a token, BF16"),
        (
            "hardware",
            f"{found.hardware.label} ({found.hardware.card.name}); "
            f"usable {_size(found.hardware.usable_per_card)} a card "
            f"({share.memory_utilization:.0%}, less {share.reserve_gb:g} GB assumed for activations)",
        ),
        ("fits", _verdict(plan, found)),
    ]
    if plan.fits:
        rows.append(("KV room", _room(plan, found)))
    for name, value in rows:
        click.echo(textwrap.fill(f"{name:<11} {value}", _WIDTH, subsequent_indent=" " * 12))
    _print_bounds("decoding, at best", plan.bounds)
    _print_bounds(f"with the draft, if a step yields {acceptance or 0:g} tokens", plan.draft_bounds)
    if plan.prefill is not None:
        click.echo(
            f"\nreading a prompt of {plan.context} tokens: {plan.prefill.seconds:.2f} s at best "
            f"({plan.prefill.limited_by})"
        )
    _print_splits(plan)
    _print_kernels(plan)
    if not serve:
        return
    where = "" if plan.fits else "there, "
    for engine, line in serve.items():
        click.echo(f"\n{where}serve with {engine}")
        click.echo(f"  {_shell(line)}")
    if made_by:
        click.echo(f"  ({_RELEASED} is the folder that {made_by})")
    if longer:
        click.echo(f"  (the config says {longer} tokens: extend it first with `packager extend-context`)")


def _print_splits(plan: Plan) -> None:
    click.echo(f"\nways to split it over cards like this one, for {plan.context} tokens:")
    for split in plan.splits:
        found = split.fit
        if found.problem is not None:
            says = found.problem
        else:
            says = f"{found.kv_tokens} tokens of cache"
            if split.expert_parallel:
                says += "; experts may stay whole (--enable-expert-parallel)"
        click.echo(_filled(f"  {found.hardware.label}: {says}"))


def _print_kernels(plan: Plan) -> None:
    found, hardware = _kernels_of(plan), plan.fit.hardware
    if not any(one.experts or one.dense for one in found):
        return
    source = "installed" if shipped().installed else "by the packager's list"
    click.echo(f"\nkernel settings that vLLM {shipped().release} ({source}) brings for {hardware.card.name}:")
    for one in found:
        if one.experts is None:
            continue
        says = f"fused MoE {one.experts.says}"
        if one.whole_experts is not None:
            says += f"; experts whole: {one.whole_experts.says}"
        click.echo(_filled(f"  {hardware.with_count(one.ways).label}: {says}"))
    dense = dict.fromkeys(matrix.says for one in found for matrix in one.dense)
    if dense:
        click.echo(_filled(f"  other matrices: {'; '.join(dense)}"))
    if any(one.experts is not None and one.experts.untuned for one in found):
        click.echo(
            _filled(
                "  (vLLM's benchmarks/kernels/benchmark_moe.py --tune makes what is missing; "
                "VLLM_TUNED_CONFIG_FOLDER names where it lies)"
            )
        )


def _filled(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _shell(line: list[str]) -> str:
    """A command to copy, an option and its value together, broken with backslashes."""
    words, rows = [shlex.quote(word) for word in line], [""]
    starts = [0, *(k for k, word in enumerate(line) if word.startswith("--")), len(line)]
    for start, end in pairwise(starts):
        part = " ".join(words[start:end])
        if rows[-1] and len(rows[-1]) + len(part) > _WIDTH - 7:
            rows.append(part)
        else:
            rows[-1] = f"{rows[-1]} {part}".strip()
    return " \\\n    ".join(rows)


def _plot(bounds: Sequence[Rate]) -> None:
    most = max(bound.tokens_per_s for bound in bounds)
    click.echo(f"\nbound over concurrency, {bounds[0].context} tokens of context each:")
    click.echo(f"  {'concurrency':>11} {'tokens/s':>9} {'each':>7}")
    for bound in bounds:
        bar = "█" * max(1, round(44 * bound.tokens_per_s / most))
        click.echo(f"  {bound.concurrency:>11} {bound.tokens_per_s:>9.0f} {bound.each:>7.0f} {bar}")


def _verdict(plan: Plan, found: Fit) -> str:
    if plan.fits:
        return f"yes: {_size(found.weights_per_card)} of weights a card"
    if plan.alternative is None:
        return f"no: {found.problem}; nothing known is large enough"
    choices = dict.fromkeys(
        fit.hardware.label for fit in (plan.alternative, plan.same_card) if fit is not None
    )
    return f"no: {found.problem}; the smallest that does: {' or '.join(choices)}"


def _room(plan: Plan, found: Fit) -> str:
    at_once = found.sequences(plan.context)
    text = f"{found.kv_tokens} tokens: {at_once} requests of {plan.context} tokens at once"
    if at_once < plan.concurrency:
        text += (
            f"; {plan.concurrency} at once have {plan.context_at_concurrency} tokens each, longer ones wait"
        )
    return text


def _print_bounds(title: str, bounds: tuple[Rate, ...]) -> None:
    if not bounds:
        return
    click.echo(f"\n{title}: (roofline bound, not a measurement)")
    click.echo(f"  {'concurrency':>11} {'context':>8} {'tokens/s':>9} {'each':>7}  limited by")
    for bound in bounds:
        click.echo(
            f"  {bound.concurrency:>11} {bound.context:>8} {bound.tokens_per_s:>9.0f} {bound.each:>7.0f}  "
            f"{bound.limited_by}"
        )
