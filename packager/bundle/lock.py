"""`bundle.lock`: the chain of artifacts from the source to the bundle, with every manifest in full.

An artifact's digest is the SHA-256 of its manifest, and a manifest names the digests it was made from. So the
lock alone, without the stages' folders, proves which source the weights come from, through which steps, and
that the evidence was taken from these very artifacts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from packager.artifact import FileEntry, Manifest, read_manifest
from packager.artifact.strict_json import strict_json
from packager.bundle.card_settings import CardSettings
from packager.errors import BadInput, IntegrityFailure
from packager.quantize.fidelity import LEDGER_NAME
from packager.quantize.plot import PLOT_NAME
from packager.recipe import Recipe

LOCK_NAME = "bundle.lock"
REPORT_NAME = "report.json"
STAGES = ("fp8", "context", "draft", "evidence")
"""In order; each is made from the ones named in `_MADE_FROM`."""
_PLACES: tuple[tuple[str, str, frozenset[str] | None], ...] = (
    ("context", "", None),
    ("draft", "draft/", None),
    ("evidence", "evidence/", None),
    ("fp8", "evidence/", frozenset({LEDGER_NAME, PLOT_NAME})),
)
"""Stage, folder of the bundle, and which of the stage's files go there (None: all)."""
_MADE_FROM = {"context": ("fp8",), "draft": ("context",), "evidence": ("context", "draft")}


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedSource(_Document):
    """The checkpoint that everything was made from."""

    name: str
    """Hub repository, `package:…`, or the last part of a directory's path."""
    revision: str | None
    digest: str


class LockedStage(_Document):
    """One sealed artifact."""

    digest: str
    manifest: Manifest


class GateState(_Document):
    """What the evidence says about the bounds that the recipe named."""

    outcome: Literal["pass", "fail", "not measured"]
    failed: list[str] = []
    not_measured: list[str] = []
    override: str | None = None
    """Why it is published all the same; the card shows it."""

    @property
    def publishable(self) -> bool:
        """Passed, or overridden with a recorded reason."""
        return self.outcome == "pass" or bool(self.override)


class Lock(_Document):
    """The whole document."""

    schema_version: int = 1
    recipe: str
    recipe_digest: str
    license: str | None
    source: LockedSource
    stages: dict[str, LockedStage]
    gates: GateState
    card: CardSettings | None = None
    """What the card says beside the evidence; every bundle has it."""

    def files(self) -> Iterator[tuple[str, str, FileEntry]]:
        """Path in the bundle, stage, and manifest entry of every file that a stage brings."""
        for stage, prefix, names in _PLACES:
            if stage in self.stages:
                for entry in self.stages[stage].manifest.files:
                    if names is None or entry.path in names:
                        yield prefix + entry.path, stage, entry

    @property
    def trained_length(self) -> int | None:
        """Tokens that the model was trained to, as the context stage found it."""
        found = self.stages["context"].manifest.metrics.get("original_length")
        return int(found) if found else None

    def dumps(self) -> str:
        """The file's text."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def build_lock(recipe: Recipe, folders: dict[str, Path], override: str | None) -> Lock:
    """Lock sealed stage folders, keyed by names of `STAGES` (the draft may be absent).

    Raises:
        BadInput: a folder is not sealed, the evidence has no report, or the chain does not hold: a stage was
            made from another artifact than the one given.
    """
    manifests = {name: read_manifest(folders[name]) for name in STAGES if name in folders}
    missing = [name for name in ("fp8", "context", "evidence") if name not in manifests]
    if missing:
        raise BadInput(f"no {' and no '.join(missing)} folder to bundle")
    source = manifests["fp8"].inputs.get("source")
    if source is None:
        raise BadInput(f"{folders['fp8']} does not name the source it was made from", "Quantize it again.")
    spec = recipe.source
    name = spec.repo or (spec.path if str(spec.path).startswith("package:") else Path(str(spec.path)).name)
    lock = Lock(
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        license=recipe.bundle.license,
        source=LockedSource(name=str(name), revision=spec.revision, digest=source),
        stages={key: LockedStage(digest=m.digest, manifest=m) for key, m in manifests.items()},
        gates=gate_state(folders["evidence"] / REPORT_NAME, override),
    )
    problems = chain_problems(lock)
    if problems:
        raise BadInput("; ".join(problems), "Run the release again: it remakes what is out of date.")
    return lock


def gate_state(report: Path, override: str | None = None) -> GateState:
    """The gates of a validation report.

    Raises:
        BadInput: no report, or none of this kind.
    """
    document = _report(report)
    try:
        by_outcome: dict[str, list[str]] = {}
        for gate in document["gates"]:
            by_outcome.setdefault(str(gate["outcome"]), []).append(str(gate["name"]))
        return GateState(
            outcome=document["outcome"],
            failed=by_outcome.get("fail", []),
            not_measured=by_outcome.get("not measured", []),
            override=override or None,
        )
    except (KeyError, TypeError, ValidationError) as err:
        raise BadInput(f"{report} is not a validation report: {err}") from None


def unmeasured_stages(report: Path, lock: Lock) -> list[str]:
    """Stages of what is served (weights, draft) whose digest none of the report's subjects holds.

    A subject's digest may join several artifacts and say how they were served, so it is searched.
    """
    subjects = [str(subject.get("digest")) for subject in _report(report).get("subjects", [])]
    served = [name for name in ("context", "draft") if name in lock.stages]
    return [name for name in served if not any(lock.stages[name].digest in s for s in subjects)]


def _report(path: Path) -> dict[str, Any]:
    try:
        document = strict_json(path.read_bytes())
    except OSError:
        raise BadInput(f"no validation report at {path}", "Validate before bundling.") from None
    except ValueError as err:
        raise BadInput(f"{path} is not JSON: {err}") from None
    if not isinstance(document, dict):
        raise BadInput(f"{path} is not a validation report")
    return document


def read_lock(bundle: Path) -> Lock:
    """Read a bundle's lock.

    Raises:
        IntegrityFailure: missing or malformed.
    """
    try:
        return Lock.model_validate_json((bundle / LOCK_NAME).read_bytes())
    except OSError:
        raise IntegrityFailure(
            f"{bundle} has no {LOCK_NAME}: it is not a bundle", "Get the bundle again from its publisher."
        ) from None
    except ValidationError as err:
        first = err.errors()[0]
        raise IntegrityFailure(
            f"{bundle / LOCK_NAME} is malformed: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            "Get the bundle again from its publisher.",
        ) from None


def chain_problems(lock: Lock) -> list[str]:
    """What is wrong with the chain, one sentence each; empty: it holds."""
    problems = [
        f"{LOCK_NAME}: the digest of {name} does not follow from its manifest"
        for name, stage in lock.stages.items()
        if stage.manifest.digest != stage.digest
    ]
    unknown = [name for name in lock.stages if name not in STAGES]
    problems += [f"{LOCK_NAME}: unknown stage {name}" for name in unknown]
    for needed in ("fp8", "context", "evidence"):
        if needed not in lock.stages:
            return [*problems, f"{LOCK_NAME}: no {needed}"]
    if lock.source.digest not in lock.stages["fp8"].manifest.inputs.values():
        problems.append(f"{LOCK_NAME}: fp8 was not made from the source that is named")
    for name, origins in _MADE_FROM.items():
        if name not in lock.stages:
            continue
        inputs = set(lock.stages[name].manifest.inputs.values())
        for origin in origins:
            if origin in lock.stages and lock.stages[origin].digest not in inputs:
                problems.append(f"{LOCK_NAME}: {name} was not made from the {origin} that is locked")
    return problems
