"""The schemes: which weights share a scale, what arithmetic makes codes of them, how these are stored.

The stream moves pieces of weights and knows nothing of numbers; a `Scheme` knows nothing of files. Between
them: a weight is cut into rows that hold whole blocks, each slab of rows becomes codes and scales, in the
order in which they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packager.checkpoint.source import numpy_dtype
from packager.checkpoint.writer import TensorSpec
from packager.layouts import Expected
from packager.quantize.dialects import BLOCK, Quantization
from packager.quantize.fidelity import Figures
from packager.quantize.fp8_block import Quantized, quantize_blocks
from packager.quantize.integers import pack_int4, quantize_integers
from packager.recipe import QuantizeSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Arrays = tuple["NDArray[Any]", ...]
"""A `Quantized` in numpy: codes as bytes, the rest float32."""
Arithmetic = Callable[["NDArray[Any]"], Arrays]
"""Quantizes blocks [R, r, C, c] of bfloat16, float16 or float32."""


@dataclass(frozen=True)
class Slab:
    """Rows of a weight after quantization, as they are stored."""

    codes: NDArray[np.uint8]
    """Float8_e4m3fn or int8 [rows, columns]; INT4 packed [rows, columns / 2]."""
    scales: NDArray[Any]
    """[rows / rows of a block, columns / columns of a block], rounded up, in the stored dtype."""
    figures: Figures


@dataclass(frozen=True)
class Scheme:
    """How weights [N, K] become codes and scales."""

    name: str
    """With the rounding of its scales: for people, and to tell compiled kernels apart."""
    quantization: Quantization
    """How the result is named and stated."""
    rows: int
    """Rows of a block, the weights that share a scale."""
    columns: int | None
    """Columns of a block; None: all."""
    definition: Callable[[torch.Tensor], Quantized]
    """The arithmetic, of blocks [R, r, C, c]."""
    min_snr_db: float
    """The gate unless another is named: well below what bell-shaped weights get, above what bad ones do."""

    def arithmetic(self, blocks: NDArray[Any]) -> Arrays:
        """`definition` run op by op."""
        import numpy as np
        import torch

        if blocks.dtype.name == "bfloat16":  # numpy knows it by name only
            tensor = torch.from_numpy(blocks.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(blocks)
        with torch.no_grad():
            codes, *figures = self.definition(tensor)
        return codes.view(torch.uint8).numpy(), *(figure.numpy() for figure in figures)

    def slab(self, rows: NDArray[Any], arithmetic: Arithmetic | None = None) -> Slab | None:
        """Quantize rows [R, K] of bfloat16, float16 or float32; R counts from a block's first row.

        Args:
            rows: the weights, contiguous.
            arithmetic: a compiled form of the scheme's own.

        Returns:
            None if a value is not finite.
        """
        import numpy as np

        count, width = rows.shape
        columns = self.columns or width
        pad = -count % self.rows, -width % columns
        if any(pad):
            whole = np.zeros((count + pad[0], width + pad[1]), rows.dtype)
            whole[:count, :width] = rows
            rows = whole
        blocks = rows.reshape(rows.shape[0] // self.rows, self.rows, rows.shape[1] // columns, columns)
        codes, scales, amax, *sums = (arithmetic or self.arithmetic)(blocks)
        if not math.isfinite(float(amax.max())):  # the maximum of anything and NaN is NaN
            return None
        figures = Figures.of_blocks(scales, amax, *sums)
        codes = np.ascontiguousarray(codes.reshape(rows.shape)[:count, :width])
        if self.quantization.scheme == "int4":
            codes, scales = pack_int4(codes), scales.astype(numpy_dtype("BF16"))
        return Slab(codes, scales, figures)

    def stored(self, want: Expected) -> tuple[TensorSpec, ...]:
        """The tensors that a weight becomes, in the order of their data: codes, scales, `constants`."""
        return tuple(
            TensorSpec(part.name, part.dtypes[0], part.shape) for part in self.quantization.stored(want)
        )

    def constants(self, shape: tuple[int, ...]) -> bytes:
        """Data of what is stored after the scales: for INT4 the shape of the weight, int64."""
        if self.quantization.scheme != "int4":
            return b""
        return b"".join(size.to_bytes(8, "little") for size in shape)

    def objection(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored so; None: it can."""
        rows, columns = shape
        # Engines map files into memory: what comes after these tensors must be aligned as well.
        if self.quantization.scheme != "int4":
            return "a multiple of 8 elements" if rows * columns % 8 else None
        if columns % self.quantization.group:
            return f"columns in whole groups of {self.quantization.group}"
        return "a multiple of 4 rows" if rows % 4 else None


def scheme_of(spec: QuantizeSpec) -> Scheme:
    """The scheme that a recipe names."""
    name = f"{spec.scheme}, {spec.scale_rounding} scales"
    power_of_two = spec.scale_rounding == "power-of-two"

    def fp8(blocks: torch.Tensor) -> Quantized:
        return quantize_blocks(blocks, power_of_two)

    def int4(blocks: torch.Tensor) -> Quantized:
        return quantize_integers(blocks, 4, True)

    def int8(blocks: torch.Tensor) -> Quantized:
        return quantize_integers(blocks, 8, False)

    if spec.scheme == "fp8-block":
        # FP8 rounding of bell-shaped weights gives about 31.5 dB, with any of these scales.
        return Scheme(name, Quantization(spec.dialect, ()), BLOCK, BLOCK, fp8, 30.0)
    if spec.scheme == "fp8-channel":
        return Scheme(name, Quantization(spec.dialect, (), "fp8-channel"), 1, None, fp8, 30.0)
    if spec.scheme == "w8a8":
        # About 40 dB for bell-shaped rows of thousands; below 30, FP8 would have been the better eight bits.
        return Scheme(name, Quantization(spec.dialect, (), "w8a8"), 1, None, int8, 30.0)
    # About 20 dB for bell-shaped weights, 16 for those with a Laplace distribution's tails.
    return Scheme(name, Quantization(spec.dialect, (), "int4", BLOCK), 1, BLOCK, int4, 15.0)
