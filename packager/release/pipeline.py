"""Stages in order; a sealed one is skipped while its recipe sections and its inputs are the same.

A stage's identity is (digest of the sections it reads, digests of its inputs), and both stand in the manifest
that it seals, so no other record of progress is needed: a workspace that was killed, copied or half deleted
answers for itself. Times are kept apart, in `work/timings.json`, because manifests hold none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
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
    inputs: Callable[[], tuple[str, ...]]
    """Digests of what it reads; its manifest must name every one. Asked only if the folder is sealed."""
    make: Callable[[str], Manifest]
    """Given the digest of the sections: make, or finish, the folder."""
    beside: tuple[str, ...] = ()
    """Patterns of files that lie in the folder without being sealed."""
    finished: Callable[[], bool] = lambda: True
    """Whether what follows the seal (a signature) is done too."""

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
    metrics: dict[str, Any]
    """Its figures: those of the manifest, or of the record that a publication leaves."""


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
        manifest = self.workspace.sealed(stage.folder, stage.beside)
        current = manifest is not None and _current(manifest, stage)
        if manifest is not None and not current:
            self.say(f"{stage.name}: the recipe or an input has changed, making it again")
            self.workspace.discard(stage.folder)
        skipped = current and stage.finished()
        if manifest is None or not skipped:
            with self.timed(stage.name):
                manifest = stage.make(stage.recipe_digest)
            self.workspace.remember_sealed(stage.folder)
        self.add(stage.name, stage.folder, manifest, skipped)
        return manifest

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Say when a stage starts and ends; keep how long it took, if it ends well."""
        self.say(f"{name}: started")
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        timings = self.workspace.read_json("timings.json")
        self.workspace.write_json("timings.json", {**timings, name: round(seconds, 2)})
        self.say(f"{name}: done in {seconds:.1f} s")

    def add(
        self,
        name: str,
        folder: Path,
        manifest: Manifest,
        skipped: bool,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        """Note a stage as done; its metrics are the manifest's unless others are given."""
        seconds = self.workspace.read_json("timings.json").get(name)
        figures = manifest.metrics if metrics is None else metrics
        self.results.append(StageResult(name, folder, manifest, seconds, skipped, figures))


def _current(manifest: Manifest, stage: Stage) -> bool:
    return manifest.recipe_digest == stage.recipe_digest and set(stage.inputs()) <= set(
        manifest.inputs.values()
    )
