"""Sealed directories: complete or continued, and every changed byte is found."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from packager.artifact import (
    JOURNAL_NAME,
    ArtifactWriter,
    Manifest,
    check,
    is_sealed,
    read_manifest,
    sealed_for,
)
from packager.errors import BadInput, IntegrityFailure

KEY = {"stage": "test", "recipe_digest": "sha256:0", "inputs": {"source": "sha256:1"}}


def writer(path: Path, **changes: object) -> ArtifactWriter:
    return ArtifactWriter(path, **{**KEY, **changes})  # type: ignore[arg-type]


def seal(path: Path) -> Manifest:
    with writer(path) as out:
        out.write_bytes("data/a.bin", b"a" * 100)
        out.write_json("b.json", {"two": 2, "one": 1})
        return out.seal({"figure": 1.5})


def test_the_digest_is_the_hash_of_the_manifest_file_and_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = seal(tmp_path / "x"), seal(tmp_path / "deep" / "y")
    assert first.digest == second.digest
    text = (tmp_path / "x" / "manifest.json").read_bytes()
    assert first.digest == "sha256:" + hashlib.sha256(text).hexdigest()
    assert str(tmp_path).encode() not in text
    assert [entry.path for entry in first.files] == ["b.json", "data/a.bin"]
    assert first.files[1].sha256 == hashlib.sha256(b"a" * 100).hexdigest()
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["b.json", "data", "manifest.json"]
    assert read_manifest(tmp_path / "x") == check(tmp_path / "x") == first


def test_an_unfinished_directory_is_not_sealed_and_goes_on_with_its_finished_files(tmp_path: Path) -> None:
    out = tmp_path / "x"
    with writer(out) as first:
        entry = first.write_text("a", "one")
        (first.scratch / "state").write_text("7")
        (out / "torn.part").write_text("half")
    assert not is_sealed(out)
    with pytest.raises(BadInput, match="unfinished"):
        read_manifest(out)
    before = (out / "a").stat().st_mtime_ns
    with writer(out) as again:
        assert again.done("a") == entry
        assert again.done("b") is None
        assert (again.scratch / "state").read_text() == "7"
        assert not (out / "torn.part").exists()
        again.write_text("b", "two")
        manifest = again.seal({})
    assert (out / "a").stat().st_mtime_ns == before
    assert [entry.path for entry in manifest.files] == ["a", "b"]


@pytest.mark.parametrize("change", [{"stage": "other"}, {"recipe_digest": "x"}, {"inputs": {}}])
def test_work_for_another_recipe_or_input_is_discarded(tmp_path: Path, change: dict[str, object]) -> None:
    with writer(tmp_path / "x") as first:
        first.write_text("a", "one")
    with writer(tmp_path / "x", **change) as again:
        assert again.done("a") is None
        assert not (tmp_path / "x" / "a").exists()


def test_a_file_changed_or_removed_between_runs_is_written_again(tmp_path: Path) -> None:
    with writer(tmp_path / "x") as first:
        first.write_text("a", "one")
        first.write_text("b", "two")
        first.write_text("c", "three")
    (tmp_path / "x" / "a").write_text("eno")
    (tmp_path / "x" / "b").unlink()
    with writer(tmp_path / "x") as again:
        assert (again.done("a"), again.done("b")) == (None, None)
        assert again.done("c") is not None


def test_a_torn_last_journal_line_costs_only_its_own_file(tmp_path: Path) -> None:
    with writer(tmp_path / "x") as first:
        first.write_text("a", "one")
        first.write_text("b", "two")
    journal = tmp_path / "x" / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-9])
    with writer(tmp_path / "x") as again:
        assert again.done("a") is not None
        assert again.done("b") is None


def test_a_folder_with_other_peoples_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match=r"thesis\.txt"), writer(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_sealed_artifact_is_never_opened_again(tmp_path: Path) -> None:
    seal(tmp_path / "x")
    with pytest.raises(BadInput, match="finished artifact"), writer(tmp_path / "x"):
        pass
    assert check(tmp_path / "x")


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from packager.artifact import ArtifactWriter\n"
        "with ArtifactWriter(Path(sys.argv[1]), stage='test', recipe_digest='sha256:0',"
        " inputs={'source': 'sha256:1'}): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    with writer(tmp_path / "x"):
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "BadInput: another process is writing" in refused.stderr
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with writer(tmp_path / "x") as out:
        with pytest.raises(ZeroDivisionError), out.create("a") as handle:
            handle.write(b"1")
            raise ZeroDivisionError
        assert [p.name for p in (tmp_path / "x").iterdir()] == [JOURNAL_NAME]
        with pytest.raises(ValueError):
            out.write_json("b", {"x": float("nan")})
        assert out.done("b") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_the_work_goes_on_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(handle: int) -> None:  # noqa: ARG001
        raise OSError(number, os.strerror(number))

    with writer(tmp_path / "x") as out:
        out.write_text("a", "one")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(BadInput, match="disk is full"):
                out.write_text("b", "two")
        assert not (tmp_path / "x" / "b").exists()
    with writer(tmp_path / "x") as again:
        assert again.done("a") is not None
        again.write_text("b", "two")
        assert again.seal({}).entry("b") is not None


def test_a_target_that_cannot_be_written_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (Path("/proc/packager-artifact"), tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(BadInput, match="cannot write"), writer(target):
            pass


def test_one_changed_byte_a_missing_and_a_stray_file_are_each_named(tmp_path: Path) -> None:
    seal(tmp_path / "x")
    data = tmp_path / "x" / "data" / "a.bin"
    data.write_bytes(b"a" * 99 + b"b")
    check(tmp_path / "x", deep=False)
    with pytest.raises(IntegrityFailure, match=r"changed: data/a\.bin"):
        check(tmp_path / "x")
    data.unlink()
    (tmp_path / "x" / "extra").write_text("")
    with pytest.raises(IntegrityFailure) as caught:
        check(tmp_path / "x", deep=False)
    assert "missing: data/a.bin" in caught.value.message
    assert "stray: extra" in caught.value.message
    assert "b.json" not in caught.value.message


def test_files_that_a_hub_client_leaves_may_be_ignored_by_name_only(tmp_path: Path) -> None:
    seal(tmp_path / "x")
    (tmp_path / "x" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "x" / ".cache" / "huggingface" / "a.lock").write_text("")
    with pytest.raises(IntegrityFailure, match="stray"):
        check(tmp_path / "x")
    check(tmp_path / "x", ignore=[".cache/huggingface/*"])


def test_sealing_refuses_a_file_that_nobody_recorded(tmp_path: Path) -> None:
    with writer(tmp_path / "x") as out:
        (tmp_path / "x" / "model.bin").write_text("?")
        with pytest.raises(IntegrityFailure, match=r"model\.bin"):
            out.seal({})
        assert not is_sealed(tmp_path / "x")
        out.adopt("model.bin")
        assert out.seal({}).entry("model.bin") is not None


def test_a_link_shares_the_bytes_and_may_be_made_twice(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("weights")
    with writer(tmp_path / "x") as out:
        out.link("a", tmp_path / "source", None)
        entry = out.link("a", tmp_path / "source", hashlib.sha256(b"weights").hexdigest())
        out.seal({})
    assert (tmp_path / "x" / "a").samefile(tmp_path / "source")
    assert check(tmp_path / "x").entry("a") == entry


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="needs a second file system",
)
def test_across_file_systems_a_link_becomes_a_copy_that_is_compared_with_its_hash(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"packager-test-{os.getpid()}"
    other.write_text("weights")
    try:
        with writer(tmp_path / "x") as out:
            out.link("a", other, hashlib.sha256(b"weights").hexdigest())
            with pytest.raises(IntegrityFailure, match="not the file that was sealed"):
                out.link("b", other, "0" * 64)
            assert not (tmp_path / "x" / "b").exists()
            out.seal({})
        assert not (tmp_path / "x" / "a").samefile(other)
        check(tmp_path / "x")
    finally:
        other.unlink()


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/../b", "a\\b", "", "manifest.json", ".scratch/a", "a.part"]
)
def test_no_file_escapes_the_artifact_or_takes_a_reserved_name(tmp_path: Path, name: str) -> None:
    with writer(tmp_path / "x") as out, pytest.raises(ValueError):
        out.write_bytes(name, b"")


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m["files"].append({**m["files"][0], "path": "../../etc/passwd"}),
        lambda m: m["files"].reverse(),
        lambda m: m["files"].append(m["files"][-1]),
        lambda m: m["files"][0].update(sha256="ABC"),
        lambda m: m["files"][0].update(size=-1),
        lambda m: m.update(surprise=1),
        lambda m: m.update(schema_version=2),
        lambda m: m.pop("stage"),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path: Path, damage: object) -> None:
    seal(tmp_path / "x")
    target = tmp_path / "x" / "manifest.json"
    document = json.loads(target.read_text())
    damage(document)  # type: ignore[operator]
    target.write_text(json.dumps(document))
    with pytest.raises(BadInput):
        read_manifest(tmp_path / "x")


def test_a_sealed_artifact_is_recognised_for_its_own_key_only(tmp_path: Path) -> None:
    manifest = seal(tmp_path / "x")
    assert sealed_for(tmp_path / "x", **KEY) == manifest  # type: ignore[arg-type]
    assert sealed_for(tmp_path / "x", **{**KEY, "inputs": {}}) is None  # type: ignore[arg-type]
    assert sealed_for(tmp_path / "none", **KEY) is None  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "x" / "data")
    with pytest.raises(IntegrityFailure, match="missing"):
        sealed_for(tmp_path / "x", **KEY)  # type: ignore[arg-type]
