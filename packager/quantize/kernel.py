"""The kernel that runs: a scheme's arithmetic fused by Inductor into one pass over the weights, or op by op.

Compiling takes a quarter of a minute, so it pays only from some size on. A compiled kernel is checked against
the definition before it is trusted with a tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from packager.quantize import compiled
from packager.quantize.schemes import Arithmetic, Arrays, Scheme, Slab

if TYPE_CHECKING:
    from numpy.typing import NDArray

Choice = Literal["auto", "compiled", "eager"]

_WORTH_COMPILING = 5_000_000_000
"""Bytes of source from which compiling takes less time than it saves."""
_EAGER_SLAB = 1 << 18
_COMPILED_SLAB = 1 << 20
"""Elements quantized at once: op by op the temporaries must stay in a core's cache; fused there are none."""


@dataclass(frozen=True)
class Kernel:
    """Quantizes weights of any shape; may be called from several threads at once."""

    title: str
    """What runs, for people."""
    scheme: Scheme
    arithmetic: Arithmetic
    """That of the scheme, or a compiled form of it."""
    slab_elements: int

    @staticmethod
    def enter_thread() -> None:
        """Let torch, if it is there, compute on the calling thread alone. Each worker is one."""
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)

    def __call__(self, rows: NDArray[Any]) -> list[Slab] | None:
        """Quantize rows [R, K] that begin with a block's first row, slab by slab.

        Returns None if a value is not finite.
        """
        band = self.scheme.rows
        step = max(self.slab_elements // max(rows.shape[1], 1) // band, 1) * band
        slabs: list[Slab] = []
        for first in range(0, rows.shape[0], step):
            slab = self.scheme.slab(rows[first : first + step], self.arithmetic)
            if slab is None:
                return None
            slabs.append(slab)
        return slabs


def choose_kernel(
    choice: Choice,
    scheme: Scheme,
    *,
    dtypes: Iterable[str],
    nbytes: int,
    progress: Callable[[str], None],
) -> Kernel:
    """The kernel for `nbytes` of weights of these dtypes; says in `progress` which one it is, and why.

    Args:
        choice: `auto` compiles where that saves time. Without a working compiler it is eager in any case.
        scheme: what it computes.
        dtypes: numpy's names of them.
        nbytes: of source.
        progress: called with a line.
    """
    wanted = sorted(dtypes)
    known = all(compiled.library_of(scheme, dtype).is_file() for dtype in wanted)
    if choice == "eager" or (choice == "auto" and not known and nbytes < _WORTH_COMPILING):
        return _eager(scheme, "", progress)
    if not known:
        progress("compiling the kernel (a quarter of a minute; kept for the next time)")
    try:
        fused = {dtype: compiled.load(scheme, dtype) for dtype in wanted}
    except Exception as err:  # whatever is wrong with a compiler: the definition itself still runs
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        return _eager(scheme, f" (no compiled one: {reason})", progress)

    def arithmetic(blocks: NDArray[Any]) -> Arrays:
        return fused[blocks.dtype.name](blocks)

    kernel = Kernel("compiled by Inductor", scheme, arithmetic, _COMPILED_SLAB)
    progress(f"kernel: {kernel.title}")
    return kernel


def _eager(scheme: Scheme, why: str, progress: Callable[[str], None]) -> Kernel:
    import_module("torch")  # now and not by the first worker, so that the memory it takes is counted
    kernel = Kernel("eager PyTorch, op by op", scheme, scheme.arithmetic, _EAGER_SLAB)
    progress(f"kernel: {kernel.title}{why}")
    return kernel
