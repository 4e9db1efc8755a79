"""`provenance.json`: an in-toto statement, with SLSA provenance, of how a bundle's files were made.

in-toto Statement v1 (github.com/in-toto/attestation, spec/v1) around the SLSA predicate v1
(slsa.dev/provenance/v1). It lies inside the bundle, where `model.sig` covers it as every other file: whoever
checks the signature has checked the statement. Its subjects are all files but itself, the manifest, which
names it, and the signature.

buildType `urn:moe-packager:release:v1`: `packager release` or `packager bundle`.
- externalParameters: `recipe`, every setting, absolute paths cut to their last part, servers' addresses left
  out, since neither may be published; `recipeDigest`, of the recipe as it was; `override`, if there is one.
- internalParameters: the digests of the sealed stages' recipe sections.
- resolvedDependencies: the source (at its revision, with the digest that the quantization read), then each
  stage's sealed artifact by the digest of its manifest; `bundle.lock` holds those manifests in full.

The builder is named by the CI job's own environment where there is one. So the statement claims no more than
that job or person does: it is level 1 of SLSA's build track, not an attestation by a platform.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from packager import __version__
from packager.artifact import FileEntry
from packager.bundle.lock import Lock
from packager.recipe import Recipe

PROVENANCE_NAME = "provenance.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:moe-packager:release:v1"
LOCAL_BUILDER = "urn:moe-packager:builder:local"
"""No CI job: somebody's own machine, of which nothing is told."""


def provenance(
    recipe: Recipe,
    lock: Lock,
    files: Iterable[FileEntry],
    environment: Mapping[str, str] | None = None,
) -> str:
    """The statement's text.

    Args:
        files: the subjects.
        environment: where GITHUB_* variables are looked for; None: this process's.
    """
    run = _run_details(os.environ if environment is None else environment)
    external: dict[str, Any] = {
        "recipe": _publishable(recipe.model_dump(mode="json", by_alias=True)),
        "recipeDigest": lock.recipe_digest,
    }
    if lock.gates.override:
        external["override"] = lock.gates.override
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": entry.path, "digest": {"sha256": entry.sha256}}
            for entry in sorted(files, key=lambda entry: entry.path)
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": external,
                "internalParameters": {
                    name: {"sectionDigest": stage.manifest.recipe_digest}
                    for name, stage in lock.stages.items()
                },
                "resolvedDependencies": [_source(recipe, lock), *_stages(lock)],
            },
            "runDetails": run,
        },
    }
    return json.dumps(statement, indent=1, ensure_ascii=False) + "\n"


def subjects(document: Any) -> dict[str, str]:
    """Path to SHA-256 of a statement's subjects. Raises ValueError: not one of this kind."""
    try:
        if (document["_type"], document["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
            raise ValueError("of another type")
        return {one["name"]: one["digest"]["sha256"] for one in document["subject"]}
    except (KeyError, TypeError, ValueError) as err:
        raise ValueError(f"no provenance statement: {err!r}") from None


def _publishable(value: Any, key: str = "") -> Any:
    """A recipe's settings without places of the machine or network that it was run on."""
    if isinstance(value, dict):
        return {name: _publishable(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_publishable(one, key) for one in value]
    if not isinstance(value, str):
        return value
    if key.endswith("_url"):
        return "not published"
    scheme, colon, path = value.rpartition(":")  # `dir:/somewhere` is a target
    if PurePath(path).is_absolute() and not path.startswith("//"):
        return f"{scheme}{colon}{PurePath(path).name}"
    return value


def _source(recipe: Recipe, lock: Lock) -> dict[str, Any]:
    kind, _, digest = lock.source.digest.partition(":")
    found: dict[str, Any] = {"name": lock.source.name}
    digests = {kind: digest}
    if recipe.source.repo:
        found["uri"] = f"https://huggingface.co/{recipe.source.repo}"
        if lock.source.revision:
            found["uri"] += f"/tree/{lock.source.revision}"
            digests["gitCommit"] = lock.source.revision
    return found | {"digest": digests}


def _stages(lock: Lock) -> list[dict[str, Any]]:
    found = []
    for name, stage in lock.stages.items():
        inputs = dict(sorted(stage.manifest.inputs.items()))
        found.append(
            {
                "name": name,
                "digest": {"sha256": stage.digest.removeprefix("sha256:")},
                "annotations": {"inputs": inputs, "tools": dict(sorted(stage.manifest.tools.items()))},
            }
        )
    return found


def _run_details(environment: Mapping[str, str]) -> dict[str, Any]:
    """Who ran it. GitHub's variables are those of docs.github.com, "Store information in variables"."""
    version = {"moe-packager": __version__}
    server, workflow = environment.get("GITHUB_SERVER_URL"), environment.get("GITHUB_WORKFLOW_REF")
    if environment.get("GITHUB_ACTIONS") != "true" or not server or not workflow:
        return {"builder": {"id": LOCAL_BUILDER, "version": version}}
    details: dict[str, Any] = {"builder": {"id": f"{server}/{workflow}", "version": version}}
    repository, run = environment.get("GITHUB_REPOSITORY"), environment.get("GITHUB_RUN_ID")
    if repository and run:
        attempt = environment.get("GITHUB_RUN_ATTEMPT", "1")
        invocation = f"{server}/{repository}/actions/runs/{run}/attempts/{attempt}"
        details["metadata"] = {"invocationId": invocation}
    if repository and environment.get("GITHUB_SHA"):
        details["builder"]["builderDependencies"] = [
            {
                "uri": f"git+{server}/{repository}@{environment.get('GITHUB_REF', '')}",
                "digest": {"gitCommit": environment["GITHUB_SHA"]},
            }
        ]
    return details
