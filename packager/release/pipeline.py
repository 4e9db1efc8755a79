"""Stages in order; a sealed one is skipped while its recipe sections and its inputs are the same.

A stage's identity is (digest of the sections it reads, digests of its inputs), and both stand in the manifest
that it seals, so no other record of progress is needed: a workspace that was killed, copied or half deleted
answers for itself. Times are kept apart, in `work/timings.json`, because manifests hold none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.artifact import Manifest
from packager.recipe import Recipe
from packager.release.workspace import Workspace

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """One arrow of the release: what it reads and how it makes its folder."""

    name: str
    folder: Path
    sections: dict[str, Any]
    """Recipe values that it reads; their digest is recorded in its manifest."""
    inputs: tuple[str, ...]
    """Digests of what it reads; its manifest must name every one."""
    make: Callable[[str], Manifest]
    """Given the digest of the sections: make, or finish, the folder."""

    @property
    def recipe_digest(self) -> str:
        """`sha256:<hex>` of the sections' canonical JSON."""
        return section_digest(self.sections)


@dataclass(frozen=True)
class StageResult:
    """A stage that is done."""

    name: str
    folder: Path
    manifest: Manifest
    seconds: float | None
    """Time of the run that finished it, if known."""
    skipped: bool
    """It was done already."""


def section_digest(sections: dict[str, Any]) -> str:
    """`sha256:<hex>` of canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(sections, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def sections_of(recipe: Recipe, *names: str) -> dict[str, Any]:
    """Sections of a recipe as plain values, by their names in the file."""
    document = recipe.model_dump(mode="json", by_alias=True)
    return {name: document[name] for name in names}


class Pipeline:
    """Runs stages in one workspace and keeps their results in order."""

    def __init__(self, workspace: Workspace, say: Say) -> None:
        self.workspace, self.say = workspace, say
        self.results: list[StageResult] = []

    def run(self, stage: Stage) -> Manifest:
        """Skip the stage if its folder is sealed for the same sections and inputs, else make it.

        Raises:
            IntegrityFailure: the folder is sealed, but its files are not those that were sealed.
        """
        manifest = self.workspace.sealed(stage.folder)
        skipped = manifest is not None and _current(manifest, stage)
        if manifest is not None and not skipped:
            self.say(f"{stage.name}: the recipe or an input has changed, making it again")
            self.workspace.discard(stage.folder)
        if manifest is None or not skipped:
            self.say(f"{stage.name}: started")
            began = time.monotonic()
            manifest = stage.make(stage.recipe_digest)
            seconds = time.monotonic() - began
            self.workspace.remember_sealed(stage.folder)
            self.workspace.write_json(
                "timings.json", {**self.workspace.read_json("timings.json"), stage.name: round(seconds, 2)}
            )
            self.say(f"{stage.name}: done in {seconds:.1f} s")
        result = StageResult(
            name=stage.name,
            folder=stage.folder,
            manifest=manifest,
            seconds=self.workspace.read_json("timings.json").get(stage.name),
            skipped=skipped,
        )
        self.results.append(result)
        return manifest


def _current(manifest: Manifest, stage: Stage) -> bool:
    return manifest.recipe_digest == stage.recipe_digest and set(stage.inputs) <= set(
        manifest.inputs.values()
    )
