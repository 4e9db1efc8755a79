"""A BailingMoeV2 small enough to train on a laptop, and its clinical language."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The trained checkpoint that is shipped with the package."""
