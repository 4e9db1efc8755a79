"""A scheme's arithmetic fused by Inductor into one pass over the weights, kept as a shared library.

It is compiled ahead of time, once. Later processes load the library in milliseconds: they need neither Dynamo
nor Inductor, whose imports alone take longer than a gigabyte of weights. It is called through its C
interface, by ctypes, which lets go of the interpreter's lock: workers convert side by side. Torch's own
loader holds it.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.quantize import fp8_block, integers
from packager.quantize.dialects import BLOCK
from packager.quantize.fp8_block import Quantized
from packager.quantize.schemes import Scheme, Slab

if TYPE_CHECKING:
    import torch

_OUTPUTS = 8
"""Tensors of a `Quantized`."""


class Fused:
    """A library of one scheme, for weights of one dtype; may be called from several threads at once."""

    def __init__(self, library: Path) -> None:
        """Load it. Raises OSError, RuntimeError, AttributeError: it is none, or not for this torch."""
        import torch

        library_ = ctypes.CDLL(str(library))
        self._container = ctypes.c_void_p()
        self._run = library_.AOTInductorModelContainerRun
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._run.argtypes = [pointer, pointer, size, pointer, size, pointer, pointer]
        create = library_.AOTInductorModelContainerCreateWithDevice
        create.argtypes = [pointer, size, ctypes.c_char_p, ctypes.c_char_p]
        # A call takes one of so many instances; they are small, for there are no constants in it.
        if create(ctypes.byref(self._container), os.cpu_count() or 1, b"cpu", None):
            raise RuntimeError(f"{library} cannot be loaded")
        self._from_tensors: Callable[..., Any] = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
        self._to_tensors: Callable[..., Any] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs

    def __call__(self, blocks: torch.Tensor) -> Quantized:
        """`Scheme.arithmetic` of blocks [R, r, C, c], contiguous, no size that is a variable being 1."""
        (given,) = self._from_tensors([blocks])
        inputs = (ctypes.c_void_p * 1)(_address(given, None))
        outputs = (ctypes.c_void_p * _OUTPUTS)()
        if self._run(self._container, inputs, 1, outputs, _OUTPUTS, None, None):
            raise RuntimeError(f"the compiled kernel failed on blocks {list(blocks.shape)} of {blocks.dtype}")
        return tuple(self._to_tensors([_capsule(address) for address in outputs]))


_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def _capsule(address: int | None) -> Any:
    return _new_capsule(address, None, None)


def library_of(scheme: Scheme, dtype: torch.dtype) -> Path:
    """Where the library lies once it has been compiled: for this definition, torch, compiler and processor.

    Under `$XDG_CACHE_HOME/moe-packager/kernels`, by default `~/.cache`.
    """
    import torch

    made_for = [inspect.getsource(module) for module in (fp8_block, integers, sys.modules[__name__])]
    digest = hashlib.sha256("".join([*made_for, _processor()]).encode()).hexdigest()
    name = f"{scheme.name} {dtype} {torch.__version__} {digest[:16]}"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe-packager" / "kernels" / (re.sub(r"[^\w.+]+", "-", name) + ".so")


def _processor() -> str:
    """What a library is compiled for; a home directory may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"


def load(scheme: Scheme, dtype: torch.dtype) -> Callable[[torch.Tensor], Quantized]:
    """The compiled form of `scheme.arithmetic` for this dtype; compiled now unless it has been before.

    It is compared with the definition before it is given out. Raises whatever goes wrong.
    """
    library = library_of(scheme, dtype)
    if not library.is_file():
        _compile(scheme, dtype, library)

    def arithmetic(blocks: torch.Tensor) -> Quantized:
        # Such slabs are rare and small; compiled code takes a size of 1 for a constant.
        if blocks.shape[0] == 1 or (scheme.columns is not None and blocks.shape[2] == 1):
            return scheme.arithmetic(blocks)
        return fused(blocks.contiguous())

    try:
        fused = Fused(library)
        _require_equal(scheme, arithmetic, dtype)
    except Exception:
        library.unlink(missing_ok=True)  # the next run makes a new one
        raise
    return arithmetic


def _compile(scheme: Scheme, dtype: torch.dtype, library: Path) -> None:
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise RuntimeError("no C++ compiler found")
    import torch
    from torch._inductor import aot_compile
    from torch.export import Dim, export

    class Arithmetic(torch.nn.Module):
        def forward(self, blocks: torch.Tensor) -> Quantized:
            return scheme.arithmetic(blocks)

    library.parent.mkdir(parents=True, exist_ok=True)
    example = torch.ones(2, scheme.rows, 3, scheme.columns or BLOCK, dtype=dtype)
    rows, columns = Dim("rows", min=2, max=1 << 24), Dim("columns", min=2, max=1 << 24)
    sizes = {0: rows, 2: columns}
    if scheme.columns is None:
        example, sizes = example[:, :, :1].contiguous(), {0: rows, 3: columns}
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, torch.no_grad():
        program = export(Arithmetic(), (example,), dynamic_shapes=(sizes,))
        # A worker is one thread: the code itself needs none.
        options = {"cpp.threads": 1, "aot_inductor.output_path": f"{folder}/kernel.so"}
        made = aot_compile(program.module(), (example,), options=options)
        Path(str(made)).replace(library)


def _require_equal(
    scheme: Scheme, arithmetic: Callable[[torch.Tensor], Quantized], dtype: torch.dtype
) -> None:
    """Raise RuntimeError unless codes and scales are those of the definition, for weights of any size."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((2 * BLOCK, 3 * BLOCK), (3 * BLOCK, 2 * BLOCK)):
        values = torch.randn(rows, columns, generator=generator)
        values[:BLOCK] *= torch.logspace(-9, 2, columns)
        sample = (values * 0.02).to(dtype)
        found, wanted = scheme.slab(sample, arithmetic), scheme.slab(sample)
        if found is None or wanted is None or not _same(found, wanted):
            raise RuntimeError("its codes are not those of the definition")


def _same(one: Slab, other: Slab) -> bool:
    import torch

    codes = torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8))
    return codes and torch.equal(one.scales, other.scales)
