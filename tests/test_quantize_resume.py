"""Killed, interrupted, given another source, out of room: finished work is kept, the end is the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCheckpoint
from quantizing import SCHEMES, contents, run

from packager.artifact import JOURNAL_NAME, check, is_sealed
from packager.checkpoint import Checkpoint
from packager.errors import BadInput, IntegrityFailure
from packager.quantize import journal as tensor_journal
from packager.quantize.journal import TensorJournal
from packager.quantize.stream import Stream
from packager.recipe import QuantizeSpec, SchemeName


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "out"
    run(tiny_checkpoint, out)
    return out


def stopped_after(monkeypatch: pytest.MonkeyPatch, tensors: int, source: Path, out: Path) -> list[str]:
    """Run until that many tensors are in the journal, then fail; their names."""
    real, done = TensorJournal.add_tensor, []

    def counted(self: TensorJournal, tensor: tensor_journal.FinishedTensor) -> None:
        if len(done) == tensors:
            raise KeyboardInterrupt
        real(self, tensor)
        done.append(tensor.name)

    with monkeypatch.context() as patch:
        patch.setattr(TensorJournal, "add_tensor", counted)
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    return done


def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors whose bytes are written from now on, once a piece."""
    names: list[str] = []
    real = Stream._convert

    def noted(self: Stream, reader: Any, piece: Any) -> None:
        if piece.place:
            names.append(piece.work.info.name)
        real(self, reader, piece)

    monkeypatch.setattr(Stream, "_convert", noted)
    return names


# ---- killed ---------------------------------------------------------------------------------------------

KILLED_AT_STEP = """
import json, os, signal, sys
from pathlib import Path
import torch  # imported once here: each attempt is a fork, so it costs no import
import packager.artifact as artifact
from packager.quantize import quantize
from packager.quantize.journal import TensorJournal
from packager.recipe import QuantizeSpec

source, base = Path(sys.argv[1]), Path(sys.argv[2])
stride = int(sys.argv[3])

def attempt(out, kill_at):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    steps = 0
    def counted(real):
        def step(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return step
    os.fsync = counted(os.fsync)
    os.pwrite = counted(os.pwrite)
    os.preadv = counted(os.preadv)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    artifact.HashingFile.write = counted(artifact.HashingFile.write)
    TensorJournal._append = counted(TensorJournal._append)
    spec = QuantizeSpec(shard_bytes=60_000)
    quantize(source, out, spec, recipe_digest=spec.digest, progress=lambda _: None)
    (base.parent / "steps").write_text(str(steps))
    os._exit(0)

assert attempt(base / "undisturbed", -1) == 0
last = int((base.parent / "steps").read_text())
moments = sorted({*range(1, last, stride), *range(last - 5, last + 1)})
for moment in moments:
    out = base / str(moment)
    first = attempt(out, moment)
    assert os.WIFSIGNALED(first), first
    assert attempt(out, moment // 2 + 1) in (0, 9)  # and once more, elsewhere
    assert attempt(out, -1) == 0
print(json.dumps({"killed": len(moments)}))
"""


@pytest.mark.slow
def test_sigkill_at_any_step_and_again_ends_in_the_same_bytes(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path
) -> None:
    base = tmp_path / "outs"
    base.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", KILLED_AT_STEP, str(tiny_checkpoint), str(base), "17"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    outs = list(base.iterdir())
    assert json.loads(result.stdout)["killed"] == len(outs) - 1 > 15
    expected = contents(undisturbed)
    for out in outs:
        assert contents(out) == expected
        check(out)


def command(source: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "packager", "quantize", str(source), str(out), "--json", *options]


