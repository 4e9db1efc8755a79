"""The header of a safetensors file, read without trusting the file and written byte for byte predictably.

Format (github.com/huggingface/safetensors, README "Format"): 8 bytes little-endian header length, the header
as JSON, then the data. Each tensor has a dtype, a shape and data offsets; together they cover the data.
"""

from __future__ import annotations

import json
import reprlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from packager.artifact.strict_json import unique_names
from packager.errors import BadInput

MAX_HEADER_BYTES = 1 << 25
"""Room for 200,000 tensors in one file. The library's own limit is 100 MB; parsed JSON takes many times its
size in memory, and a header is parsed before anything else about a file is known."""
MAX_DIMENSIONS = 32
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_ADDRESSABLE = 1 << 60
_FREE_VALUES, _BYTES_A_VALUE = 100_000, 4
"""A long header may hold one value in 4 bytes: a tensor's entry has a dozen in 60 or more. Emptier values
(`[],[],[]`) would fill the memory from a small file."""

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


@dataclass(frozen=True, slots=True)
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


def _brief(value: Any) -> str:
    """A value out of a file as messages show it: escaped, and cut where it is long or deep."""
    return f"{value[:200]!r}" if isinstance(value, str) else reprlib.repr(value)


def _whole(digits: str) -> int:
    if digits.startswith("-0"):
        raise ValueError("a number is -0")  # Python reads an integer, the format's own reader none
    return int(digits)


def _decode(text: bytes) -> dict[str, Any]:
    """The JSON object of a header; ValueError says why there is none."""
    values = sum(map(text.count, (b",", b"[", b"{")))
    if values > _FREE_VALUES + len(text) // _BYTES_A_VALUE:
        raise ValueError("the header has more values than tensors could need")
    try:
        decoded = text.decode("utf-8")
        hook = _whole if b"-0" in text else None
        raw = json.loads(decoded, object_pairs_hook=unique_names, parse_int=hook)
    except UnicodeDecodeError:
        raise ValueError("the header is not UTF-8") from None
    except RecursionError:
        raise ValueError("the header is nested too deeply") from None
    except json.JSONDecodeError as err:
        raise ValueError(f"the header is not JSON: {err}") from None
    if type(raw) is not dict or not text.startswith(b"{"):
        raise ValueError("the header is not a JSON object")
    return raw


def _sizes(value: Any) -> bool:
    return type(value) is list and all(type(number) is int and 0 <= number < _ADDRESSABLE for number in value)


def _tensor(name: str, raw: Any, shard: str) -> tuple[TensorInfo, int]:
    """One entry and the end of its data; ValueError says what is wrong with it."""
    if type(raw) is not dict or raw.keys() != _FIELDS:
        raise ValueError(f"{_brief(name)}: an entry needs dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BYTES:
        raise ValueError(f"{_brief(name)}: unknown dtype {_brief(dtype)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{_brief(name)}: malformed shape {_brief(shape)}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{_brief(name)}: malformed data_offsets {_brief(offsets)}")
    begin, end = offsets
    info = TensorInfo(name, dtype, tuple(shape), begin, shard)
    nbytes = info.nbytes
    if nbytes == 0 and prod(filter(None, shape)) >= _ADDRESSABLE:
        raise ValueError(f"{_brief(name)}: malformed shape {_brief(shape)}")
    if end - begin != nbytes:
        raise ValueError(
            f"{_brief(name)}: {dtype} {_brief(shape)} is {_brief(nbytes)} bytes, "
            f"its offsets span {_brief(end - begin)}"
        )
    return info, end


def parse_header(
    text: bytes, data_bytes: int, shard: str = ""
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in data order) and metadata of a header whose data section has `data_bytes` bytes.

    What is accepted here, the safetensors library reads in the same way; what it would take but leaves open
    (a name twice, unknown fields, sizes that do not fit 63 bits) is refused.

    Raises:
        ValueError: not JSON, a name twice, an ill-formed entry, gaps, overlaps, or data of another length.
    """
    raw = _decode(text)
    metadata = raw.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    if b"\\u" in text:
        _refuse_surrogates((*raw, *metadata, *metadata.values()))
    entries = [_tensor(name, entry, shard) for name, entry in raw.items()]
    entries.sort(key=lambda found: (found[0].begin, found[1]))
    position = 0
    for info, end in entries:
        if info.begin != position:
            what = "overlaps the tensor before it" if info.begin < position else "leaves a gap before it"
            raise ValueError(
                f"{_brief(info.name)}: its data {what} (at byte {_brief(info.begin)}, expected {position})"
            )
        position = end
    if position != data_bytes:
        what = "truncated" if position > data_bytes else "longer than its header says"
        raise ValueError(f"the file is {what}: {data_bytes} bytes of data, the header describes {position}")
    return {info.name: info for info, _ in entries}, metadata


def _refuse_surrogates(texts: Iterable[str]) -> None:
    """Half a character, written as an escape, is a Python string but no text."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{_brief(text)} is not text") from None


def unsound(where: str, fault: ValueError) -> BadInput:
    """The error of a safetensors file whose header does not hold together."""
    return BadInput(f"{where} is not a sound safetensors file: {fault}", "Download the file again.")


def header_length(prefix: bytes, size: int) -> int:
    """Bytes of JSON that the first 8 bytes of a file of `size` bytes announce. ValueError: they cannot be."""
    if len(prefix) < 8 or size < 8:
        raise ValueError("shorter than a safetensors header")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"the header claims {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise ValueError(f"truncated within the header ({size} bytes, header needs {8 + length})")
    return int(length)


def header_of(text: bytes, size: int, name: str) -> ShardHeader:
    """The header of a file of `size` bytes from its JSON. ValueError: as `parse_header`."""
    tensors, metadata = parse_header(text, size - 8 - len(text), name)
    return ShardHeader(8 + len(text), size, tensors, metadata)


def read_header(path: Path) -> ShardHeader:
    """Read and check the header of a safetensors file.

    Raises:
        BadInput: the file is missing, truncated or inconsistent; the message names the file and the fault.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            text = handle.read(header_length(handle.read(8), size))
        return header_of(text, size, path.name)
    except OSError as err:
        raise BadInput(f"cannot read {path}: {err.strerror}") from None
    except ValueError as err:
        raise unsound(str(path), err) from None


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
