"""`packager validate claims`: published figures against measurements and what the hardware allows."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packager.cli import options
from packager.errors import GateFailed

if TYPE_CHECKING:
    from validation.claims import Judged

_FAULTS = ("refuted", "impossible")
_WIDTH = 79


@click.command()
@click.argument("claims")
@click.option(
    "--measured",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="YAML or JSON list of measured figures: {quantity, value, model, baseline, conditions, source}.",
)
@options.as_json
def claims(claims: str, measured: Path | None, as_json: bool) -> None:
    """Whether published claims about speed are verified, consistent, unfalsifiable or impossible.

    CLAIMS is a YAML file, or `antangelmed` for the published claims of that model, which come along.

    verified, refuted: measured under the conditions stated. consistent: within what memory, arithmetic and
    links allow. unfalsifiable: a condition that decides the figure is not stated; it is named. unexplained: a
    ratio beyond that of the two bounds. impossible: beyond the bound. Exits 4 if a claim is refuted or
    impossible.
    """
    from validation.claims import judge, load_claims, load_measured

    figures = load_measured(measured) if measured else []
    judged = [judge(claim, figures) for claim in load_claims(claims)]
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
    lines = [f"{judged.verdict.upper():<14} {claim.id}: {claim.says}", f"source: {claim.source}"]
    if judged.measured is not None:
        lines.append(f"measured: {judged.measured:.4g}")
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
