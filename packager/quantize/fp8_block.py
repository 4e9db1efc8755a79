"""The arithmetic of 128x128 block FP8 (E4M3, largest value 448), on slabs of rows.

A weight w becomes q = round(w / s), w' = q * s with one scale s a block: amax / 448, or the power of two next
above it. With a power of two the division, the product and a later BF16 cast of w' are exact, and Hopper's
DeepGEMM, which allows no other scales, keeps the bytes as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from packager.quantize.dialects import BLOCK

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

E4M3_MAX = 448.0
_SMALLEST = 2.0**-126
"""Smallest normal float32: a scale below it would lose bits itself."""


@dataclass(frozen=True)
class QuantizedSlab:
    """Rows of a weight after quantization."""

    codes: torch.Tensor
    """float8_e4m3fn [rows, columns]."""
    scales: torch.Tensor
    """float32 [ceil(rows/128), ceil(columns/128)]."""
    signal: float
    """Sum of w**2."""
    error: float
    """Sum of (w - w')**2."""


def block_scales(amax: torch.Tensor, rounding: Literal["float32", "power-of-two"]) -> torch.Tensor:
    """Scales (float32) for the largest absolute values of blocks; an all-zero block gets 1."""
    import torch

    scales = (amax / E4M3_MAX).clamp(min=_SMALLEST)
    if rounding == "power-of-two":
        mantissa, exponent = torch.frexp(scales)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # already a power of two
        scales = torch.ldexp(torch.ones_like(scales), exponent)
    return torch.where(amax == 0, torch.ones_like(scales), scales)


def quantize_slab(rows: torch.Tensor, rounding: Literal["float32", "power-of-two"]) -> QuantizedSlab | None:
    """Quantize rows [R, K] of any float dtype; R counts from a block's first row.

    Returns None if a value is not finite.
    """
    import torch

    count, width = rows.shape
    wide = rows.float()
    pad = (-width % BLOCK, -count % BLOCK)
    if any(pad):
        wide = torch.nn.functional.pad(wide, (0, pad[0], 0, pad[1]))
    blocks = wide.view(wide.shape[0] // BLOCK, BLOCK, wide.shape[1] // BLOCK, BLOCK)
    amax = blocks.abs().amax(dim=(1, 3))
    if not bool(torch.isfinite(amax).all()):
        return None
    scales = block_scales(amax, rounding)
    spread = scales[:, None, :, None]
    # Scaled values exceed 448 only by rounding of a float32 scale; E4M3 has no infinity to overflow to.
    codes = (blocks / spread).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    error = _sum_of_squares(codes.float().mul_(spread).sub_(blocks))
    signal = _sum_of_squares(blocks)
    codes = codes.view(wide.shape)[:count, :width].contiguous()
    return QuantizedSlab(codes, scales, signal, error)


def _sum_of_squares(blocks: torch.Tensor) -> float:
    """Float32 along the 128 columns of a block, float64 from there on: fast, and exact to about 1e-7."""
    import torch

    return float(blocks.square().sum(dim=-1).sum(dtype=torch.float64))


@cache
def _e4m3_values() -> NDArray[np.float32]:
    import ml_dtypes
    import numpy as np

    values: NDArray[np.float32] = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype("f4")
    return values


def dequantize_array(codes: NDArray[Any], scales: NDArray[Any]) -> NDArray[np.float32]:
    """Multiply E4M3 codes [N, K] by their block scales [ceil(N/128), ceil(K/128)]; float32 [N, K]."""
    import numpy as np

    rows, columns = codes.shape
    wide = _e4m3_values()[codes.view(np.uint8)]
    spread = np.repeat(scales.astype(np.float32), BLOCK, axis=1)[:, :columns]
    for block, factors in enumerate(spread):
        wide[block * BLOCK : min((block + 1) * BLOCK, rows)] *= factors
    return wide
