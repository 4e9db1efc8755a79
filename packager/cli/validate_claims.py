"""`packager validate claims`: published figures against measurements and what the hardware allows."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packager.cli import options
from packager.cli.measuring import EXISTING_FILE
from packager.cli.sweep_files import read_sweep, sweep_options
from packager.errors import GateFailed

if TYPE_CHECKING:
    from validation.claims import Judged, Measured
    from validation.models import ModelShape

_FAULTS = ("refuted", "impossible")
_WIDTH = 79
_SHOWN = 4
"""Figures of evidence that are printed of a claim."""


@click.command()
@click.argument("claims")
@click.option(
    "--measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML or JSON list of measured figures: {quantity, value, model, baseline, conditions, source}.",
)
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    type=EXISTING_FILE,
    help="Sweep of `validate throughput` (its --out), whose cells are evidence; may be repeated.",
)
@sweep_options
@options.as_json
def claims(
    claims: str,
    measured: Path | None,
    sweeps: tuple[Path, ...],
    on: str | None,
    models: tuple[str, ...],
    as_json: bool,
) -> None:
    """Whether published claims about speed are verified, consistent, unfalsifiable or impossible.

    CLAIMS is a YAML file, or `antangelmed` for the published claims of that model, which come along.

    verified, refuted: measured under the conditions stated, by the whole 95 % interval over the repeats of a
    sweep. inconclusive: measured, but the interval holds the claimed value, or there was one repeat.
    consistent: within what memory, arithmetic and links allow; that is also the most that dummy weights or
    synthetic acceptance can show, and then it is said. unfalsifiable: a condition that decides the figure is
    not stated; it is named. unexplained: a ratio, or a draft's gain, beyond that of the two bounds.
    impossible: beyond the bound. Exits 4 if a claim is refuted or impossible.

    A cell of a sweep has the stated context if its mean cached tokens are within 10 % of it, and the stated
    acceptance length within 5 %. `card: here` in a claim means the machine that the sweep ran on.
    """
    from validation.claims import HERE, judge, load_claims, load_measured

    figures = load_measured(measured) if measured else []
    shapes: dict[str, ModelShape] = {}
    card = None
    if sweeps:
        from validation.claims_sweep import figures_of, models_of

        for path in sweeps:
            sweep = read_sweep(path, on, models)
            figures += figures_of(sweep)
            shapes |= models_of(sweep)
            if sweep.hardware is not None and sweep.hardware.key == HERE:
                card = sweep.hardware.card
    judged = [judge(claim, figures, card=card, models=shapes) for claim in load_claims(claims)]
    if as_json:
        found = [one.model_dump(mode="json") for one in judged]
        click.echo(json.dumps({"kind": "claims", "claims": found}, ensure_ascii=False, indent=2))
    else:
        click.echo("\n\n".join(_block(one) for one in judged))
    wrong = [one.claim.id for one in judged if one.verdict in _FAULTS]
    if wrong:
        raise GateFailed(
            f"{len(wrong)} of {len(judged)} claims do not hold: {', '.join(wrong)}",
            "Correct the claims, or state the conditions under which they were measured.",
        )


def _block(judged: Judged) -> str:
    claim = judged.claim
    verdict = judged.verdict.upper()
    if judged.verdict == "consistent" and judged.mark is not None:
        verdict += f", ON {judged.mark.upper()}:"
    lines = [f"{verdict:<14} {claim.id}: {claim.says}", f"source: {claim.source}"]
    lines += _evidence(judged)
    if judged.missing:
        lines.append(f"not stated: {', '.join(name.replace('_', ' ') for name in judged.missing)}")
    if judged.bound is not None and judged.lowest is not None:
        span = f"{judged.bound:,.4g}"
        if judged.lowest != judged.bound:
            span = f"from {judged.lowest:,.4g} to {judged.bound:,.4g} over what is left open"
        share = judged.share_of_bound or 0.0
        of = "the bound" if judged.lowest == judged.bound else "its upper end"
        claimed = f"claimed {claim.value:g} is {share:.3g} of {of}"
        lines.append(f"bound on {claim.quantity}: {span}; {claimed}")
    lines.append(judged.arithmetic)
    first, *rest = lines
    wrapped = textwrap.wrap(first, _WIDTH, subsequent_indent=" " * 15)
    for line in rest:
        wrapped += textwrap.wrap(line, _WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(wrapped)


def _evidence(judged: Judged) -> list[str]:
    """What was measured, the figures nearest to the claim first, and in how many cells it holds."""
    claim, found = judged.claim, judged.evidence
    if not found:
        return []
    nearest = sorted(found, key=lambda one: abs(one.value / claim.value - 1))
    lines = [_figure(one) for one in nearest[:_SHOWN]]
    if len(found) > 1:
        holds = sum(one.says(claim.value) == "at least" for one in found)
        under = "under what is stated" if judged.missing else "under these conditions"
        lines.append(
            f"{under}: {len(found)} figures, {holds} of them at least {claim.value:g}, interval and all"
        )
    if judged.mark is not None:
        lines.append("figures on dummy weights or with synthetic acceptance decide no claim")
    return lines


def _figure(one: Measured) -> str:
    said = f"measured: {one.value:.4g}"
    if one.low is not None and one.high is not None:
        said += f" (95 % {one.low:.4g} to {one.high:.4g}, {one.repeats} repeats)"
    elif one.repeats is not None:
        said += " (one repeat, no interval)"
    return f"{said}; {one.source}" + (f"; {one.mark}" if one.mark else "")
