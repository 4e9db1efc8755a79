"""A checkpoint opened and checked: every quantized weight has its scale, in the form its config states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from packager.checkpoint.folder import Folder
from packager.checkpoint.header import TensorInfo
from packager.checkpoint.source import CONFIG_NAME, Checkpoint, TensorReader, numpy_dtype
from packager.errors import BadInput
from packager.layouts import Expected, Model, recognise, require_layout
from packager.quantize.dialects import (
    BLOCK,
    Quantization,
    quantization_of,
    quantized_layout,
    read_quantization,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SLAB_ELEMENTS = 1 << 22
"""Elements dequantized at once; their float32 values take four bytes each."""


@dataclass(frozen=True)
class WeightCheckpoint:
    """A checkpoint of a known architecture, quantized or not, whose tensors fit its config exactly."""

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    model: Model
    quantization: Quantization | None
    layout: list[Expected]
    """Before quantization: one entry a weight, no scales."""
    quantized: dict[str, list[Expected]]
    """Weight -> the tensors that hold it: codes, scale, and for INT4 its shape and zero points."""

    @classmethod
    def open(cls, source: str | Path | Folder) -> Self:
        """Open a directory, or a checkpoint on a hub.

        Raises:
            BadInput: an unknown architecture, tensors that do not fit the config, an unknown scheme.
            UsageProblem, RemoteFailure: as `Checkpoint.open`.
        """
        checkpoint = Checkpoint.open(source)
        raw = checkpoint.config()
        model = recognise(raw, checkpoint.folder.where(CONFIG_NAME))
        quantization = read_quantization(quantization_of(raw))
        found = checkpoint.tensors
        layout = [want for want in model.tensors_in(found) if not want.optional or want.name in found]
        quantized = {}
        stored = layout
        if quantization is not None:
            stored = quantized_layout(layout, quantization)
            quantized = {w.name: quantization.stored(w) for w in layout if quantization.quantizes(w)}
        require_layout(stored, found, checkpoint.name)
        return cls(checkpoint, raw, model, quantization, layout, quantized)

    @classmethod
    def open_quantized(cls, source: str | Path | Folder) -> tuple[Self, Quantization]:
        """Open a checkpoint that must be quantized. Raises as `open`, and BadInput where it is not."""
        opened = cls.open(source)
        if opened.quantization is None:
            raise BadInput(
                f"{opened.checkpoint.name} is not quantized: its config.json has no quantization_config",
                "Give a quantized checkpoint; `packager quantize` makes one.",
            )
        return opened, opened.quantization

    def is_quantized(self, weight: str) -> bool:
        """Whether a weight of the layout is stored as codes with a scale."""
        return weight in self.quantized

    def stored(self, weight: str) -> TensorInfo:
        """The tensor that holds a weight of the layout, or its codes."""
        parts = self.quantized.get(weight)
        return self.checkpoint.tensors[parts[0].name if parts else weight]

    def values(self, reader: TensorReader, weight: str) -> NDArray[np.float32]:
        """A weight as float32 in its own shape, multiplied by its scale where it is quantized.

        Raises:
            BadInput: INT4 codes whose stored shape is another than the config's.
        """
        import numpy as np

        if not self.is_quantized(weight):
            return reader.array(self.checkpoint.tensors[weight]).astype(np.float32)
        return np.concatenate(list(self.slabs(reader, weight)))

    def slabs(self, reader: TensorReader, weight: str) -> Iterator[NDArray[np.float32]]:
        """A weight [N, K] from its first row to its last, some rows [R, K] at a time, as float32.

        A vector [N] is taken for [N, 1], joined experts [E, N, K] for [E * N, K]. The cuts depend on the
        shape alone.

        Raises:
            BadInput: INT4 codes whose stored shape is another than the config's.
        """
        if not self.is_quantized(weight):
            yield from self._stored_slabs(reader, self.checkpoint.tensors[weight])
            return
        assert self.quantization is not None
        codes, scale, *others = (self.checkpoint.tensors[part.name] for part in self.quantized[weight])
        scheme = self.quantization
        columns = codes.shape[1] * (8 if scheme.scheme == "int4" else 1)
        bands = _bands(reader, codes, columns)
        scales, zero_points = reader.array(scale), None
        if scheme.scheme == "int4":
            columns = self._int4_columns(reader, weight, others[0])
            zero_points = None if scheme.symmetric else reader.array(others[1])
        for first, data in bands:
            yield _dequantized(data, first, scales, zero_points, columns, scheme)

    def _stored_slabs(self, reader: TensorReader, info: TensorInfo) -> Iterator[NDArray[np.float32]]:
        import numpy as np

        columns = info.shape[-1] if len(info.shape) > 1 else 1
        for _, data in _bands(reader, info, columns):
            yield data.view(numpy_dtype(info.dtype)).astype(np.float32)

    def scale(self, weight: str) -> TensorInfo:
        """The scale tensor of a quantized weight."""
        return self.checkpoint.tensors[self.quantized[weight][1].name]

    def _int4_columns(self, reader: TensorReader, weight: str, info: TensorInfo) -> int:
        shape, stored = self._shapes[weight], tuple(int(size) for size in reader.array(info))
        if stored != shape:
            raise BadInput(f"{info.name} says {list(stored)}, config.json {list(shape)}")
        return shape[1]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {want.name: want.shape for want in self.layout}

    def scale_names(self) -> set[str]:
        """Names of all tensors beside weights and codes: scales, and for INT4 shapes and zero points."""
        return {part.name for parts in self.quantized.values() for part in parts[1:]}


def _bands(reader: TensorReader, info: TensorInfo, columns: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Some rows at a time of a tensor whose rows hold so many values: the first row, and bytes [R, ...]."""
    rows = prod(info.shape[:-1]) if len(info.shape) > 1 else info.shape[0]
    # Whole blocks, so that no scale is cut in two.
    step = max(_SLAB_ELEMENTS // columns // BLOCK, 1) * BLOCK
    for first in range(0, rows, step):
        last, row_bytes = min(first + step, rows), info.nbytes // rows
        yield first, reader.bytes(info, first * row_bytes, last * row_bytes).reshape(last - first, -1)


def _dequantized(
    data: NDArray[np.uint8],
    first: int,
    scales: NDArray[Any],
    zero_points: NDArray[Any] | None,
    columns: int,
    scheme: Quantization,
) -> NDArray[np.float32]:
    """Rows of codes, the first of which is row `first` of the weight, as float32."""
    import ml_dtypes
    import numpy as np

    from packager.quantize.fp8_block import dequantize_array
    from packager.quantize.int4 import dequantize_int4

    last = first + len(data)
    if scheme.scheme == "int4":
        zeros = None if zero_points is None else zero_points[first // 8 : -(-last // 8)]
        return dequantize_int4(data, scales[first:last], zeros, columns, scheme.group)
    codes = data.view(np.int8 if scheme.scheme == "w8a8" else ml_dtypes.float8_e4m3fn)
    if scheme.scheme != "fp8-block":
        values: NDArray[np.float32] = codes.astype(np.float32)
        values *= scales[first:last].astype(np.float32)
        return values
    return dequantize_array(codes, scales[first // BLOCK : -(-last // BLOCK)])
