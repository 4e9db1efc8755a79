"""Tensors in safetensors files, read row by row: a second reader, kept apart from the one that packager uses.

Format: 8 bytes little-endian header length, a JSON header, then the data; offsets count from the data section
(github.com/huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except OSError as err:
        raise BadInput(
            f"cannot read {path}: {err.strerror}", "Give the folder that holds config.json and *.safetensors."
        ) from None
    except (ValueError, RecursionError) as err:
        raise BadInput(f"{path} is not sound JSON: {err}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} does not hold a JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


@dataclass
class WeightFiles:
    """The tensors of a checkpoint folder and everything that is wrong with its files.

    Use it in a `with` block: files stay open until its end. Reads may come from several threads.
    """

    path: Path
    tensors: dict[str, Stored] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Faults of headers and index, one line each; tensors of sound files are there all the same."""
    _open: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read index and headers. Raises BadInput: no folder, or no safetensors file in it."""
        found = cls(path)
        if not path.is_dir():
            raise BadInput(f"no folder {path}", "Give the folder that holds config.json and *.safetensors.")
        present = sorted(entry.name for entry in path.glob("*.safetensors"))
        if not present:
            raise BadInput(
                f"{path} is not a checkpoint: it has no *.safetensors",
                "Give the folder that holds config.json and *.safetensors.",
            )
        for name in present:
            try:
                tensors = _header(path / name)
            except (OSError, ValueError, RecursionError) as err:
                found.problems.append(f"{name}: {err}")
                continue
            for tensor in tensors:
                if tensor.name in found.tensors:
                    found.problems.append(
                        f"{tensor.name}: in {found.tensors[tensor.name].file} and in {name}"
                    )
                else:
                    found.tensors[tensor.name] = tensor
        found.problems.extend(found._index_problems(present))
        return found

    def _index_problems(self, present: list[str]) -> list[str]:
        index = self.path / INDEX
        if not index.is_file():
            return [] if present == [SINGLE] else [f"{len(present)} shards and no {INDEX}"]
        try:
            weight_map = read_object(index).get("weight_map")
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
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def read(self, tensor: Stored, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor's data. Raises BadInput: an unreadable file, or one cut short."""
        try:
            with self._lock:
                if tensor.file not in self._open:
                    self._open[tensor.file] = os.open(self.path / tensor.file, os.O_RDONLY)
            handle, data = self._open[tensor.file], b""
            while len(data) < end - begin:  # Linux reads at most 2 GiB at a time
                more = os.pread(handle, end - begin - len(data), tensor.start + begin + len(data))
                if not more:
                    raise BadInput(f"{self.path / tensor.file} ended within {tensor.name}")
                data += more
        except OSError as err:
            raise BadInput(f"cannot read {self.path / tensor.file}: {err.strerror}") from None
        return np.frombuffer(data, np.uint8)

    def rows(self, tensor: Stored, first: int, last: int) -> NDArray[np.uint8]:
        """The bytes of rows [first, last) of a matrix."""
        width = tensor.shape[1] * ITEM_BYTES[tensor.dtype]
        return self.read(tensor, first * width, last * width)

    def integers(self, tensor: Stored) -> tuple[int, ...]:
        """The values of a small tensor of int32 or int64."""
        data = self.read(tensor, 0, tensor.nbytes)
        return tuple(int(value) for value in data.view({"I32": "<i4", "I64": "<i8"}[tensor.dtype]))


def _header(path: Path) -> list[Stored]:
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"truncated: {size} bytes are too few for its header")
        document = json.loads(handle.read(length), object_pairs_hook=_once)
    if not isinstance(document, dict):
        raise ValueError("its header is not a JSON object")
    tensors, position = [], 8 + length
    entries = [(name, entry) for name, entry in document.items() if name != "__metadata__"]
    try:
        entries.sort(key=lambda pair: (pair[1]["data_offsets"][0], pair[1]["data_offsets"][1]))
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            tensor = Stored(name, entry["dtype"], tuple(entry["shape"]), path.name, 8 + length + begin)
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
