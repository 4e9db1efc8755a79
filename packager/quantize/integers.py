"""The arithmetic of symmetric integers, INT4 and INT8, rounded to nearest on slabs of rows.

A weight w becomes q = round(w / s) within [-2**(b-1), 2**(b-1) - 1], w' = q * s, with one scale s a group of
columns of a row, or a row: s = amax / (2**b - 1) * 2, so the group spans all codes. That is the rule of
compressed-tensors (`calculate_qparams`, `quantize`) in float32; run on BF16 tensors, theirs rounds the
quotient to BF16 first, which moves some of the codes to the second nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from packager.quantize.fp8_block import SMALLEST_SCALE, Quantized, block_max, block_sum, error_sums

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


def bfloat16_values(positive: torch.Tensor) -> torch.Tensor:
    """Float32 numbers, positive and normal, rounded to the nearest that BF16 has, ties to even.

    On bits: a compiler may take two casts in a row for none.
    """
    import torch

    bits = positive.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def quantize_integers(blocks: torch.Tensor, bits: int, bfloat16_scales: bool) -> Quantized:
    """Quantize [R, r, C, c] of any float dtype: R x C blocks of r rows and c columns. See `Quantized`.

    Codes are int8, whatever `bits`; the last figure counts those at either end of the range. The one
    definition of the arithmetic, as `fp8_block.quantize_blocks` is of FP8's.
    """
    import torch

    wide = blocks.float()
    amax = block_max(wide.abs())
    scales = (amax / ((2**bits - 1) / 2)).clamp(min=SMALLEST_SCALE)
    if bfloat16_scales:
        scales = bfloat16_values(scales)
    scales = torch.where(amax == 0, torch.ones_like(scales), scales)
    spread = scales[:, None, :, None]
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = (wide / spread).clamp(lowest, highest).round()
    error = values * spread - wide
    ends = (values == lowest) | (values == highest)
    return values.to(torch.int8), scales, amax, *error_sums(wide, error), block_sum(ends.float())


def pack_int4(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes -8 to 7 (int8, as bytes [R, K], K a multiple of 8) as the bytes of int32 [R, K/8]: [R, K/2].

    Eight an int32, low bits first, code + 8; see `int4`.
    """
    import numpy as np

    pairs = (codes + np.uint8(8)).view(np.uint16)  # little-endian: the even column in the low byte
    pairs |= pairs >> 4
    return pairs.astype(np.uint8)  # the low byte
