"""Damaged safetensors headers and indexes from a seed, and the judgement of what our reader makes of them.

Every case is either refused with a ValueError or BadInput, or read exactly as the safetensors library does.

    python tests/damaged_headers.py --headers 200000 --indexes 20000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packager.checkpoint import Checkpoint
from packager.checkpoint.header import DTYPE_BYTES, header_length, header_of
from packager.checkpoint.source import INDEX_NAME
from packager.errors import BadInput

NUMBERS: list[Any] = [
    0, -1, 1, 2, 7, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**128, 10**400, -(2**63),
    True, False, None, 1.0, 0.0, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), "1", "", [], [1], {},
    {"a": 1},
]  # fmt: skip
NAMES = [
    "", "a", "__metadata__", "\x00", "\n", "\ud800", "\udfff\ud800", "é", "\U0001f600", "a" * 5000, "../a",
    "/etc/passwd", "a\\b", "\u2028", "\ufeff", "%s%n", "-0", "[[[",
]  # fmt: skip
DTYPES: list[Any] = [
    *DTYPE_BYTES, "F4", "F6_E2M3", "F8_E4M3FNUZ", "C64", "bf16", "BF16 ", "", None, 16, True, ["BF16"], {},
    "BF16\x00",
]  # fmt: skip
SHARDS: list[Any] = [
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "../model-00001-of-00002.safetensors", "/etc/passwd", "/etc/passwd.safetensors",
    "./model-00001-of-00002.safetensors", "..", ".", "", "x.safetensors", "sub/x.safetensors", "x.bin",
    "model\x00.safetensors", "\ud800.safetensors", "a" * 5000 + ".safetensors", ".safetensors",
    "..\\x.safetensors", "link.safetensors", None, 1, True, 1.5, [], ["x.safetensors"], {},
    "MODEL-00001-OF-00002.SAFETENSORS", "config.json", "model-00001-of-00002.safetensors\n",
    "-rf.safetensors",
]  # fmt: skip


def sound_header(rng: random.Random) -> tuple[list[tuple[str, Any]], int]:
    """Name and value pairs of a sound header, and the bytes of data it describes."""
    pairs: list[tuple[str, Any]] = []
    if rng.random() < 0.5:
        pairs.append(("__metadata__", {"format": "pt"}))
    position = 0
    for number in range(rng.randrange(5)):
        dtype = rng.choice(list(DTYPE_BYTES))
        shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(4))]
        count = 1
        for size in shape:
            count *= size
        end = position + count * DTYPE_BYTES[dtype]
        pairs.append((f"layer.{number}", {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}))
        position = end
    rng.shuffle(pairs)
    return pairs, position


def _json(pairs: list[tuple[str, Any]]) -> bytes:
    """An object with these members in this order, names that occur twice kept, surrogates as escapes."""
    members = (f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)
    return ("{" + ",".join(members) + "}").encode()


def _an_entry(rng: random.Random, pairs: list[tuple[str, Any]]) -> dict[str, Any] | None:
    found = [value for _, value in pairs if isinstance(value, dict) and "dtype" in value]
    return rng.choice(found) if found else None


def _numbers(rng: random.Random, pairs: list[tuple[str, Any]]) -> list[Any]:
    """A shape or pair of offsets that holds something; empty if none was met with."""
    entry = _an_entry(rng, pairs)
    where = entry.get(rng.choice(("shape", "data_offsets"))) if entry is not None else None
    return where if isinstance(where, list) else []


def _change_number(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if where := _numbers(rng, pairs):
        where[rng.randrange(len(where))] = rng.choice(NUMBERS)


def _shift_number(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if where := _numbers(rng, pairs):
        at = rng.randrange(len(where))
        if type(where[at]) is int:
            where[at] += rng.choice((-8, -1, 1, 8, 2**32, 2**63))


def _change_field(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if entry := _an_entry(rng, pairs):
        entry[rng.choice([*entry, "dtype"])] = rng.choice([*NUMBERS, [2**40, 2**40, 0], [0, 2**63], [1] * 70])


def _change_dtype(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if entry := _an_entry(rng, pairs):
        entry["dtype"] = rng.choice(DTYPES)


def _drop_field(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if entry := _an_entry(rng, pairs):
        entry.pop(rng.choice([*entry, "dtype"]), None)


def _add_field(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if entry := _an_entry(rng, pairs):
        entry[rng.choice(("strides", "Dtype", "", "__metadata__"))] = rng.choice(NUMBERS)


def _reshape(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    """Another shape of, mostly, the same number of elements: sound, or overflowing on the way."""
    if entry := _an_entry(rng, pairs):
        shape = entry["shape"] if isinstance(entry.get("shape"), list) else []
        extra: list[list[int]] = [[1], [1] * 40, [0, 2**62], [2**62, 2**62, 0], [1, 1, 1]]
        entry["shape"] = [*rng.choice(extra), *shape]


def _rename(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if pairs:
        at = rng.randrange(len(pairs))
        pairs[at] = (rng.choice(NAMES), pairs[at][1])


def _repeat(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if pairs:
        pairs.append(rng.choice(pairs))


def _swap(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    entries = [value for _, value in pairs if isinstance(value, dict) and "data_offsets" in value]
    if len(entries) > 1:
        first, second = rng.sample(entries, 2)
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def _remove(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    if pairs:
        pairs.pop(rng.randrange(len(pairs)))


def _metadata(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    value = rng.choice([*NUMBERS, {"a": "b"}, {"\ud800": "x"}, {"x": "\ud800"}, {"a": {}}, {"": ""}])
    pairs.append(("__metadata__", value))


def _empty_tensor(rng: random.Random, pairs: list[tuple[str, Any]]) -> None:
    at = rng.choice((0, 1, 8))
    pairs.append((f"empty.{rng.random()}", {"dtype": "F32", "shape": [0], "data_offsets": [at, at]}))


STRUCTURAL: list[Callable[[random.Random, list[tuple[str, Any]]], None]] = [
    _change_number, _shift_number, _change_field, _change_dtype, _drop_field, _add_field, _reshape, _rename,
    _repeat, _swap, _remove, _metadata, _empty_tensor,
]  # fmt: skip


def _damage_text(rng: random.Random, text: bytes) -> bytes:
    """Damage of the JSON text itself."""
    kind = rng.randrange(12)
    at = rng.randrange(len(text) + 1)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    if kind == 2:
        return text[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(4))) + text[at:]
    if kind == 3:
        return rng.choice((b" ", b"\n", b"\xef\xbb\xbf", b"\x00", b"null", b"/**/")) + text
    if kind == 4:
        return text + rng.choice((b" ", b"   \t", b"\x00", b"{}", b",", b"//"))
    if kind == 5:
        opening = rng.choice((b"[", b'{"a":', b'[{"a":'))
        return text[:-1] + b',"z":' + opening * rng.choice((10, 900, 5000))
    if kind == 6:
        digits = rng.choice(
            (b"-0", b"0" * 3, b"01", b"1e2", b"1E400", b"9" * 30, b"9" * 5000, b"0x1", b"1_0", b"NaN")
        )
        return text.replace(b"0", digits, 1)
    if kind == 7:
        return text.replace(b'"', rng.choice((b"'", b"", b'\\"', b"\\u0022")), rng.randrange(3))
    if kind == 8:
        return text.replace(
            b"l", rng.choice((b"\\ud83d", b"\\uD800\\uDC00", b"\xff", b"\xc0\x80", b"\\x")), 1
        )
    if kind == 9:
        return text * 2
    if kind == 10:
        return rng.choice((b"", b"{", b"[]", b"null", b"{}", b'"x"', b"1", b"{}" * 3, b'{"a":{}}'))
    return text.replace(b",", rng.choice((b",,", b"", b";", b", ")), 1)


def damaged_file(rng: random.Random) -> bytes:
    """A whole small safetensors file with none, one or several things wrong."""
    pairs, data = sound_header(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        rng.choice(STRUCTURAL)(rng, pairs)
    text = _json(pairs)
    if rng.random() < 0.3:
        text = _damage_text(rng, text)
    if rng.random() < 0.3:
        text += b" " * (-len(text) % 8)
    length = len(text)
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, length + data, 2**31, 2**63, 2**64 - 1))
        length = min(max(length, 0), 2**64 - 1)
    if rng.random() < 0.15:
        data = max(0, data + rng.choice((-8, -1, 1, 8, 1000)))
    whole = struct.pack("<Q", length) + text + rng.randbytes(data)
    return whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.05 else whole


def judge_header(whole: bytes) -> str:
    """`accepted`, or the kind of refusal; AssertionError if ours and the library's reading differ."""
    from safetensors import SafetensorError, deserialize

    try:
        length = header_length(whole[:8], len(whole))
        header = header_of(whole[8 : 8 + length], len(whole), "x.safetensors")
    except ValueError as err:
        reason = str(err)
        assert reason, "a refusal without a reason"
        assert len(reason) < 3000, f"a reason of {len(reason)} characters"
        reason.encode()
        return "refused"
    try:
        theirs = dict(deserialize(whole))
    except SafetensorError as err:
        raise AssertionError(f"accepted what the library refuses ({err}): {whole[:300]!r}") from None
    assert set(theirs) == set(header.tensors), f"other tensors: {whole[:300]!r}"
    for name, info in header.tensors.items():
        begin = header.data_start + info.begin
        mine = {"dtype": info.dtype, "shape": list(info.shape), "data": whole[begin : begin + info.nbytes]}
        for key, value in mine.items():
            assert theirs[name][key] == value, f"{name} {key}: {whole[:300]!r}"
    return "accepted"


