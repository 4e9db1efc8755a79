"""Damaged headers and indexes are refused with a reason, or read exactly as the safetensors library does."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import pytest
from damaged_headers import damaged_file, judge_header, run_cases

from packager.checkpoint import Checkpoint
from packager.checkpoint.header import MAX_HEADER_BYTES, header_of, parse_header, read_header
from packager.checkpoint.source import INDEX_NAME
from packager.errors import BadInput


def test_two_thousand_damaged_headers_and_indexes() -> None:
    counted = run_cases(headers=1700, indexes=300, seed=1)
    # Sound cases and damage that does no harm are among them, else only refusals were tested.
    assert all(count > 30 for count in counted.values())
    assert len(counted) == 4


@pytest.mark.slow
def test_two_hundred_thousand_damaged_headers_and_indexes() -> None:
    counted = run_cases(headers=200_000, indexes=5_000, seed=0)
    assert sum(counted.values()) == 205_000
    assert counted["headers accepted"] > 20_000


def test_the_judge_notices_a_reader_that_takes_what_the_library_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import damaged_headers

    text = b'{"a":{"dtype":"U8","shape":[1,-1],"data_offsets":[0,1]}}'
    sound = header_of(text.replace(b"[1,-1]", b"[1]"), len(text) - 3 + 9, "x")
    monkeypatch.setattr(damaged_headers, "header_of", lambda *_: sound)
    with pytest.raises(AssertionError, match="library refuses"):
        judge_header(struct.pack("<Q", len(text)) + text + b"x")


def test_cases_come_from_the_seed_alone() -> None:
    import random

    assert damaged_file(random.Random("7")) == damaged_file(random.Random("7"))
    assert len({damaged_file(random.Random(str(seed))) for seed in range(50)}) > 40


def _nested(opening: bytes) -> bytes:
    return b'{"a":' + opening * (MAX_HEADER_BYTES // len(opening) - 10)


def _many(member: bytes) -> bytes:
    return b'{"a":[' + member * (MAX_HEADER_BYTES // len(member) - 10) + member.rstrip(b",") + b"]}"


@pytest.mark.parametrize(
    "text",
    [
        _nested(b"["),
        _nested(b'{"a":'),
        _many(b"[],"),
        _many(b"{},"),
        _many(b"1,"),
        _many(b"-0,"),
        b'{"' + b"[" * (MAX_HEADER_BYTES - 20) + b'":1}',
        b'{"a":' + b"9" * (MAX_HEADER_BYTES - 20) + b"}",
        b'{"a":"' + b"\\ud800" * (MAX_HEADER_BYTES // 6 - 20) + b'"}',
        b" " * MAX_HEADER_BYTES,
        b"\xff" * MAX_HEADER_BYTES,
    ],
    ids=[
        "lists",
        "objects",
        "emptied",
        "members",
        "ones",
        "minus",
        "name",
        "digits",
        "escapes",
        "blank",
        "bytes",
    ],
)
def test_the_largest_header_takes_a_few_times_its_size_in_memory(text: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            parse_header(text, 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(text)
    assert len(str(caught.value)) < 3000


def test_a_length_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", 90_000_000))
        handle.truncate(100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="limit"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_one_name_twice_among_a_hundred_thousand_is_found_at_once() -> None:
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = [*range(100_000), 99_999]
    with pytest.raises(ValueError, match="'99999' occurs twice"):
        parse_header(("{" + ",".join(f'"{name}":{entry}' for name in names) + "}").encode(), 0)


def test_an_index_that_is_too_large_or_nested_is_refused(tmp_path: Path) -> None:
    index = tmp_path / INDEX_NAME
    index.write_bytes(b'{"weight_map":' + b"[" * 1_000_000)
    with pytest.raises(BadInput, match="not sound JSON"):
        Checkpoint.open(tmp_path)
    with index.open("wb") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(BadInput, match="not read"):
        Checkpoint.open(tmp_path)
    names = {f"t{at}": f"model-{at}.safetensors" for at in range(50_000)}
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(BadInput, match="and 49988 more"):
        Checkpoint.open(tmp_path)
