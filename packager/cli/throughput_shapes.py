"""Options of `packager validate throughput` that measure shapes instead of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packager.errors import UsageProblem

if TYPE_CHECKING:
    from validation.sweep import ServedVariant

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SCHEMES = ("bf16", "fp8-block")
_TEMPLATE_TOKENS = 64
"""Room for the chat template around a prompt, and for a draft's last tokens."""


def lengths(
    ctx: click.Context,  # noqa: ARG001 - the calling convention of click
    param: click.Parameter,
    value: str | None,
) -> tuple[float, ...]:
    """Acceptance lengths by commas."""
    try:
        found = tuple(float(part) for part in value.split(",")) if value else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers such as 1.9,2.5", param=param) from None
    if any(length < 1 for length in found):
        raise click.BadParameter("a step yields one token at least", param=param)
    return found


def shape_options() -> list[Decorator]:
    """`--shape` and what goes with it; all parameters begin with `shape` or `baseline_shape`, but one."""
    layers = click.IntRange(min=1)
    return [
        click.option(
            "--shape",
            metavar="NAME|CONFIG.json",
            help="Measure a shape with dummy weights: ling-flash-2.0, seed-oss-36b, or a config.json. "
            "Nothing is downloaded; every output is marked.",
        ),
        click.option("--baseline-shape", metavar="NAME|CONFIG.json", help="The same for the baseline."),
        click.option(
            "--shape-scheme",
            type=click.Choice(SCHEMES),
            default="fp8-block",
            show_default=True,
            help="Precision of --shape; BF16 where this machine has no kernel for the other.",
        ),
        click.option(
            "--baseline-shape-scheme", type=click.Choice(SCHEMES), default="bf16", show_default=True
        ),
        click.option("--shape-layers", type=layers, help="Serve the first N layers of --shape alone."),
        click.option("--baseline-shape-layers", type=layers, help="The same for --baseline-shape."),
        click.option(
            "--shape-tensor-parallel",
            type=layers,
            default=1,
            show_default=True,
            help="GPUs that each shape is split over.",
        ),
        click.option(
            "--shape-draft-vocab", type=layers, help="Tokens of the draft's vocabulary.  [default: 32000]"
        ),
        click.option(
            "--synthetic-acceptance",
            callback=lengths,
            metavar="N,N,…",
            help="Measure --shape also with an untrained draft whose tokens are accepted at random, so that "
            "a step yields so many: 1.9,2.5,3.1. Each is a variant.",
        ),
    ]


def shape_variants(
    options: dict[str, Any],
    cache: Path,
    *,
    input_tokens: Sequence[int],
    output_tokens: Sequence[int],
    draft_tokens: int | None,
    say: Callable[[str], None],
) -> list[ServedVariant]:
    """The variants that these options ask for, the candidate's first; none without --shape.

    Args:
        options: as `shape_options` gives them.
        cache: the shapes' folders and the servers' logs are written here.

    Raises:
        UsageProblem: options without the one that they go with, or an unknown shape.
        BadInput: a config that is not understood.
    """
    if options["shape"] is None and options["synthetic_acceptance"]:
        raise UsageProblem(
            "--synthetic-acceptance goes with --shape",
            "`packager draft breakeven` says what a draft for a checkpoint would have to reach.",
        )
    from packager.release.dummy_weights import dummy_variants

    found: list[ServedVariant] = []
    for prefix, baseline in (("", False), ("baseline_", True)):
        shape = options[f"{prefix}shape"]
        if shape is None:
            if options[f"{prefix}shape_layers"] is not None:
                raise UsageProblem(f"--{prefix.replace('_', '-')}shape-layers goes with a shape")
            continue
        made = dummy_variants(
            shape,
            cache / ("shape-baseline" if baseline else "shape"),
            baseline=baseline,
            synthetic_acceptance=() if baseline else options["synthetic_acceptance"],
            draft_tokens=draft_tokens,
            logs=cache,
            scheme=options[f"{prefix}shape_scheme"],
            layers=options[f"{prefix}shape_layers"],
            draft_vocab=options["shape_draft_vocab"],
            tensor_parallel=options["shape_tensor_parallel"],
            max_model_len=max(input_tokens) + max(output_tokens) + _TEMPLATE_TOKENS,
        )
        taken = {one.variant.name for one in found}
        for one in made:  # the same shape on both sides, in one precision
            clear = f"{one.variant.name} (baseline)" if one.variant.name in taken else one.variant.name
            found.append(replace(one, variant=one.variant.model_copy(update={"name": clear})))
    for note in dict.fromkeys(note for one in found for note in one.variant.notes):
        say(note)
    return found
