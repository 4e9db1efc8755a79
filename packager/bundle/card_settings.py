"""What the card says that is not evidence: the recipe's words and the commands, kept in `bundle.lock`.

With these, the locked manifests and the report, anybody can write the card again and compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from packager.bundle.licensing import Statement
from packager.recipe import CardProse, EvaluationSet, InheritedFigure, Recipe

if TYPE_CHECKING:
    from packager.bundle.serve_profiles import Profile

_WRITTEN_BY = (
    (
        "packager.bundle",
        (
            "card.md.jinja",
            "card_messages.yaml",
            "card.py",
            "card_losses.py",
            "card_parts.py",
            "card_view.py",
            "figures.py",
        ),
    ),
    ("validation.report", ("layout.py",)),
)
"""The files that decide what a card looks like."""


class ServeCommand(BaseModel):
    """How the bundle is served on one kind of hardware, run inside its folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str
    device: str
    shell: str


class CardSettings(BaseModel):
    """The recipe's part of the card, as far as it may be published: no path of the maker's machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    renderer: str
    """Digest of the code and templates that wrote it: the same ones must write the same again."""
    title: str
    description: str
    intended_use: str
    limitations: str
    zh: CardProse
    license: str | None
    license_reason: str
    upstream_licenses: tuple[Statement, ...] | None
    """What the source says of its licence; None: its folder was not at hand."""
    base_model: str | None
    languages: tuple[str, ...]
    tags: tuple[str, ...]
    inherited: tuple[InheritedFigure, ...]
    evaluation_sets: dict[str, EvaluationSet]
    scheme: str
    dialect: str
    scale_rounding: str
    weights: str
    context_length: int
    context_method: str
    min_long_accuracy: float
    draft_tokens: int
    draft_vocabulary: int
    served_name: str
    repository: str | None
    """`org/name` on the Hugging Face hub, where that is the target."""
    address: str
    commands: tuple[ServeCommand, ...]
    """The first is for the hardware that was measured."""
    signer: str | None = None
    """Fingerprint of the key that signs the bundle, or the identity that does; None: nobody."""


def card_settings(
    recipe: Recipe,
    profiles: Sequence[Profile],
    *,
    served_name: str,
    address: str,
    upstream_licenses: Sequence[Statement] | None,
    signer: str | None = None,
) -> CardSettings:
    """The settings of a recipe's card; `profiles` as `serve_profiles.profiles` makes them."""
    spec, target = recipe.bundle, recipe.publish.target
    return CardSettings(
        renderer=renderer_digest(),
        title=spec.title,
        description=spec.description.strip(),
        intended_use=spec.intended_use.strip(),
        limitations=spec.limitations.strip(),
        zh=spec.zh,
        license=spec.license,
        license_reason=spec.license_reason.strip(),
        upstream_licenses=None if upstream_licenses is None else tuple(upstream_licenses),
        base_model=spec.base_model or recipe.source.repo,
        languages=spec.languages,
        tags=spec.tags,
        inherited=spec.inherited,
        evaluation_sets=spec.evaluation_sets,
        scheme=recipe.quantize.scheme,
        dialect=recipe.quantize.dialect,
        scale_rounding=recipe.quantize.scale_rounding,
        weights=recipe.quantize.weights,
        context_length=recipe.context.length,
        context_method=recipe.context.method,
        min_long_accuracy=recipe.gates.min_long_accuracy,
        draft_tokens=recipe.draft.num_speculative_tokens,
        draft_vocabulary=recipe.draft.vocab_size,
        signer=signer,
        served_name=served_name,
        repository=target.removeprefix("hf://") if target.startswith("hf://") else None,
        address=address,
        commands=tuple(ServeCommand(profile=p.name, device=p.device, shell=p.shell) for p in profiles),
    )


@cache
def renderer_digest() -> str:
    """`sha256:<hex>` of the files that write cards here."""
    total = hashlib.sha256()
    for package, names in _WRITTEN_BY:
        for name in names:
            total.update(hashlib.sha256((files(package) / name).read_bytes()).digest())
    return "sha256:" + total.hexdigest()
