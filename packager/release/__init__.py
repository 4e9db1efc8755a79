"""From a recipe to a published, verified, served bundle: the stages in order, and what they would take."""

from packager.release.plan import DryRun, plan_release
from packager.release.stages import Outcome, release
from packager.release.workspace import Workspace, shipped_recipe

__all__ = ["DryRun", "Outcome", "Workspace", "plan_release", "release", "shipped_recipe"]
