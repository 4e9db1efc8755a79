"""Two checkpoints of one model, weight by weight, after dequantization; and their scales."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.checkpoint.folder import Folder
from packager.checkpoint.source import TensorReader, open_folder
from packager.layouts import Expected
from packager.quantize.fidelity import TensorFidelity, by_layer, by_role, decibels
from packager.quantize.quantized import WeightCheckpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TensorDifference:
    """A weight whose values differ."""

    name: str
    role: str
    snr_db: float | None
    """10 log10(sum a^2 / sum (a-b)^2) in dB; None where that is not finite."""
    max_abs: float | None
    """Largest absolute difference; None where that is not finite."""
    dtypes: tuple[str, str]
    """As stored in the two."""
    elements: int
    """How many elements differ."""
    first: tuple[int, ...]
    """Position of the first of them."""


@dataclass
class ScaleComparison:
    """Scales of the weights that are quantized in both, whatever they are called."""

    compared: int = 0
    differing: int = 0
    weights: int = 0
    """Weights with a scale that differs."""
    largest_ratio: float | None = None
    """Of two scales of one block, the larger by the smaller; None if none differs, or one is not positive."""
    where: str = ""
    """The weight and block of that ratio, or of the first difference."""


@dataclass(frozen=True)
class Comparison:
    """Result of `diff`."""

    identical: int
    """Weights whose values are equal, element by element, after dequantization."""
    differing: list[TensorDifference]
    """Worst first."""
    only_first: list[str]
    only_second: list[str]
    misshapen: list[str]
    """In both, with different shapes."""
    roles: dict[str, Any]
    """Role -> SNR over its differing weights (see `fidelity.by_role`)."""
    layers: dict[str, Any]
    """The same by layer number; what belongs to no layer is left out."""
    scales: ScaleComparison

    @property
    def equal(self) -> bool:
        """Whether the two hold the same values under the same names."""
        return not (self.differing or self.only_first or self.only_second or self.misshapen)


@dataclass
class _Ledger:
    """What the comparison adds up to."""

    identical: int = 0
    differing: list[TensorDifference] = field(default_factory=list)
    finite: list[TensorFidelity] = field(default_factory=list)
    scales: ScaleComparison = field(default_factory=ScaleComparison)


def diff(first: str | Path | Folder, second: str | Path | Folder) -> Comparison:
    """Compare two checkpoints of one architecture, quantized or not, in slabs of a few MB.

    Either may be on a hub. Of a sealed artifact there, the listed hashes are compared with the manifest's;
    bytes are not hashed as they come, for the order of the model is not that of the files.

    Raises:
        BadInput: one of them is not a sound checkpoint of a known architecture, or has an unknown
            quantization.
        IntegrityFailure: one of them is a sealed artifact that was altered.
        RemoteFailure: a hub does not give the bytes.
    """
    folders = [side if isinstance(side, Folder) else open_folder(side) for side in (first, second)]
    for folder in folders:
        folder.manifest(deep=True)
    a, b = map(WeightCheckpoint.open, folders)
    names_b = {want.name: want for want in b.layout}
    names_a = {want.name for want in a.layout}
    misshapen: list[str] = []
    ledger = _Ledger()
    with a.checkpoint.reader() as read_a, b.checkpoint.reader() as read_b:
        for want in a.layout:
            other = names_b.get(want.name)
            if other is None:
                continue
            if other.shape != want.shape:
                misshapen.append(f"{want.name} {list(want.shape)} {list(other.shape)}")
                continue
            pair = _Weight(a, read_a, want), _Weight(b, read_b, want)
            _compare_scales(ledger.scales, *pair)
            _compare_values(ledger, str(want.role), *pair)
    ledger.differing.sort(key=lambda d: (-math.inf if d.snr_db is None else d.snr_db, d.name))
    return Comparison(
        identical=ledger.identical,
        differing=ledger.differing,
        only_first=[want.name for want in a.layout if want.name not in names_b],
        only_second=[name for name in names_b if name not in names_a],
        misshapen=misshapen,
        roles=by_role(ledger.finite),
        layers=by_layer(ledger.finite),
        scales=ledger.scales,
    )


class _Weight:
    """One weight of one checkpoint."""

    def __init__(self, opened: WeightCheckpoint, reader: TensorReader, want: Expected) -> None:
        self.name, self.shape = want.name, want.shape
        self.dtype = opened.stored(want.name).dtype
        self.slabs = functools.partial(opened.slabs, reader, want.name)
        self.scales: NDArray[np.float32] | None = None
        if opened.is_quantized(want.name):
            self.scales = reader.array(opened.scale(want.name)).astype("f4")


def _compare_scales(found: ScaleComparison, first: _Weight, second: _Weight) -> None:
    import numpy as np

    a, b = first.scales, second.scales
    if a is None or b is None or a.shape != b.shape:
        return
    found.compared += a.size
    bad = a != b
    if not bad.any():
        return
    found.differing += int(bad.sum())
    found.weights += 1
    with np.errstate(all="ignore"):
        ratios = np.where(bad & (a > 0) & (b > 0), np.maximum(a / b, b / a), 0).astype(float)
    worst = float(np.nan_to_num(ratios, posinf=0.0).max())
    if worst > (found.largest_ratio or 0.0):
        found.largest_ratio = worst
        found.where = f"{first.name} {_position(int(ratios.argmax()), a.shape)}"
    elif not found.where:
        found.where = f"{first.name} {_position(int(bad.argmax()), a.shape)}"


def _position(flat: int, shape: tuple[int, ...]) -> list[int]:
    import numpy as np

    return [int(axis) for axis in np.unravel_index(flat, shape)]


def _compare_values(ledger: _Ledger, role: str, first: _Weight, second: _Weight) -> None:
    import numpy as np

    signal = error = largest = 0.0
    elements, begin, where = 0, 0, -1
    for values_a, values_b in zip(first.slabs(), second.slabs(), strict=True):
        unequal = (values_a != values_b) & ~(np.isnan(values_a) & np.isnan(values_b))
        count = int(np.count_nonzero(unequal))
        if count:
            where = begin + int(unequal.argmax()) if where < 0 else where
            elements += count
            delta = values_a - values_b
            error += float(np.square(delta, dtype=np.float64).sum())
            largest = float(np.maximum(largest, np.abs(delta).max()))
        signal += float(np.square(values_a, dtype=np.float64).sum())
        begin += values_a.size
    if not elements:
        ledger.identical += 1
        return
    finite = math.isfinite(signal) and math.isfinite(error)
    ledger.differing.append(
        TensorDifference(
            name=first.name,
            role=role,
            snr_db=decibels(signal, error) if finite else None,
            max_abs=largest if math.isfinite(largest) else None,
            dtypes=(first.dtype, second.dtype),
            elements=elements,
            first=tuple(_position(where, first.shape)),
        )
    )
    if finite:
        ledger.finite.append(TensorFidelity(first.name, role, signal, error))
