"""Tensors on disk or on a hub, never all in memory: safetensors headers, a reader and a shard writer."""

from packager.checkpoint.header import TensorInfo
from packager.checkpoint.source import Checkpoint

__all__ = ["Checkpoint", "TensorInfo"]
