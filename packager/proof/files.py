"""Tensors in safetensors files, read row by row: a second reader, kept apart from the one that packager uses.

Format: 8 bytes little-endian header length, a JSON header, then the data; offsets count from the data section
(github.com/huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from packager.errors import BadInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_LONGEST_HEADER = 100_000_000
_REMEDY = "Give the folder that holds config.json and *.safetensors."


class OpenFile(Protocol):
    """A file open for reading; for one thread at a time."""

    def fill(self, view: memoryview, position: int) -> None:
        """Fill `view` with the bytes from `position` on. Raises BadInput, or RemoteFailure: not all come."""

    def close(self) -> None:
        """Let go of it."""


class Storage(Protocol):
    """Where the files of a checkpoint lie: a folder, or whatever else hands out names and bytes.

    What the bytes mean is decided here, by none of the code that wrote them.
    """

    @property
    def name(self) -> str:
        """As messages call it."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by name."""

    def read(self, name: str) -> bytes:
        """A whole small file."""

    def open(self, name: str) -> OpenFile:
        """Open a file."""


@dataclass(frozen=True)
class LocalFiles:
    """A folder as `Storage`."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def sizes(self) -> Mapping[str, int]:
        if not self.path.is_dir():
            raise BadInput(f"no folder {self.path}", _REMEDY)
        return {path.name: path.stat().st_size for path in self.path.iterdir() if path.is_file()}

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as err:
            raise BadInput(f"cannot read {self.path / name}: {err.strerror}", _REMEDY) from None

    def open(self, name: str) -> OpenFile:
        return _LocalFile(self.path / name)


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as err:
            raise BadInput(f"cannot read {path}: {err.strerror}") from None

    def fill(self, view: memoryview, position: int) -> None:
        while view.nbytes:  # Linux reads at most 2 GiB at a time
            try:
                got = os.preadv(self._handle, [view], position)
            except OSError as err:
                raise BadInput(f"cannot read {self._path}: {err.strerror}") from None
            if not got:
                raise BadInput(f"{self._path} ended at byte {position}")
            view, position = view[got:], position + got

    def close(self) -> None:
        os.close(self._handle)


@dataclass(frozen=True)
class Stored:
    """One tensor as a header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    """First byte, counted from the beginning of the file."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.count * ITEM_BYTES[self.dtype]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadInput: missing, not JSON, or a key twice."""
    return object_in(LocalFiles(path.parent), path.name)


