"""Two checkpoints of one model, weight by weight, after dequantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.artifact import check, is_sealed
from packager.quantize.fidelity import TensorFidelity, by_role, decibels
from packager.quantize.quantized import WeightCheckpoint


@dataclass(frozen=True)
class TensorDifference:
    """A weight whose values differ."""

    name: str
    role: str
    snr_db: float | None
    """10 log10(sum a^2 / sum (a-b)^2) in dB; None where that is not finite."""
    max_abs: float
    """Largest absolute difference."""
    dtypes: tuple[str, str]
    """As stored in the two."""


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

    @property
    def equal(self) -> bool:
        """Whether the two hold the same values under the same names."""
        return not (self.differing or self.only_first or self.only_second or self.misshapen)


def diff(first: Path, second: Path) -> Comparison:
    """Compare two checkpoints of one architecture; one weight of each is in memory at a time.

    Raises:
        BadInput: one of them is not a sound checkpoint of a known architecture, or has an unknown
            quantization.
        IntegrityFailure: one of them is a sealed artifact that was altered.
    """
    import numpy as np

    for path in (first, second):
        if is_sealed(path):
            check(path)
    a, b = WeightCheckpoint.open(Path(first)), WeightCheckpoint.open(Path(second))
    names_b = {want.name: want for want in b.layout}
    names_a = {want.name for want in a.layout}
    identical, misshapen = 0, []
    differing: list[TensorDifference] = []
    ledger: list[TensorFidelity] = []
    with a.checkpoint.reader() as read_a, b.checkpoint.reader() as read_b:
        for want in a.layout:
            other = names_b.get(want.name)
            if other is None:
                continue
            if other.shape != want.shape:
                misshapen.append(f"{want.name} {list(want.shape)} {list(other.shape)}")
                continue
            values_a, values_b = a.values(read_a, want.name), b.values(read_b, want.name)
            if np.array_equal(values_a, values_b, equal_nan=True):
                identical += 1
                continue
            delta = values_a - values_b
            signal = float(np.square(values_a, dtype=np.float64).sum())
            error = float(np.square(delta, dtype=np.float64).sum())
            finite = math.isfinite(signal) and math.isfinite(error)
            largest = float(np.abs(delta).max())
            differing.append(
                TensorDifference(
                    name=want.name,
                    role=str(want.role),
                    snr_db=decibels(signal, error) if finite else None,
                    max_abs=largest if math.isfinite(largest) else math.inf,
                    dtypes=(a.stored(want.name).dtype, b.stored(want.name).dtype),
                )
            )
            if finite:
                ledger.append(TensorFidelity(want.name, str(want.role), signal, error))
    differing.sort(key=lambda d: (-math.inf if d.snr_db is None else d.snr_db, d.name))
    return Comparison(
        identical=identical,
        differing=differing,
        only_first=[want.name for want in a.layout if want.name not in names_b],
        only_second=[name for name in names_b if name not in names_a],
        misshapen=misshapen,
        roles=by_role(ledger),
    )
