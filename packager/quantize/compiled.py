"""A scheme's arithmetic fused by Inductor into one pass over the weights, kept as a shared library.

It is compiled ahead of time, once. Later processes load it, and the C++ part of torch, in a fraction of a
second: they need neither Dynamo nor Inductor nor torch's Python modules, whose imports take longer than a
gigabyte of weights. It is called through its C interface and torch's (`aoti_torch/c/shim.h`, stable within a
release of torch) by ctypes, which lets go of the interpreter's lock: workers convert side by side.
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
import weakref
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.quantize import fp8_block, integers
from packager.quantize.dialects import BLOCK
from packager.quantize.schemes import Arithmetic, Arrays, Scheme

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_pointer, _size, _long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64


class Fused:
    """A library of one scheme, for weights of one dtype; may be called from several threads at once."""

    def __init__(self, library: Path) -> None:
        """Load it. Raises OSError, RuntimeError, AttributeError: it is none, or not for this torch."""
        self._torch = _libtorch()
        loaded = ctypes.CDLL(str(library))
        self._run = loaded.AOTInductorModelContainerRun
        self._run.argtypes = [_pointer, _pointer, _size, _pointer, _size, _pointer, _pointer]
        create = loaded.AOTInductorModelContainerCreateWithDevice
        create.argtypes = [_pointer, _size, ctypes.c_char_p, ctypes.c_char_p]
        self._container = _pointer()
        # A call takes one of so many instances; they are small, for there are no constants in it.
        if create(ctypes.byref(self._container), os.cpu_count() or 1, b"cpu", None):
            raise RuntimeError(f"{library} cannot be loaded")
        outputs = _size()
        if loaded.AOTInductorModelContainerGetNumOutputs(self._container, ctypes.byref(outputs)):
            raise RuntimeError(f"{library} does not say what it gives")
        self._outputs = outputs.value

    def __call__(self, blocks: NDArray[Any]) -> Arrays:
        """`Scheme.arithmetic` of blocks [R, r, C, c], contiguous, no size that is a variable being 1."""
        inputs = (_pointer * 1)(self._tensor(blocks))
        outputs = (_pointer * self._outputs)()
        # The library takes the input's handle; the memory stays ours.
        if self._run(self._container, inputs, 1, outputs, self._outputs, None, None):
            raise RuntimeError(f"the compiled kernel failed on blocks {list(blocks.shape)} of {blocks.dtype}")
        codes, *figures = (self._array(_pointer(handle)) for handle in outputs)
        return codes, *(figure.view("f4").reshape(blocks.shape[0], blocks.shape[2]) for figure in figures)

    def _tensor(self, array: NDArray[Any]) -> ctypes.c_void_p:
        """A handle of a tensor that lies where `array` lies."""
        torch, handle = self._torch, _pointer()
        sizes = (_long * array.ndim)(*array.shape)
        steps = (_long * array.ndim)(*(step // array.itemsize for step in array.strides))
        dtype = getattr(torch, f"aoti_torch_dtype_{array.dtype.name}")()
        device = torch.aoti_torch_device_type_cpu()
        created = torch.aoti_torch_create_tensor_from_blob(
            _pointer(array.ctypes.data), _long(array.ndim), sizes, steps, _long(0), dtype, device, 0,
            ctypes.byref(handle),
        )  # fmt: skip
        if created:
            raise RuntimeError(f"torch takes no tensor of {array.dtype} {list(array.shape)}")
        return handle

    def _array(self, handle: ctypes.c_void_p) -> NDArray[np.uint8]:
        """The bytes of a contiguous tensor, which lives as long as the array."""
        import numpy as np

        torch, data, count, dtype = self._torch, _pointer(), _long(), ctypes.c_int32()
        failed = torch.aoti_torch_get_data_ptr(handle, ctypes.byref(data))
        failed |= torch.aoti_torch_get_numel(handle, ctypes.byref(count))
        failed |= torch.aoti_torch_get_dtype(handle, ctypes.byref(dtype))
        if failed or not data.value:
            raise RuntimeError("torch does not say where a result lies")
        nbytes = count.value * torch.aoti_torch_dtype_element_size(dtype)
        memory = (ctypes.c_uint8 * nbytes).from_address(data.value)
        weakref.finalize(memory, torch.aoti_torch_delete_tensor_object, handle)
        return np.frombuffer(memoryview(memory).cast("B"), np.uint8)


@cache
def _libtorch() -> ctypes.CDLL:
    """The C++ part of the torch that is installed."""
    found = find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    return ctypes.CDLL(str(Path(found.submodule_search_locations[0]) / "lib" / "libtorch_cpu.so"))


def library_of(scheme: Scheme, dtype: str) -> Path:
    """Where the library lies once it has been compiled: for this definition, torch and processor.

    Under `$XDG_CACHE_HOME/moe-packager/kernels`, by default `~/.cache`. `dtype` is numpy's name.
    """
    made_for = [inspect.getsource(module) for module in (fp8_block, integers, sys.modules[__name__])]
    digest = hashlib.sha256("".join([*made_for, _processor()]).encode()).hexdigest()
    name = f"{scheme.name} {dtype} {metadata.version('torch')} {digest[:16]}"
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


def load(scheme: Scheme, dtype: str) -> Arithmetic:
    """The compiled form of `scheme.arithmetic` for this dtype; compiled now unless it has been before.

    What it makes of a sample is compared, before it is given out, with what the definition made of it when it
    was compiled. Raises whatever goes wrong.
    """
    library = library_of(scheme, dtype)
    if not library.is_file():
        _compile(scheme, dtype, library)
    try:
        arithmetic = _with_edges(scheme, Fused(library))
        if _answer(scheme, arithmetic, dtype) != _expected(library).read_text(encoding="ascii"):
            raise RuntimeError("its codes are not those of the definition")
    except Exception:
        library.unlink(missing_ok=True)  # the next run makes a new one
        raise
    return arithmetic


def _with_edges(scheme: Scheme, fused: Fused) -> Arithmetic:
    import numpy as np

    def arithmetic(blocks: NDArray[Any]) -> Arrays:
        rows, _, columns, _ = blocks.shape
        # Compiled code takes a size of 1 for a constant, so a second block is put beside it; this is rare.
        more = int(rows == 1), int(columns == 1 and scheme.columns is not None)
        if not any(more):
            return fused(np.ascontiguousarray(blocks))
        padded = np.pad(blocks, ((0, more[0]), (0, 0), (0, more[1]), (0, 0)))
        codes, *figures = fused(padded)
        codes = codes.reshape(padded.shape)[:rows, :, :columns]
        return codes, *(np.ascontiguousarray(figure[:rows, :columns]) for figure in figures)

    return arithmetic


def _compile(scheme: Scheme, dtype: str, library: Path) -> None:
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise RuntimeError("no C++ compiler found")
    import torch
    from torch._inductor import aot_compile
    from torch.export import Dim, export

    class Definition(torch.nn.Module):
        def forward(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return scheme.definition(blocks)

    library.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = Dim("rows", min=2, max=1 << 24), Dim("columns", min=2, max=1 << 24)
    sizes = {0: rows, 3 if scheme.columns is None else 2: columns}
    shape = (2, scheme.rows, 1, BLOCK) if scheme.columns is None else (2, scheme.rows, 3, scheme.columns)
    example = torch.ones(shape, dtype=getattr(torch, dtype))
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, torch.no_grad():
        program = export(Definition(), (example,), dynamic_shapes=(sizes,))
        # A worker is one thread: the code itself needs none.
        options = {"cpp.threads": 1, "aot_inductor.output_path": f"{folder}/kernel.so"}
        made = aot_compile(program.module(), (example,), options=options)
        expected = _expected(Path(folder) / "kernel.so")
        expected.write_text(_answer(scheme, scheme.arithmetic, dtype), encoding="ascii")
        expected.replace(_expected(library))
        Path(str(made)).replace(library)


def _expected(library: Path) -> Path:
    """The file beside a library with what `_answer` is of the definition."""
    return library.with_suffix(".expected")


def _answer(scheme: Scheme, arithmetic: Arithmetic, dtype: str) -> str:
    """A digest of the codes and scales that `arithmetic` gives weights of many magnitudes, and zeros."""
    import ml_dtypes
    import numpy as np

    digest = hashlib.sha256()
    for rows, columns in ((2 * BLOCK, 3 * BLOCK), (3 * BLOCK, 2 * BLOCK)):
        # Multiplicative hashing of 0, 1, 2, ...: the same numbers whatever is installed.
        mixed = np.arange(rows * columns, dtype=np.uint32) * np.uint32(2654435761)
        values = (mixed.astype(np.int64) - 2**31).reshape(rows, columns) * 2.0**-36
        values[:BLOCK] *= 2.0 ** (np.arange(columns) % 36 - 30.0)
        values[-BLOCK:, -BLOCK:] = 0.0
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
        slab = scheme.slab(values.astype(kind), arithmetic)
        if slab is None:
            raise RuntimeError("it finds values that are not finite where there are none")
        digest.update(slab.codes.tobytes() + slab.scales.tobytes())
    return digest.hexdigest()
