"""The release itself: which stages there are, what each reads of the recipe, how each makes its folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.artifact import Manifest, read_manifest
from packager.errors import GateFailed
from packager.recipe import Recipe
from packager.release.answer import FirstAnswer, ask_downloaded
from packager.release.evidence import judge, measure, write_evidence
from packager.release.pipeline import Pipeline, Say, Stage, StageResult, sections_of
from packager.release.variants import Variants
from packager.release.workspace import SourceIdentity, Workspace, locate

if TYPE_CHECKING:
    from packager.draft import Server

STAGES = ("quantize", "extend-context", "draft", "validate", "bundle", "publish")


@dataclass(frozen=True)
class Outcome:
    """A finished release."""

    recipe: Recipe
    workspace: Workspace
    stages: list[StageResult]
    answer: FirstAnswer
    weights_served: str
    """`native`, or `dequantized` on a CPU without FP8 kernels."""

    @property
    def nothing_to_do(self) -> bool:
        """Every stage was done before."""
        return all(stage.skipped for stage in self.stages) and self.answer.kept


def release(recipe: Recipe, root: Path, say: Say) -> Outcome:
    """Run a recipe to its end in the workspace `root`; finished stages are skipped.

    Args:
        recipe: what to release.
        root: workspace folder; made if missing.
        say: called with one line of progress at a time.

    Raises:
        BadInput: source or settings cannot be used; another problem with files.
        GateFailed: a measured figure misses its bound; the evidence is kept, nothing is bundled.
        UsageProblem: another release runs in this workspace.
        IntegrityFailure: a sealed folder was altered.
        RemoteFailure: an engine or hub did not do its part.
    """
    workspace = Workspace(root)
    with workspace.open():
        return _Release(recipe, workspace, locate(recipe.source), say).run()
