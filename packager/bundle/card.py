"""The model card: written from the recipe, the manifests and the evidence, and from nothing else.

Every figure on it stands in `evidence/report.json`. What others have published is labelled as inherited, with
its source; what was not measured is said to be so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.bundle.lock import REPORT_NAME, Lock
from packager.bundle.serve_profiles import HOST, PORT, measured_speculation, profiles, served_name
from packager.errors import BadInput
from packager.recipe import Recipe

if TYPE_CHECKING:
    from validation.gates import Gate
    from validation.longcontext import ContextClaim
    from validation.report import Report

_TAGS = ("bailing_moe_v2", "mixture-of-experts", "yarn", "vllm")
_OUTCOMES = {"pass": "passed", "fail": "FAILED", "not measured": "not measured", "not gated": "no bound set"}
_HUB_LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "gpl-3.0")
"""The identifiers that the hub knows; another licence is `other`, with its name beside it."""


def model_card(recipe: Recipe, lock: Lock, evidence: Path, *, draft: bool, signer: str | None) -> str:
    """The text of README.md: YAML metadata for the hub, then Markdown.

    Args:
        evidence: folder of the sealed evidence.
        signer: fingerprint of the key that will sign the bundle.

    Raises:
        BadInput: the evidence is not a report of this version.
    """
    from huggingface_hub import ModelCard
    from jinja2 import Environment, PackageLoader, StrictUndefined

    report = _read(evidence / REPORT_NAME)
    environment = Environment(
        loader=PackageLoader("packager.bundle", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Markdown, not HTML
    )
    environment.filters |= {"cell": _cell, "points": _points, "bound": _bound, "outcome": _OUTCOMES.get}
    environment.filters["decibels"] = lambda value: "exact" if value is None else f"{value:.2f}"
    measured = measured_speculation(lock.stages["evidence"].manifest.metrics)
    weights = sum(e.size for e in lock.stages["context"].manifest.files if e.path.endswith(".safetensors"))
    body = environment.get_template("card.md.jinja").render(
        recipe=recipe,
        lock=lock,
        report=report,
        rounding=lock.stages["fp8"].manifest.metrics.get("fidelity"),
        draft=draft,
        signer=signer,
        weights=f"{weights / 1e9:.2f} GB" if weights >= 1e9 else f"{weights / 1e6:.2f} MB",
        profiles=profiles(recipe, draft=draft, measured=measured),
        trained_length=lock.trained_length,
        claim=_claim(recipe, report),
        served_name=served_name(recipe),
        address=f"http://{HOST}:{PORT}",
        reports=sorted(p.name for p in evidence.glob("report.*")),
    )
    card = ModelCard(f"---\n{_metadata(recipe, report, draft)}\n---\n\n{body}")
    return str(card).rstrip() + "\n"


def measured_context(recipe: Recipe, evidence: Path) -> ContextClaim:
    """The recipe's context length against what the evidence measured of it.

    Raises:
        BadInput: the evidence is not a report of this version.
    """
    return _claim(recipe, _read(evidence / REPORT_NAME))


def _claim(recipe: Recipe, report: Report) -> ContextClaim:
    from validation.longcontext import context_claim

    return context_claim(recipe.context.length, report.long_context, recipe.gates.min_long_accuracy)


def license_note(recipe: Recipe) -> str:
    """The text of LICENSE-NOTE.md."""
    spec, source = recipe.bundle, recipe.bundle.base_model or recipe.source.repo or recipe.source.path
    if spec.license is None:
        terms = "The licence of these weights has not been decided. Until it is, they may not be passed on."
    else:
        terms = (
            f"These weights, the draft head and the evidence are released under **{spec.license}**, "
            f"as decided in the recipe `{recipe.name}`."
        )
    return (
        f"# Licence\n\n{terms}\n\n"
        f"The weights derive from `{source}`; that model's own terms go on to bind whoever uses them. "
        "The software that made and serves this bundle, moe-packager, is not part of it; it is under "
        "Apache-2.0.\n"
    )


def _read(path: Path) -> Report:
    from validation.errors import MeasurementError
    from validation.report import read_report

    try:
        return read_report(path)
    except MeasurementError as err:
        raise BadInput(err.message, err.remedy or "Validate again.") from None


def _metadata(recipe: Recipe, report: Report, draft: bool) -> str:
    from huggingface_hub import ModelCardData

    spec = recipe.bundle
    fields: dict[str, Any] = {}
    if spec.license is not None:
        known = spec.license.lower() in _HUB_LICENSES
        fields = {"license": spec.license.lower() if known else "other"}
        if not known:
            fields |= {"license_name": spec.license, "license_link": "LICENSE-NOTE.md"}
    base = spec.base_model or recipe.source.repo
    if base:
        fields |= {"base_model": base, "base_model_relation": "quantized"}
    data = ModelCardData(
        language=list(spec.languages),
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=[
            *_TAGS,
            recipe.quantize.weights.lower(),
            *(("eagle3", "speculative-decoding") if draft else ()),
        ],
        model_name=served_name(recipe),
        eval_results=_results(recipe, report) or None,
        **fields,
    )
    return data.to_yaml()


def _results(recipe: Recipe, report: Report) -> list[Any]:
    """Exact match per task of the last accuracy run, the one closest to what users serve."""
    from huggingface_hub import EvalResult

    if not report.accuracy:
        return []
    run = report.accuracy[-1]
    source = None
    if recipe.publish.target.startswith("hf://"):
        repo = recipe.publish.target.removeprefix("hf://")
        source = f"https://huggingface.co/{repo}/blob/main/evidence/{REPORT_NAME}"
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="held-out-items",
            dataset_name=f"{share.name} ({share.n} held-out items)",
            dataset_revision=run.items_digest,
            metric_type="exact_match",
            metric_name=f"exact match, %, {run.label}",
            metric_value=round(100 * share.accuracy, 2),
            source_name="validation report" if source else None,
            source_url=source,
        )
        for share in run.by_task
    ]


def _cell(value: object) -> str:
    """Text that stays within its table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _points(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bound(gate: Gate) -> str:
    if gate.bound is None:
        return "–"
    return f"{gate.comparison} {gate.bound:g} {gate.unit}".strip()
