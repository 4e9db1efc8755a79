"""FP8 E4M3 in NumPy: which code a weight must have, and which scale its block.

A code is judged by the interval of quotients that round to it, to nearest with ties to the even code, so no
cast of any library decides what is right. The quotient weight / scale is taken in float32, correctly rounded,
as IEEE 754 defines it and every implementation computes it. E4M3 here is `float8_e4m3fn`: largest value 448,
no infinity, 0x7F and 0xFF are NaN (Micikevicius et al., "FP8 Formats for Deep Learning", 2022).
"""

from __future__ import annotations

from typing import Literal, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Rounding = Literal["float32", "power-of-two", "bfloat16"]
LARGEST = 448.0
SMALLEST_NORMAL = 2.0**-6
"""Below it E4M3 has a fixed step, so relative errors mean little."""


class Arithmetic(Protocol):
    """What this module does for FP8, and `integers.Integers` for the others."""

    @property
    def VALUES(self) -> NDArray[np.float32]: ...

    def unpacked(self, data: NDArray[np.uint8], width: int, /) -> NDArray[np.uint8]: ...

    def wrong_codes(
        self, weights: NDArray[np.float32], scales: NDArray[np.float32], codes: NDArray[np.uint8], /
    ) -> NDArray[np.bool_]: ...

    def nearest_codes(
        self, weights: NDArray[np.float32], scales: NDArray[np.float32], /
    ) -> NDArray[np.uint8]: ...

    def expected_scales(
        self, largest: NDArray[np.float32], rounding: Rounding, dtype: str, /
    ) -> NDArray[np.float32]: ...

    def relative_errors(
        self,
        differences: NDArray[np.float32],
        weights: NDArray[np.float32],
        scales: NDArray[np.float32],
        /,
    ) -> NDArray[np.float32]: ...


def _value(code: int) -> float:
    """Of a code 0x00 to 0x7E: 4 bits of exponent (bias 7), 3 of mantissa; subnormals at exponent 0."""
    exponent, mantissa = code >> 3, code & 7
    return float((8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9)


def _tables() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    magnitudes = np.array([_value(code) for code in range(127)], np.float32)
    between = (magnitudes[:-1] + magnitudes[1:]) / np.float32(2)
    low = np.concatenate([[np.float32(0)], between])
    high = np.concatenate([between, [np.float32(np.inf)]])  # what is too large is set to 448
    odd = np.arange(127) % 2 == 1  # a tie belongs to the even neighbour
    low[odd] = np.nextafter(low[odd], np.float32(np.inf))
    high[odd] = np.nextafter(high[odd], np.float32(0))
    nothing = np.array([np.inf], np.float32), np.array([-1], np.float32)
    values = np.concatenate([magnitudes, [np.float32(np.nan)]])
    return (
        np.concatenate([values, -values]),
        np.tile(np.concatenate([low, nothing[0]]), 2).astype(np.float32),
        np.tile(np.concatenate([high, nothing[1]]), 2).astype(np.float32),
    )


VALUES, _LOW, _HIGH = _tables()
"""Value of each of the 256 codes; least and greatest absolute float32 quotient that rounds to it."""


def wrong_codes(
    weights: NDArray[np.float32], scales: NDArray[np.float32], codes: NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """Where `codes` are not weights / scales rounded to nearest even; all [R, K], `scales` broadcast."""
    quotients = np.abs(weights) / scales
    right = _LOW[codes] <= quotients
    right &= quotients <= _HIGH[codes]
    right &= np.signbit(weights) == (codes >= 0x80)
    return ~right


def nearest_codes(weights: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The codes that `wrong_codes` would accept, through the cast of ml_dtypes; to say what was expected."""
    quotients = np.clip(weights / scales, -LARGEST, LARGEST).astype(np.float32)
    return quotients.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def relative_errors(
    differences: NDArray[np.float32], weights: NDArray[np.float32], scales: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Absolute differences over the weights, 0 where these are no normal numbers of E4M3; in place."""
    absolute = np.abs(weights)
    np.divide(differences, absolute, out=differences)
    differences[absolute < scales * np.float32(SMALLEST_NORMAL)] = 0
    return differences


def unpacked(data: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Bytes of some rows as one code a byte [R, width]."""
    return data.reshape(-1, width)


def largest_in_blocks(band: NDArray[np.float32], columns: int | None, *, whole: bool) -> NDArray[np.float32]:
    """Largest absolute values of a band [R, K], in the shape of its scales.

    Args:
        band: rows.
        columns: that share a scale: [..., ceil(K/columns)]; None: all, [..., 1].
        whole: all rows share scales, [1, ...]; else each has its own, [R, ...].
    """
    absolute = np.abs(band)
    if whole:
        absolute = absolute.max(axis=0, keepdims=True)
    if columns is None:
        rows: NDArray[np.float32] = absolute.max(axis=1, keepdims=True)
        return rows
    widest: NDArray[np.float32] = np.maximum.reduceat(absolute, np.arange(0, band.shape[1], columns), axis=1)
    return widest


def expected_scales(largest: NDArray[np.float32], rounding: Rounding, dtype: str) -> NDArray[np.float32]:
    """The scales of blocks with these largest absolute values, rounded to the stored dtype (F32 or BF16).

    float32: largest / 448. power-of-two: the smallest 2**n with largest <= 448 * 2**n. Never below 2**-126,
    the smallest normal float32; a block of zeros has scale 1.
    """
    if rounding == "power-of-two":
        fraction, exponent = np.frexp(largest)  # largest = fraction * 2**exponent, 448 = 0.875 * 2**9
        exponent = exponent - 9 + (fraction > 0.875)
        scales = np.ldexp(np.float32(1), np.maximum(exponent, -126))
    else:
        scales = np.maximum(largest / np.float32(LARGEST), np.float32(2.0**-126))
    scales = np.where(largest == 0, np.float32(1), scales).astype(np.float32)
    if dtype == "BF16":
        scales = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
    return scales


def powers_of_two(scales: NDArray[np.float32]) -> int:
    """How many of the scales are powers of two."""
    return int(np.count_nonzero(np.frexp(scales)[0] == 0.5))


def widen(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Bytes of BF16, F16 or F32 as float32, exactly; flat."""
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view({"F16": "<f2", "F32": "<f4"}[dtype]).astype(np.float32)
