"""The kernel that runs: `quantize_blocks` fused by Inductor into one pass over the weights, or op by op.

Compiling takes half a minute, loading what was compiled a few seconds, so each pays only from some size on. A
compiled kernel is checked against the definition before it is trusted with a tensor.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packager.quantize import fp8_block
from packager.quantize.dialects import BLOCK
from packager.quantize.fp8_block import Quantized, QuantizedSlab, Rounding, quantize_blocks, quantize_slab

if TYPE_CHECKING:
    import torch

Choice = Literal["auto", "compiled", "eager"]

_WORTH_LOADING = 1_000_000_000
_WORTH_COMPILING = 8_000_000_000
"""Bytes of source from which starting the compiled kernel takes less time than it saves."""
_EAGER_SLAB = 1 << 18
_COMPILED_SLAB = 1 << 20
"""Elements quantized at once: op by op the temporaries must stay in a core's cache; fused there are none."""

CompiledForm = Callable[["torch.Tensor", bool], Quantized]


@dataclass(frozen=True)
class Kernel:
    """Quantizes weights of any shape; may be called from several threads at once."""

    title: str
    """What runs, for people."""
    rounding: Rounding
    per_row: bool
    blocks_of: CompiledForm
    slab_elements: int

    def __call__(self, rows: torch.Tensor) -> list[QuantizedSlab] | None:
        """Quantize rows [R, K] that begin with a block's first row, slab by slab.

        Returns None if a value is not finite.
        """
        step = max(self.slab_elements // max(rows.shape[1], 1) // BLOCK, 1) * BLOCK
        slabs: list[QuantizedSlab] = []
        for first in range(0, rows.shape[0], step):
            part = rows[first : first + step]
            slab = quantize_slab(part, self.rounding, per_row=self.per_row, blocks_of=self.blocks_of)
            if slab is None:
                return None
            slabs.append(slab)
        return slabs


def choose_kernel(
    choice: Choice,
    rounding: Rounding,
    *,
    per_row: bool,
    dtypes: Iterable[torch.dtype],
    nbytes: int,
    progress: Callable[[str], None],
) -> Kernel:
    """The kernel for `nbytes` of weights of these dtypes; says in `progress` which one it is, and why.

    The threads that call the kernel must have set torch to one thread each, and no gradients.

    Args:
        choice: `auto` compiles where that saves time. Without a working compiler it is eager in any case.
    """
    import torch

    eager = Kernel("eager PyTorch, op by op", rounding, per_row, quantize_blocks, _EAGER_SLAB)
    wanted = sorted(dtypes, key=str)
    if not wanted:
        return eager
    cache = _cache_directory()
    stamps = [_stamp(cache, rounding, per_row, dtype) for dtype in wanted]
    known = all(stamp.is_file() for stamp in stamps)
    if choice == "eager" or (choice == "auto" and nbytes < (_WORTH_LOADING if known else _WORTH_COMPILING)):
        progress(f"kernel: {eager.title}")
        return eager
    if not known:
        progress("compiling the kernel (half a minute; kept for the next time)")
    try:
        # On a thread like the workers': the number of torch's threads is built into the kernel.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
            compiled = thread.submit(_compile, rounding, per_row, wanted, cache).result()
    except Exception as err:  # whatever is wrong with a compiler: the definition itself still runs
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        progress(f"kernel: {eager.title} (no compiled one: {reason})")
        return eager
    for stamp in stamps:
        stamp.touch()
    kernel = Kernel("compiled by Inductor", rounding, per_row, compiled, _COMPILED_SLAB)
    progress(f"kernel: {kernel.title}")
    return kernel


def _compile(rounding: Rounding, per_row: bool, dtypes: Iterable[torch.dtype], cache: Path) -> CompiledForm:
    """Compile, or load from the cache, and compare with the definition. Raises whatever goes wrong."""
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise RuntimeError("no C++ compiler found")
    cache.mkdir(parents=True, exist_ok=True)
    # Inductor has no other way to be told; a directory that the user chose stays.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    import torch

    # With a C++ wrapper the kernel runs without the interpreter's lock: workers convert side by side. Each
    # worker is one thread, so the code itself needs none.
    fused: CompiledForm = torch.compile(
        quantize_blocks,
        dynamic=True,
        fullgraph=True,
        options={"cpp_wrapper": True, "cpp.threads": 1},
    )

    def blocks_of(blocks: torch.Tensor, power_of_two: bool) -> Quantized:
        # Inductor would make a kernel of its own for each size that is 1; such slabs are rare and small.
        if blocks.shape[0] == 1 or (not per_row and blocks.shape[2] == 1):
            return quantize_blocks(blocks, power_of_two)
        return fused(blocks, power_of_two)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for dtype in dtypes:
            for rows, columns in ((2 * BLOCK, 3 * BLOCK), (3 * BLOCK, 2 * BLOCK)):
                values = torch.randn(rows, columns, generator=generator)
                values[:BLOCK] *= torch.logspace(-9, 2, columns)
                sample = (values * 0.02).to(dtype)
                found = quantize_slab(sample, rounding, per_row=per_row, blocks_of=blocks_of)
                wanted = quantize_slab(sample, rounding, per_row=per_row)
                if found is None or wanted is None or not _same(found, wanted):
                    raise RuntimeError("its codes are not those of the definition")
    return blocks_of


def _same(one: QuantizedSlab, other: QuantizedSlab) -> bool:
    import torch

    codes = torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
    return codes and torch.equal(one.scales, other.scales)


def _cache_directory() -> Path:
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe-packager" / "inductor"


def _stamp(cache: Path, rounding: Rounding, per_row: bool, dtype: torch.dtype) -> Path:
    """A file that is there once this kernel has been compiled: whether to expect seconds or a minute."""
    import hashlib

    import torch

    definition = hashlib.sha256(Path(fp8_block.__file__).read_bytes()).hexdigest()[:12]
    name = f"{torch.__version__}-{definition}-{rounding}-{'row' if per_row else 'block'}-{dtype}".replace(
        "/", "_"
    )
    return cache / f"packager-{name}.compiled"