def object_in(storage: Storage, name: str) -> dict[str, Any]:
    """A JSON object from a file. Raises as `Storage.read`, and BadInput: not JSON, or a key twice."""
    where = f"{storage.name}/{name}"
    try:
        found = json.loads(storage.read(name), object_pairs_hook=_once)
    except (ValueError, RecursionError) as err:
        raise BadInput(f"{where} is not sound JSON: {err}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{where} does not hold a JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


@dataclass
class WeightFiles:
    """The tensors of a checkpoint and everything that is wrong with its files.

    Use it in a `with` block: each thread that reads keeps one file open until its end.
    """

    storage: Storage
    tensors: dict[str, Stored] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Faults of headers and index, one line each; tensors of sound files are there all the same."""
    _own: threading.local = field(default_factory=threading.local)
    _open: set[OpenFile] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, source: Path | Storage) -> Self:
        """Read index and headers. Raises BadInput: no folder, or no safetensors file in it."""
        storage = LocalFiles(source) if isinstance(source, Path) else source
        found = cls(storage)
        sizes = storage.sizes()
        present = sorted(name for name in sizes if name.endswith(".safetensors"))
        if not present:
            raise BadInput(f"{storage.name} is not a checkpoint: it has no *.safetensors", _REMEDY)
        for name in present:
            try:
                tensors = _header(storage, name, sizes[name])
            except BadInput as err:
                found.problems.append(err.message)
                continue
            except (ValueError, RecursionError) as err:
                found.problems.append(f"{name}: {err}")
                continue
            for tensor in tensors:
                if tensor.name in found.tensors:
                    found.problems.append(
                        f"{tensor.name}: in {found.tensors[tensor.name].file} and in {name}"
                    )
                else:
                    found.tensors[tensor.name] = tensor
        found.problems.extend(found._index_problems(present, INDEX in sizes))
        return found

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.storage.name

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in one of its files. Raises as `object_in`."""
        return object_in(self.storage, name)

    def _index_problems(self, present: list[str], indexed: bool) -> list[str]:
        if not indexed:
            return [] if present == [SINGLE] else [f"{len(present)} shards and no {INDEX}"]
        try:
            weight_map = self.object(INDEX).get("weight_map")
        except BadInput as err:
            return [err.message]
        if not isinstance(weight_map, dict):
            return [f"{INDEX} has no weight_map"]
        problems = [
            f"index: {name}: it is said to be in {file}, which does not exist"
            for name, file in weight_map.items()
            if file not in present
        ]
        for name, file in weight_map.items():
            have = self.tensors.get(name)
            if have is None and file in present:
                problems.append(f"index: {name}: it is said to be in {file}, where it is not")
            elif have is not None and file in present and have.file != file:
                problems.append(f"index: {name}: it is in {have.file}, the index says {file}")
        problems.extend(
            f"index: {name}: it is in {have.file} but not in the index"
            for name, have in self.tensors.items()
            if name not in weight_map
        )
        return problems

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._open:
            handle.close()
        self._open.clear()
        self._own = threading.local()

    def read(self, tensor: Stored, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor's data. Raises as `OpenFile.fill`."""
        data = np.empty(end - begin, np.uint8)
        self._file(tensor.file).fill(data.data, tensor.start + begin)
        return data

    def _file(self, name: str) -> OpenFile:
        """This thread's open file; another one that it had open is closed."""
        held: tuple[str, OpenFile] | None = getattr(self._own, "held", None)
        if held is not None and held[0] == name:
            return held[1]
        handle = self.storage.open(name)
        with self._lock:
            self._open.add(handle)
            if held is not None:
                self._open.discard(held[1])
        if held is not None:
            held[1].close()
        self._own.held = (name, handle)
        return handle

    def rows(self, tensor: Stored, first: int, last: int) -> NDArray[np.uint8]:
        """The bytes of rows [first, last) of a matrix."""
        width = tensor.shape[1] * ITEM_BYTES[tensor.dtype]
        return self.read(tensor, first * width, last * width)

    def integers(self, tensor: Stored) -> tuple[int, ...]:
        """The values of a small tensor of int32 or int64."""
        data = self.read(tensor, 0, tensor.nbytes)
        return tuple(int(value) for value in data.view({"I32": "<i4", "I64": "<i8"}[tensor.dtype]))


def _header(storage: Storage, file: str, size: int) -> list[Stored]:
    if size < 8:
        raise ValueError(f"truncated: {size} bytes are too few for its header")
    with contextlib.closing(storage.open(file)) as handle:
        first = bytearray(8)
        handle.fill(memoryview(first), 0)
        length = int.from_bytes(first, "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"truncated: {size} bytes are too few for its header")
        text = bytearray(length)
        handle.fill(memoryview(text), 8)
    document = json.loads(text, object_pairs_hook=_once)
    if not isinstance(document, dict):
        raise ValueError("its header is not a JSON object")
    tensors, position = [], 8 + length
    entries = [(name, entry) for name, entry in document.items() if name != "__metadata__"]
    try:
        entries.sort(key=lambda pair: (pair[1]["data_offsets"][0], pair[1]["data_offsets"][1]))
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            tensor = Stored(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + begin)
            natural = all(type(number) is int and number >= 0 for number in (begin, end, *tensor.shape))
            if not natural or end - begin != tensor.nbytes:
                raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} does not fill its offsets")
            if tensor.start != position:
                raise ValueError(f"{name}: its data does not begin where the tensor before it ends")
            position = tensor.start + tensor.nbytes
            tensors.append(tensor)
    except (KeyError, TypeError, IndexError) as err:
        raise ValueError(f"its header has a malformed entry ({err!r})") from None
    if position != size:
        raise ValueError(f"{'truncated' if position > size else 'too long'}: {size} bytes, not {position}")
    return tensors
