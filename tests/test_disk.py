"""What the disks can do, told beside what is done."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MakeCheckpoint
from quantizing import contents, run

from packager.quantize import convert, stream
from packager.quantize.disk import DiskSpeed, probe


def test_reading_and_writing_take_turns() -> None:
    # 10 bytes read in 1 s, the 5 that they become written in 1 s.
    assert DiskSpeed(read=10.0, write=5.0).bound(0.5) == pytest.approx(10 / 2)
    assert DiskSpeed(read=10.0, write=5.0).bound(0.0) == 10.0


def test_a_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(bytes(1 << 20))
    out.mkdir()
    found = probe(source, out)
    assert found is not None and found.read > 0 and found.write > 0
    assert not list(out.iterdir())


def test_where_nothing_can_be_measured_nothing_is_said(tmp_path: Path) -> None:
    assert probe(tmp_path / "missing", tmp_path) is None
    (tmp_path / "source").write_bytes(b"x")
    assert probe(tmp_path / "source", tmp_path / "missing") is None


def test_progress_tells_the_speed_beside_that_of_the_disks(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(shards=2)
    run(source, tmp_path / "plain")
    monkeypatch.setattr(convert, "_WORTH_PROBING", 0)
    monkeypatch.setattr(stream, "_PROGRESS_SECONDS", 0.0)
    lines: list[str] = []
    run(source, tmp_path / "probed", lines=lines)
    assert any("/s that the disks allow, " in line for line in lines)
    assert contents(tmp_path / "probed") == contents(tmp_path / "plain")