def sound_index() -> dict[str, Any]:
    """The index of the folder that `index_folder` makes."""
    first, second = SHARDS[:2]
    return {"metadata": {"total_size": 24}, "weight_map": {"a": first, "b": first, "c": second}}


def index_folder(path: Path) -> None:
    """Two sound shards: a and b, and c."""
    import numpy as np
    from safetensors.numpy import save_file

    save_file({name: np.full(2, 1, np.float32) for name in "ab"}, path / SHARDS[0])
    save_file({"c": np.full(2, 1, np.float32)}, path / SHARDS[1])


def damaged_index(rng: random.Random) -> bytes:
    """The text of an index with none, one or several things wrong."""
    index = sound_index()
    weight_map: Any = index["weight_map"]
    for _ in range(rng.choice((0, 1, 1, 2))):
        kind = rng.randrange(6)
        if not isinstance(weight_map, dict):
            break
        if kind == 0 and weight_map:
            weight_map[rng.choice(list(weight_map))] = rng.choice(SHARDS)
        elif kind == 1:
            weight_map[rng.choice([*NAMES, "ghost"])] = rng.choice(SHARDS)
        elif kind == 2 and weight_map:
            weight_map.pop(rng.choice(list(weight_map)))
        elif kind == 3:
            weight_map = index["weight_map"] = rng.choice([*NUMBERS, list(weight_map), "x"])
        elif kind == 4:
            index["metadata"] = rng.choice(NUMBERS)
        elif kind == 5:
            index.pop(rng.choice(list(index)), None)
            weight_map = index.get("weight_map")
    text = json.dumps(index).encode()
    if rng.random() < 0.1:
        text = text.replace(b'"a":', b'"c":', 1)
    return _damage_text(rng, text) if rng.random() < 0.3 else text


