"""A block-FP8 checkpoint opened and checked: every weight has its scale, in the dialect its config states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from packager.bailing.config import BailingConfig
from packager.bailing.layout import Expected, Role, expected_tensors, mtp_layers_in, require_layout
from packager.checkpoint.header import TensorInfo
from packager.checkpoint.source import CONFIG_NAME, Checkpoint, TensorReader
from packager.errors import BadInput
from packager.quantize.dialects import Quantization, quantized_layout, read_quantization

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class WeightCheckpoint:
    """A BailingMoeV2 checkpoint, quantized or not, whose tensors fit its config exactly."""

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    config: BailingConfig
    quantization: Quantization | None
    layout: list[Expected]
    """Before quantization: one entry a weight, no scales."""

    @classmethod
    def open(cls, source: Path) -> Self:
        """Open a directory.

        Raises:
            BadInput: not a BailingMoeV2 checkpoint, tensors that do not fit the config, an unknown scheme.
        """
        checkpoint = Checkpoint.open(source)
        raw = checkpoint.config()
        config = BailingConfig.parse(raw, str(checkpoint.path / CONFIG_NAME))
        quantization = read_quantization(config.quantization_config)
        layout = expected_tensors(config, mtp_layers_in(config, checkpoint.tensors))
        stored = quantized_layout(layout, quantization) if quantization else layout
        require_layout(stored, checkpoint.tensors, str(source))
        return cls(checkpoint, raw, config, quantization, layout)

    @classmethod
    def open_quantized(cls, source: Path) -> tuple[Self, Quantization]:
        """Open a directory that must be block FP8. Raises BadInput also where it is not quantized."""
        opened = cls.open(source)
        if opened.quantization is None:
            raise BadInput(f"{source} is not quantized: its config.json has no quantization_config")
        return opened, opened.quantization

    def is_quantized(self, weight: str) -> bool:
        """Whether a weight of the layout is stored as FP8 with a scale."""
        return self.checkpoint.tensors[weight].dtype == "F8_E4M3"

    def values(self, reader: TensorReader, weight: str) -> NDArray[np.float32]:
        """A weight as float32 in its own shape, multiplied by its scale where it is quantized."""
        import numpy as np

        from packager.quantize.fp8_block import dequantize_array

        stored = reader.array(self.checkpoint.tensors[weight])
        if self.quantization is None or not self.is_quantized(weight):
            return stored.astype(np.float32)
        return dequantize_array(stored, reader.array(self.scale(weight)))

    def scale(self, weight: str) -> TensorInfo:
        """The scale tensor of a quantized weight."""
        if self.quantization is None:
            raise KeyError(weight)
        return self.checkpoint.tensors[self.quantization.scale_of(weight)]

    def scale_names(self) -> set[str]:
        """Names of all scale tensors."""
        if self.quantization is None:
            return set()
        stored = quantized_layout(self.layout, self.quantization)
        return {want.name for want in stored if want.role is Role.SCALE}
