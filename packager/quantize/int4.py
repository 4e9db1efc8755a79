"""INT4 as compressed-tensors packs it: eight codes an int32, low bits first, code 8 for zero.

Format: `compressed_tensors/compressors/pack_quantized`. `weight_packed` runs along columns; zero points,
where they are stored, are packed along rows instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes [R, B] as codes [R, 2B]; files are little-endian, so a byte's low half comes first."""
    import numpy as np

    return np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(len(packed), -1)


def dequantize_int4(
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zero_points: NDArray[np.int32] | None,
    columns: int,
    group: int,
) -> NDArray[np.float32]:
    """(code - zero point) * scale for some rows of a weight; float32 [R, columns].

    Args:
        packed: the rows' codes, as the bytes of int32 [R, ceil(columns / 8)].
        scales: one a group of columns, [R, ceil(columns / group)]; with group 0 one a row, [R, 1].
        zero_points: int32 [ceil(R / 8), as wide as scales], its first row that of the first row's eight;
            None: all codes are symmetric about 8.
        columns: of the weight.
        group: columns that share a scale; 0: all.
    """
    import numpy as np

    values = _nibbles(packed)[:, :columns].astype(np.float32)
    width = group or columns

    def spread(narrow: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.repeat(narrow, width, axis=1)[:, :columns]

    if zero_points is None:
        values -= 8
    else:
        by_column = np.ascontiguousarray(zero_points.T).view(np.uint8)
        values -= spread(_nibbles(by_column)[:, : len(packed)].T.astype(np.float32))
    values *= spread(scales.astype(np.float32))
    return values