def judge_index(folder: Path, text: bytes) -> str:
    """`accepted` or `refused`; AssertionError if a damaged index is believed."""
    (folder / INDEX_NAME).write_bytes(text)
    try:
        opened = Checkpoint.open(folder)
    except BadInput as err:
        assert err.message
        assert len(err.message) < 70_000, f"a message of {len(err.message)} characters"
        return "refused"
    assert json.loads(text)["weight_map"] == sound_index()["weight_map"], f"believed: {text[:300]!r}"
    assert {name: info.shard for name, info in opened.tensors.items()} == sound_index()["weight_map"]
    return "accepted"


def run_cases(headers: int, indexes: int, seed: int) -> Counter[str]:
    """Judge so many cases; how many were accepted and refused, by kind. AssertionError names the seed."""
    counted: Counter[str] = Counter()
    for number in range(headers):
        whole = damaged_file(random.Random(f"header {seed} {number}"))
        try:
            counted[f"headers {judge_header(whole)}"] += 1
        except Exception as err:
            raise AssertionError(f"header {number} of seed {seed}: {err!r}\n{whole[:1000]!r}") from err
    with tempfile.TemporaryDirectory() as scratch:
        index_folder(Path(scratch))
        for number in range(indexes):
            text = damaged_index(random.Random(f"index {seed} {number}"))
            try:
                counted[f"indexes {judge_index(Path(scratch), text)}"] += 1
            except Exception as err:
                raise AssertionError(f"index {number} of seed {seed}: {err!r}\n{text[:1000]!r}") from err
    return counted


def main() -> None:
    """Run the cases asked for and print how many were accepted and refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--headers", type=int, default=200_000)
    parser.add_argument("--indexes", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    start = time.process_time()
    counted = run_cases(asked.headers, asked.indexes, asked.seed)
    sys.stdout.write(f"{dict(sorted(counted.items()))} in {time.process_time() - start:.1f} s of CPU\n")


if __name__ == "__main__":
    main()
