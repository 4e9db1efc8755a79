"""The schemes: which weights share a scale, what arithmetic makes codes of them, how these are stored.

The stream moves pieces of weights and knows nothing of numbers; a `Scheme` knows nothing of files. Between
them: a weight is cut into rows that hold whole blocks, each slab of rows becomes codes and scales, in the
order in which they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packager.checkpoint.writer import TensorSpec
from packager.layouts import Expected
from packager.quantize.dialects import BLOCK, Quantization
from packager.quantize.fidelity import Figures
from packager.quantize.fp8_block import Quantized, quantize_blocks
from packager.quantize.integers import pack_int4, quantize_integers
from packager.recipe import QuantizeSpec

if TYPE_CHECKING:
    import torch

Arithmetic = Callable[["torch.Tensor"], Quantized]
"""Quantizes blocks [R, r, C, c]; see `Quantized`."""


@dataclass(frozen=True)
class Slab:
    """Rows of a weight after quantization, as they are stored."""

    codes: torch.Tensor
    """[rows, ...]: float8_e4m3fn or int8 [rows, columns]; INT4 packed, uint8 [rows, columns / 2]."""
    scales: torch.Tensor
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
    arithmetic: Arithmetic
    min_snr_db: float
    """The gate unless another is named: well below what bell-shaped weights get, above what bad ones do."""

    def slab(self, rows: torch.Tensor, arithmetic: Arithmetic | None = None) -> Slab | None:
        """Quantize rows [R, K] of any float dtype; R counts from a block's first row.

        Args:
            rows: the weights.
            arithmetic: a compiled form of the scheme's own.

        Returns:
            None if a value is not finite.
        """
        import torch

        count, width = rows.shape
        columns = self.columns or width
        pad = -width % columns, -count % self.rows
        if any(pad):
            rows = torch.nn.functional.pad(rows, (0, pad[0], 0, pad[1]))
        blocks = rows.view(rows.shape[0] // self.rows, self.rows, rows.shape[1] // columns, columns)
        codes, scales, amax, *sums = (arithmetic or self.arithmetic)(blocks)
        largest = amax.numpy()
        if not math.isfinite(float(largest.max())):  # the maximum of anything and NaN is NaN
            return None
        figures = Figures.of_blocks(scales.numpy(), largest, *(part.numpy() for part in sums))
        codes = codes.view(rows.shape)
        if any(pad):
            codes = codes[:count, :width].contiguous()
        if self.quantization.scheme == "int4":
            codes, scales = pack_int4(codes), scales.to(torch.bfloat16)
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

    # Plain functions: Dynamo wraps a `partial`, and then compiles it more often than it needs to.
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
