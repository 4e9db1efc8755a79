"""The header of a safetensors file, read without trusting the file and written byte for byte predictably.

Format (github.com/huggingface/safetensors, README "Format"): 8 bytes little-endian header length, the header
as JSON, then the data. Each tensor has a dtype, a shape and data offsets; together they cover the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from packager.errors import BadInput

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes an element; dtypes that are not here are refused."""


def readable_bytes(count: int) -> str:
    """A size for people: `1.29 GB`, `24.0 MB` (powers of ten)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str
    """As safetensors spells it: BF16, F32, F8_E4M3 …"""
    shape: tuple[int, ...]
    begin: int
    """Offset of the first byte within the file's data section."""
    shard: str = ""
    """File name within the checkpoint."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardHeader:
    """The header of one file."""

    data_start: int
    """Offset of the data section in the file."""
    size: int
    """Bytes of the whole file."""
    tensors: dict[str, TensorInfo]
    """In the order of their data."""
    metadata: dict[str, str]


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the name {twice[0]!r} occurs twice")
    return found


def _natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def _tensor(name: str, raw: Any, shard: str) -> tuple[TensorInfo, int]:
    """One entry and the end of its data; ValueError says what is wrong with it."""
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: an entry needs dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"{name}: unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise ValueError(f"{name}: malformed shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise ValueError(f"{name}: malformed data_offsets {offsets!r}")
    info = TensorInfo(name, dtype, tuple(shape), offsets[0], shard)
    if offsets[1] - offsets[0] != info.nbytes:
        raise ValueError(
            f"{name}: {dtype} {shape} is {info.nbytes} bytes, its offsets span {offsets[1] - offsets[0]}"
        )
    return info, offsets[1]


def parse_header(
    text: bytes, data_bytes: int, shard: str = ""
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in data order) and metadata of a header whose data section has `data_bytes` bytes.

    Raises:
        ValueError: not JSON, a name twice, an ill-formed entry, gaps, overlaps, or data of another length.
    """
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except UnicodeDecodeError:
        raise ValueError("the header is not UTF-8") from None
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    except json.JSONDecodeError as err:
        raise ValueError(f"the header is not JSON: {err}") from None
    if not isinstance(raw, dict):
        raise ValueError("the header is not a JSON object")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    entries = sorted(
        (_tensor(name, entry, shard) for name, entry in raw.items()),
        key=lambda found: (found[0].begin, found[1]),
    )
    position = 0
    for info, end in entries:
        if info.begin != position:
            what = "overlaps the tensor before it" if info.begin < position else "leaves a gap before it"
            raise ValueError(f"{info.name}: its data {what} (at byte {info.begin}, expected {position})")
        position = end
    if position != data_bytes:
        what = "truncated" if position > data_bytes else "longer than its header says"
        raise ValueError(f"the file is {what}: {data_bytes} bytes of data, the header describes {position}")
    return {info.name: info for info, _ in entries}, metadata


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of a safetensors file.

    Raises:
        BadInput: the file is missing, truncated or inconsistent; the message names the file and the fault.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            prefix = handle.read(8)
            if len(prefix) < 8:
                raise ValueError("shorter than a safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise ValueError(
                    f"the header claims {length} bytes; the format's limit is {MAX_HEADER_BYTES}"
                )
            if 8 + length > size:
                raise ValueError(f"truncated within the header ({size} bytes, header needs {8 + length})")
            text = handle.read(length)
        tensors, metadata = parse_header(text, size - 8 - length, path.name)
    except OSError as err:
        raise BadInput(f"cannot read {path}: {err.strerror}") from None
    except ValueError as err:
        raise BadInput(f"{path} is not a sound safetensors file: {err}", "Download the file again.") from None
    return ShardHeader(8 + length, size, tensors, metadata)


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a file (length, JSON, padding to 8 bytes) for (name, dtype, shape) in data order."""
    document: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, dtype, shape in tensors:
        end = position + prod(shape) * DTYPE_BYTES[dtype]
        if name in document:
            raise ValueError(f"tensor {name} twice in one shard")
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
