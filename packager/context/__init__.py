"""A longer context through YaRN: one patch for target and draft, and the numbers that it stands for."""

from packager.context.extend import extend
from packager.context.yarn import yarn_patch

__all__ = ["extend", "yarn_patch"]
