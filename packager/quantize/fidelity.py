"""The fidelity ledger: how much noise quantization put into each weight, in decibels and more."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

from packager.checkpoint.source import listed
from packager.errors import GateFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEDGER_NAME = "fidelity.jsonl"


def decibels(signal: float, error: float) -> float | None:
    """Signal-to-noise ratio in dB, two decimals; None where there is no error at all, or no signal."""
    if error == 0.0 or signal == 0.0:
        return None
    return round(10.0 * math.log10(signal / error), 2)


@dataclass(frozen=True)
class Figures:
    """What quantization did to some weights w, which became w'."""

    signal: float
    """Sum of w**2."""
    error: float
    """Sum of (w' - w)**2."""
    cross: float
    """Sum of w * (w' - w)."""
    max_relative_error: float
    """Largest |w' - w| of a block over the largest |w| of that block."""
    saturated: int
    """FP8: weights beyond the largest code after scaling, hence clamped. Integers: codes at either end."""
    zero_blocks: int
    """Blocks without a weight other than zero; their scale is 1."""
    scale_min: float
    """Smallest scale of a block that is not zero; infinity where all are."""
    scale_max: float
    """Largest one; zero where all blocks are."""

    @classmethod
    def of_blocks(
        cls,
        scales: NDArray[np.float32],
        amax: NDArray[np.float32],
        signal: NDArray[np.float32],
        error: NDArray[np.float32],
        cross: NDArray[np.float32],
        worst: NDArray[np.float32],
        clamped: NDArray[np.float32],
    ) -> Self:
        """Sum up arrays that hold one entry a block."""
        import numpy as np

        used = amax != 0
        relative = np.divide(worst, amax, out=np.zeros_like(worst), where=used)
        return cls(
            signal=math.fsum(signal.flat),
            error=math.fsum(error.flat),
            cross=math.fsum(cross.flat),
            max_relative_error=float(relative.max()),
            saturated=int(clamped.sum(dtype=np.float64)),
            zero_blocks=int(used.size - np.count_nonzero(used)),
            scale_min=float(scales.min(where=used, initial=math.inf)),
            scale_max=float(scales.max(where=used, initial=0.0)),
        )

    @classmethod
    def total(cls, parts: Sequence[Self]) -> Self:
        """The figures of all parts together; `fsum` makes the sums independent of order."""
        return cls(
            signal=math.fsum(part.signal for part in parts),
            error=math.fsum(part.error for part in parts),
            cross=math.fsum(part.cross for part in parts),
            max_relative_error=max(part.max_relative_error for part in parts),
            saturated=sum(part.saturated for part in parts),
            zero_blocks=sum(part.zero_blocks for part in parts),
            scale_min=min(part.scale_min for part in parts),
            scale_max=max(part.scale_max for part in parts),
        )

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between w and w'; None where one of them is all zero."""
        rounded = self.signal + 2.0 * self.cross + self.error  # the sum of w'**2
        if self.signal <= 0.0 or rounded <= 0.0:
            return None
        return (self.signal + self.cross) / math.sqrt(self.signal * rounded)


@dataclass(frozen=True)
class TensorFidelity:
    """One quantized weight."""

    name: str
    role: str
    signal: float
    """Sum of squares of the source."""
    error: float
    """Sum of squared differences."""


