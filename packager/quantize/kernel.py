"""The kernel that runs: a scheme's arithmetic fused by Inductor into one pass over the weights, or op by op.

Compiling takes half a minute, loading what was compiled a few seconds, so each pays only from some size on. A
compiled kernel is checked against the definition before it is trusted with a tensor.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packager.quantize import fp8_block, integers
from packager.quantize.dialects import BLOCK
from packager.quantize.fp8_block import Quantized
from packager.quantize.schemes import Arithmetic, Scheme, Slab

if TYPE_CHECKING:
    import torch

Choice = Literal["auto", "compiled", "eager"]

_WORTH_LOADING = 1_000_000_000
_WORTH_COMPILING = 8_000_000_000
"""Bytes of source from which starting the compiled kernel takes less time than it saves."""
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

    def __call__(self, rows: torch.Tensor) -> list[Slab] | None:
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

    eager = Kernel("eager PyTorch, op by op", scheme, scheme.arithmetic, _EAGER_SLAB)
    wanted = sorted(dtypes, key=str)
    if not wanted:
        return eager
    cache = _cache_directory()
    stamps = [_stamp(cache, scheme, dtype) for dtype in wanted]
    known = all(stamp.is_file() for stamp in stamps)
    if choice == "eager" or (choice == "auto" and nbytes < (_WORTH_LOADING if known else _WORTH_COMPILING)):
        progress(f"kernel: {eager.title}")
        return eager
    if not known:
        progress("compiling the kernel (half a minute; kept for the next time)")
    try:
        # On a thread like the workers': the number of torch's threads is built into the kernel.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
            compiled = thread.submit(_compile, scheme, wanted, cache).result()
    except Exception as err:  # whatever is wrong with a compiler: the definition itself still runs
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        progress(f"kernel: {eager.title} (no compiled one: {reason})")
        return eager
    for stamp in stamps:
        stamp.touch()
    kernel = Kernel("compiled by Inductor", scheme, compiled, _COMPILED_SLAB)
    progress(f"kernel: {kernel.title}")
    return kernel


def _compile(scheme: Scheme, dtypes: Iterable[torch.dtype], cache: Path) -> Arithmetic:
    """Compile, or load from the cache, and compare with the definition. Raises whatever goes wrong."""
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise RuntimeError("no C++ compiler found")
    cache.mkdir(parents=True, exist_ok=True)
    # Inductor has no other way to be told; a directory that the user chose stays.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    import torch

    # With a C++ wrapper the kernel runs without the interpreter's lock: workers convert side by side. Each
    # worker is one thread, so the code itself needs none.
    fused: Arithmetic = torch.compile(
        scheme.arithmetic,
        dynamic=True,
        fullgraph=True,
        options={"cpp_wrapper": True, "cpp.threads": 1},
    )

    def compiled(blocks: torch.Tensor) -> Quantized:
        # Inductor would make a kernel of its own for each size that is 1; such slabs are rare and small.
        if blocks.shape[0] == 1 or (scheme.columns is not None and blocks.shape[2] == 1):
            return scheme.arithmetic(blocks)
        return fused(blocks)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for dtype in dtypes:
            for rows, columns in ((2 * BLOCK, 3 * BLOCK), (3 * BLOCK, 2 * BLOCK)):
                values = torch.randn(rows + BLOCK, columns, generator=generator)
                values[:BLOCK] *= torch.logspace(-9, 2, columns)
                # Some rows of a view of bytes, as the stream gives them: Dynamo's guards look at what a view
                # is of, and each worker would compile once more.
                data = (values * 0.02).to(dtype).view(torch.uint8).flatten().clone()
                sample = data.view(dtype).view(-1, columns)[:rows]
                found, wanted = scheme.slab(sample, compiled), scheme.slab(sample)
                if found is None or wanted is None or not _same(found, wanted):
                    raise RuntimeError("its codes are not those of the definition")
    return compiled


def _same(one: Slab, other: Slab) -> bool:
    import torch

    codes = torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
    return codes and torch.equal(one.scales, other.scales)


def _cache_directory() -> Path:
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe-packager" / "inductor"


def _stamp(cache: Path, scheme: Scheme, dtype: torch.dtype) -> Path:
    """A file that is there once this kernel has been compiled: whether to expect seconds or a minute."""
    import hashlib

    import torch

    definition = b"".join(inspect.getsource(module).encode() for module in (fp8_block, integers))
    parts = torch.__version__, hashlib.sha256(definition).hexdigest()[:12], scheme.name, dtype
    name = re.sub(r"[^\w.+]+", "-", "-".join(map(str, parts)))
    return cache / f"packager-{name}.compiled"