def kill_in_the_middle(source: Path, out: Path, moment: float, scheme: SchemeName = "fp8-block") -> bool:
    """Start the command and kill it once a share `moment` of the output is there; whether it was alive."""
    process = subprocess.Popen(
        command(source, out, "--shard-bytes", "700000", "--scheme", scheme),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    shrinks = 4 if scheme == "int4-g128" else 2
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / shrinks
    while process.poll() is None:
        with_weights = [file for file in out.rglob("*") if file.name.startswith("model-")]
        try:
            written = sum(file.stat().st_size for file in with_weights)
        except FileNotFoundError:  # renamed meanwhile
            continue
        if written >= moment * size:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough to take a second or so: a kill from outside meets it in the middle of the work."""
    from conftest import write_checkpoint

    path = tmp_path_factory.mktemp("larger") / "source"
    return write_checkpoint(path, num_experts=32, hidden_size=512, moe_intermediate_size=384)


def kill_and_resume(larger: Path, tmp_path: Path, kills: int, scheme: SchemeName = "fp8-block") -> None:
    expected = run(larger, tmp_path / "undisturbed", QuantizeSpec(shard_bytes=700_000, scheme=scheme))
    bytes_expected = contents(tmp_path / "undisturbed")
    chance = random.Random(7)
    killed = 0
    for number in range(kills):
        out = tmp_path / str(number)
        killed += kill_in_the_middle(larger, out, chance.random(), scheme)
        options = ("--shard-bytes", "700000", "--scheme", scheme)
        again = subprocess.run(command(larger, out, *options), capture_output=True, text=True, check=True)
        assert json.loads(again.stdout)["digest"] == expected.digest
        assert contents(out) == bytes_expected
        shutil.rmtree(out)
    assert killed > kills * 0.7


@pytest.mark.slow
def test_kills_from_outside_at_random_moments_leave_no_trace(larger: Path, tmp_path: Path) -> None:
    """As many as PACKAGER_KILLS says: 50 take four minutes."""
    kill_and_resume(larger, tmp_path, int(os.environ.get("PACKAGER_KILLS", "8")))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_kills_leave_no_trace_in_any_scheme(scheme: SchemeName, larger: Path, tmp_path: Path) -> None:
    kill_and_resume(larger, tmp_path, 3, scheme)


@pytest.mark.slow
def test_finished_shards_and_tensors_are_kept_when_the_command_is_killed(
    larger: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert kill_in_the_middle(larger, out, 0.5)
    assert not is_sealed(out)
    journal = [json.loads(line) for line in (out / JOURNAL_NAME).read_text().splitlines()[1:]]
    before = {line["path"]: (out / line["path"]).stat() for line in journal}
    assert len(before) >= 2
    again = subprocess.run(
        command(larger, out, "--shard-bytes", "700000"), capture_output=True, text=True, check=True
    )
    for name, was in before.items():
        now = (out / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == (was.st_ino, was.st_mtime_ns)
        assert f"{name}: kept from an earlier run" in again.stderr


# ---- what is done again, and what is not ----------------------------------------------------------------


@pytest.mark.parametrize("tensors", [1, 6, 20])
def test_finished_tensors_are_not_done_again(
    tiny_checkpoint: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensors: int,
) -> None:
    out = tmp_path / "out"
    finished = stopped_after(monkeypatch, tensors, tiny_checkpoint, out)
    names = converted(monkeypatch)
    run(tiny_checkpoint, out)
    assert len(finished) == tensors
    assert not set(finished) & set(names)
    assert set(finished) | set(names) == set(Checkpoint.open(tiny_checkpoint).tensors)
    assert contents(out) == contents(undisturbed)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_large_shard_is_continued_in_its_middle(
    scheme: SchemeName, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    one_shard = QuantizeSpec(scheme=scheme)
    expected = run(source, tmp_path / "undisturbed", one_shard)
    real = TensorJournal.add_tensor
    with monkeypatch.context() as patch:

        def fails_late(self: TensorJournal, tensor: tensor_journal.FinishedTensor) -> None:
            if len(self.tensors) == 15:
                raise KeyboardInterrupt
            real(self, tensor)

        patch.setattr(TensorJournal, "add_tensor", fails_late)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, one_shard)
    names = converted(monkeypatch)
    assert run(source, out, one_shard) == expected
    assert len(set(names)) == len(Checkpoint.open(source).tensors) - 15


def test_bytes_that_a_power_cut_took_are_made_again(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped_after(monkeypatch, 8, tiny_checkpoint, out)
    for part in (out / ".scratch").glob("*.safetensors"):
        os.truncate(part, part.stat().st_size // 2)
    run(tiny_checkpoint, out)
    assert contents(out) == contents(undisturbed)


def test_a_torn_line_of_the_journal_counts_for_nothing(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped_after(monkeypatch, 9, tiny_checkpoint, out)
    journal = out / ".scratch" / tensor_journal.JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-40])
    run(tiny_checkpoint, out)
    assert contents(out) == contents(undisturbed)


# ---- another source, another recipe ---------------------------------------------------------------------


def flip_last_byte(file: Path, *, keep_times: bool) -> None:
    status = file.stat()
    with file.open("r+b") as handle:
        handle.seek(-2, os.SEEK_END)
        byte = handle.read(1)[0]
        handle.seek(-2, os.SEEK_END)
        handle.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_source_that_changed_after_a_kill_is_noticed_and_all_is_made_anew(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_times: bool
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    finished = stopped_after(monkeypatch, 25, source, out)
    changed = source / "model-00001-of-00003.safetensors"  # read to its end, and converted
    assert set(Checkpoint.open(source).shards[changed.name].tensors) < set(finished)
    flip_last_byte(changed, keep_times=keep_times)
    lines: list[str] = []
    manifest = run(source, out, lines=lines)
    assert any("the source has changed since the last run" in line for line in lines)
    assert manifest.inputs == {"source": Checkpoint.open(source).digest()}
    assert manifest == run(source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_source_that_changed_in_a_file_read_in_part_is_noticed(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_checkpoint(), tmp_path / "out"
    stopped_after(monkeypatch, 10, source, out)
    opened = Checkpoint.open(source)
    first = next(iter(opened.tensors.values()))
    with (source / first.shard).open("r+b") as handle:
        handle.seek(opened.shards[first.shard].data_start)
        handle.write(b"\x01")
    lines: list[str] = []
    run(source, out, lines=lines)
    run(source, tmp_path / "fresh")
    assert any("the source has changed" in line for line in lines)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_source_whose_files_were_only_touched_goes_on(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    finished = stopped_after(monkeypatch, 25, source, out)
    for file in source.iterdir():
        os.utime(file, ns=(1, 1))
    names = converted(monkeypatch)
    run(source, out)
    assert not set(finished) & set(names)
    assert contents(out) == contents(undisturbed)


def test_another_recipe_or_config_starts_anew(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    stopped_after(monkeypatch, 25, source, out)
    names = converted(monkeypatch)
    exact = QuantizeSpec(shard_bytes=60_000, scale_rounding="float32")
    run(source, out, exact)
    assert set(names) == set(Checkpoint.open(source).tensors)
    run(source, tmp_path / "fresh", exact)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_source_that_changes_while_it_is_read_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    real, seen = Stream._convert, []

    def meddled(self: Stream, reader: Any, piece: Any) -> None:
        if not seen:
            seen.append(piece)
            os.utime(source / piece.shard, ns=(1, 1))
        real(self, reader, piece)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "_convert", meddled)
        with pytest.raises(BadInput, match="has changed since it was opened"):
            run(source, out)
    assert not is_sealed(out)
    assert run(source, out).inputs == {"source": Checkpoint.open(source).digest()}


def test_a_sealed_source_that_was_altered_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from packager.quantize import dequantize

    run(tiny_checkpoint, tmp_path / "fp8")
    dequantize(tmp_path / "fp8", tmp_path / "bf16")
    manifest = run(tmp_path / "bf16", tmp_path / "again")
    assert manifest.inputs == {"source": check(tmp_path / "bf16").digest}
    flip_last_byte(next((tmp_path / "bf16").glob("*.safetensors")), keep_times=False)
    with pytest.raises(IntegrityFailure, match="same size, other bytes"):
        run(tmp_path / "bf16", tmp_path / "other")
    assert not is_sealed(tmp_path / "other")


def test_a_source_that_vanishes_is_named_and_the_work_goes_on_when_it_is_back(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_checkpoint, source)
    gone = source / "model-00002-of-00003.safetensors"
    real = Stream._convert

    def without(self: Stream, reader: Any, piece: Any) -> None:
        if piece.shard == gone.name and gone.is_file():
            gone.rename(tmp_path / "away")
        real(self, reader, piece)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "_convert", without)
        with pytest.raises(BadInput, match=gone.name):
            run(source, out)
    (tmp_path / "away").rename(gone)
    lines: list[str] = []
    run(source, out, lines=lines)
    assert any("kept from an earlier run" in line for line in lines)
    assert contents(out) == contents(undisturbed)


# ---- no room --------------------------------------------------------------------------------------------

FULL = """
import resource, sys
from pathlib import Path
from packager.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
sys.exit(run(["quantize", sys.argv[1], sys.argv[2], "--shard-bytes", "1000000"]))
"""


@pytest.mark.slow
def test_a_file_that_cannot_grow_further_is_an_error_and_nothing_is_lost(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    spec, out = QuantizeSpec(shard_bytes=1_000_000), tmp_path / "out"
    full = subprocess.run(
        [sys.executable, "-c", FULL, str(tiny_checkpoint), str(out), "300000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == 3, full.stderr
    assert "file size limit" in full.stderr
    assert "Traceback" not in full.stderr
    assert not is_sealed(out)
    lines: list[str] = []
    run(tiny_checkpoint, out, spec, lines=lines)
    assert any("tensors of unfinished shards: kept from an earlier run" in line for line in lines)
    run(tiny_checkpoint, tmp_path / "fresh", spec)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    tiny_checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    real, room, out = os.pwrite, [120_000], tmp_path / "out"

    def limited(handle: int, data: Any, position: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "no space")
        return real(handle, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", limited)
        with pytest.raises(BadInput, match="the disk is full") as error:
            run(tiny_checkpoint, out)
    assert "same command again" in error.value.remedy
    assert not is_sealed(out)
    run(tiny_checkpoint, out)
    assert contents(out) == contents(undisturbed)


def test_two_processes_on_one_target_are_kept_apart(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from packager.artifact import ArtifactWriter

    with (
        ArtifactWriter(tmp_path / "out", stage="x", recipe_digest="x", inputs={}),
        pytest.raises(BadInput, match="another process"),
    ):
        run(tiny_checkpoint, tmp_path / "out")
