"""A longer context through YaRN: one patch for target and draft, and the numbers that it stands for."""

from packager.context.extend import extend, undo
from packager.context.view import trained_view
from packager.context.yarn import undo_patch, yarn_patch

__all__ = ["extend", "trained_view", "undo", "undo_patch", "yarn_patch"]
