"""INT4 and INT8 in NumPy: which code a weight must have, and which scale its group.

As `reference` does for FP8, a code is judged by the interval of quotients weight / scale that round to it: to
the nearest integer, ties to even, and to the last code beyond it. The rule of the scales is that of
compressed-tensors (`calculate_qparams`): a group from -amax to amax spans all codes. INT4 lies eight to an
int32, low bits first, as code + 8 (`pack_quantized`); INT8 is two's complement.
"""

from __future__ import annotations

from functools import cached_property

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from packager.proof.reference import Rounding


class Integers:
    """Symmetric integers of 4 or 8 bits; the methods are those of `reference`."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._half = 1 << (bits - 1)

    @cached_property
    def VALUES(self) -> NDArray[np.float32]:
        """Value of each code as it is stored."""
        stored = np.arange(256)
        if self._bits == 4:
            return (stored % 16 - 8).astype(np.float32)
        return np.where(stored < 128, stored, stored - 256).astype(np.float32)

    @cached_property
    def _bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        values = self.VALUES
        low, high = values - np.float32(0.5), values + np.float32(0.5)
        odd = values % 2 != 0  # a tie belongs to the even neighbour
        low[odd] = np.nextafter(low[odd], np.float32(np.inf))
        high[odd] = np.nextafter(high[odd], np.float32(-np.inf))
        low[values == -self._half] = -np.inf
        high[values == self._half - 1] = np.inf
        return low, high

    def unpacked(self, data: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
        """Bytes of some rows as one code a byte [R, width]."""
        if self._bits == 8:
            return data.reshape(-1, width)
        nibbles = np.empty((data.size, 2), np.uint8)
        nibbles[:, 0] = data & 15
        nibbles[:, 1] = data >> 4
        return nibbles.reshape(-1, -(-width // 8) * 8)[:, :width]

    def wrong_codes(
        self, weights: NDArray[np.float32], scales: NDArray[np.float32], codes: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Where `codes` are not weights / scales rounded to nearest even; all [R, K], `scales` broadcast."""
        quotients = weights / scales
        low, high = self._bounds
        right = low[codes] <= quotients
        right &= quotients <= high[codes]
        return ~right

    def nearest_codes(self, weights: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The codes that `wrong_codes` would accept, as they are stored; to say what was expected."""
        nearest = np.clip(np.rint(np.asarray(weights / scales, np.float64)), -self._half, self._half - 1)
        return ((nearest.astype(np.int64) + (8 if self._bits == 4 else 0)) & 255).astype(np.uint8)

    def expected_scales(
        self, largest: NDArray[np.float32], _rounding: Rounding, dtype: str
    ) -> NDArray[np.float32]:
        """The scales of groups with these largest absolute values, rounded to the stored dtype.

        largest / 7.5 or / 127.5, never below 2**-126; a group of zeros has scale 1.
        """
        scales = np.maximum(largest / np.float32(self._half - 0.5), np.float32(2.0**-126))
        scales = np.where(largest == 0, np.float32(1), scales)
        stored = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[dtype]
        return scales.astype(stored).astype(np.float32)

    def relative_errors(
        self,
        differences: NDArray[np.float32],
        _weights: NDArray[np.float32],
        scales: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Absolute differences over the largest weight of the group; at most 1/15 or 1/255, and a little for
        the rounding of the scale."""
        return differences / (scales * np.float32(self._half - 0.5))
