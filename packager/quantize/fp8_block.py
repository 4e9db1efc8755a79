"""The arithmetic of FP8 (E4M3, largest value 448) with one scale a block, on slabs of rows.

A weight w becomes q = round(w / s), w' = q * s with one scale s a block: amax / 448, or the power of two next
above it. With a power of two the division, the product and a later BF16 cast of w' are exact, and Hopper's
DeepGEMM, which allows no other scales, keeps the bytes as they are. A block is 128x128 weights, or one row.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from packager.quantize.dialects import BLOCK

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Quantized = tuple["torch.Tensor", ...]
"""Codes (float8_e4m3fn, shape of the input), and for each block, in float32: scale, largest |w|, sums of
w**2, (w' - w)**2 and w * (w' - w), largest |w' - w|, number of saturated weights (here: clamped ones)."""

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
"""Smallest normal float32: a scale below it would lose bits itself."""


def block_scales(amax: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """Scales (float32) for the largest absolute values of blocks; an all-zero block gets 1."""
    import torch

    scales = (amax / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        # The next power of two at or above: carry any set mantissa bit into the exponent, clear the mantissa.
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax == 0, torch.ones_like(scales), scales)


def block_max(values: torch.Tensor) -> torch.Tensor:
    """Of [R, r, C, c], the largest value of each block: [R, C]."""
    # Row by row, then over the rows: so Inductor computes codes and figures in one and the same loop.
    return values.amax(dim=3).amax(dim=1)


def block_sum(values: torch.Tensor) -> torch.Tensor:
    """Of [R, r, C, c], the sum of each block: [R, C]."""
    return values.sum(dim=3).sum(dim=1)


def error_sums(wide: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The figures of `Quantized` from sum(w**2) to the largest |w' - w|, for w and w' - w [R, r, C, c]."""
    return (
        block_sum(wide * wide),
        block_sum(error * error),
        block_sum(wide * error),
        block_max(error.abs()),
    )


def quantize_blocks(blocks: torch.Tensor, power_of_two: bool) -> Quantized:
    """Quantize [R, r, C, c] of any float dtype: R x C blocks of r rows and c columns. See `Quantized`.

    The one definition of the arithmetic: run op by op, or fused by `torch.compile` into a single pass. Codes
    and scales are the same bits either way; sums, each over one block only, may differ in the last ones.
    """
    import torch

    wide = blocks.float()
    amax = block_max(wide.abs())
    scales = block_scales(amax, power_of_two)
    spread = scales[:, None, :, None]
    if power_of_two:
        # A power of two at or above amax / 448: nothing lies beyond the largest code. Its reciprocal is
        # exact, and a product costs a tenth of a division.
        codes = (wide * (1.0 / spread)).to(torch.float8_e4m3fn)
        clamped = torch.zeros_like(scales)
    else:
        # Values exceed 448 by the rounding of their scale only; E4M3 has no infinity to overflow to.
        scaled = wide / spread
        codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        clamped = block_sum((scaled.abs() > E4M3_MAX).float())
    error = codes.float() * spread - wide
    return codes, scales, amax, *error_sums(wide, error), clamped


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