@dataclass(frozen=True)
class LedgerEntry(TensorFidelity):
    """One quantized weight with all its figures."""

    shape: tuple[int, ...]
    snr_db: float | None
    """10 log10(signal / error), two decimals; None: no error, or no signal."""
    cosine: float | None
    """Between source and result, six decimals; None where one of them is all zero."""
    max_relative_error: float
    """Largest |w' - w| of a block over the largest |w| of that block."""
    saturated: int
    zero_blocks: int
    nonfinite: int
    """NaN and infinities in the source: 0, for a source with any of them is refused."""
    scale_min: float | None
    """Over blocks that are not all zero; None: there is none."""
    scale_max: float | None

    @classmethod
    def of(cls, name: str, role: str, shape: tuple[int, ...], figures: Figures) -> Self:
        """The entry of one weight."""
        used = figures.scale_max > 0.0
        return cls(
            name=name,
            role=role,
            signal=figures.signal,
            error=figures.error,
            shape=shape,
            snr_db=decibels(figures.signal, figures.error),
            cosine=None if figures.cosine is None else round(figures.cosine, 6),
            max_relative_error=round(figures.max_relative_error, 6),
            saturated=figures.saturated,
            zero_blocks=figures.zero_blocks,
            nonfinite=0,
            scale_min=figures.scale_min if used else None,
            scale_max=figures.scale_max if used else None,
        )

    @classmethod
    def read(cls, raw: dict[str, Any]) -> Self:
        """The reverse of `asdict` through JSON. Raises TypeError, KeyError: not such a document."""
        return cls(**{**raw, "shape": tuple(raw["shape"])})


def ledger_jsonl(entries: Iterable[LedgerEntry]) -> bytes:
    """One JSON object a line. The sums behind the ratios stay out: their last digits are those of one kernel
    or another, and the same weights must give the same ledger."""
    lines = []
    for entry in entries:
        document = asdict(entry)
        del document["signal"], document["error"]
        lines.append(json.dumps(document, separators=(",", ":"), allow_nan=False).encode() + b"\n")
    return b"".join(lines)


@dataclass(frozen=True)
class RoleFidelity:
    """All quantized weights of one role."""

    snr_db: float | None
    tensors: int
    worst_snr_db: float | None
    worst_tensor: str

    @classmethod
    def of(cls, entries: Sequence[TensorFidelity]) -> Self:
        """Sum up one role; `fsum` makes the sum independent of order."""
        worst = min(entries, key=lambda e: (decibels(e.signal, e.error) or math.inf, e.name))
        return cls(
            snr_db=decibels(math.fsum(e.signal for e in entries), math.fsum(e.error for e in entries)),
            tensors=len(entries),
            worst_snr_db=decibels(worst.signal, worst.error),
            worst_tensor=worst.name,
        )


def layer_of(name: str) -> int | None:
    """Number of the decoder layer that a tensor belongs to; None: it is in none."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found[1]) if found else None


def by_role(entries: Iterable[TensorFidelity]) -> dict[str, Any]:
    """Role -> SNR over the role, number of tensors, and the worst tensor; for a manifest's metrics."""
    return _grouped(entries, lambda entry: entry.role)


def by_layer(entries: Iterable[TensorFidelity]) -> dict[str, Any]:
    """The same for each decoder layer, under its number; weights outside of the layers are left out."""
    inside = [entry for entry in entries if layer_of(entry.name) is not None]
    groups = _grouped(inside, lambda entry: str(layer_of(entry.name)))
    return {key: groups[key] for key in sorted(groups, key=int)}


def _grouped(entries: Iterable[TensorFidelity], key: Callable[[TensorFidelity], str]) -> dict[str, Any]:
    groups: defaultdict[str, list[TensorFidelity]] = defaultdict(list)
    for entry in entries:
        groups[key(entry)].append(entry)
    return {name: asdict(RoleFidelity.of(found)) for name, found in sorted(groups.items())}


def require_snr(entries: Iterable[LedgerEntry], bound: float) -> None:
    """Raise GateFailed, naming the worst weights, if any has an SNR below `bound` dB."""
    low = sorted((e.snr_db, e.name) for e in entries if e.snr_db is not None and e.snr_db < bound)
    if low:
        lines = [f"{name}: {snr:.2f} dB" for snr, name in low]
        raise GateFailed(
            f"{len(low)} weights are below {bound:g} dB after quantization:\n{listed(lines)}",
            f"The figures of every weight are in {LEDGER_NAME}. Look at these weights in the source; if they "
            "are meant to be so, name a lower bound (--min-snr-db): finished weights are kept.",
        )
