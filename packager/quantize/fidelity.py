"""The fidelity ledger: how much noise quantization put into each role's weights, in decibels."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, Self


def decibels(signal: float, error: float) -> float | None:
    """Signal-to-noise ratio in dB, two decimals; None where there is no error at all, or no signal."""
    if error == 0.0 or signal == 0.0:
        return None
    return round(10.0 * math.log10(signal / error), 2)


@dataclass(frozen=True)
class TensorFidelity:
    """One quantized weight."""

    name: str
    role: str
    signal: float
    """Sum of squares of the source."""
    error: float
    """Sum of squared differences."""


def dump(entries: list[TensorFidelity]) -> bytes:
    """JSON that gives back exactly the same numbers."""
    return json.dumps([asdict(entry) for entry in entries]).encode()


def load(data: bytes) -> list[TensorFidelity]:
    """The reverse of `dump`. Raises ValueError, TypeError: not such a file."""
    return [TensorFidelity(**entry) for entry in json.loads(data)]


@dataclass(frozen=True)
class RoleFidelity:
    """All quantized weights of one role."""

    snr_db: float | None
    tensors: int
    worst_snr_db: float | None
    worst_tensor: str

    @classmethod
    def of(cls, entries: list[TensorFidelity]) -> Self:
        """Sum up one role; `fsum` makes the sum independent of order."""
        worst = min(entries, key=lambda e: (decibels(e.signal, e.error) or math.inf, e.name))
        return cls(
            snr_db=decibels(math.fsum(e.signal for e in entries), math.fsum(e.error for e in entries)),
            tensors=len(entries),
            worst_snr_db=decibels(worst.signal, worst.error),
            worst_tensor=worst.name,
        )


def by_role(entries: list[TensorFidelity]) -> dict[str, Any]:
    """Role -> SNR over the role, number of tensors, and the worst tensor; for a manifest's metrics."""
    roles: defaultdict[str, list[TensorFidelity]] = defaultdict(list)
    for entry in entries:
        roles[entry.role].append(entry)
    return {role: asdict(RoleFidelity.of(found)) for role, found in sorted(roles.items())}
