"""Hidden states on-line: the spool between the process that captures and the trainer.

The trainer and the files are real; the process answers with states files made beforehand. That an engine does
is shown in test_draft_engine.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from draft_data import SPEC, TARGET, write_data, write_target

from packager.cli.draft import command
from packager.draft.curve import LOG_NAME, read_log
from packager.draft.prepare import DraftData
from packager.draft.stage import TRAINING_STATE, train
from packager.errors import BadInput, RemoteFailure, UsageProblem

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from packager.draft import online  # noqa: E402
from packager.draft.engine_process import EngineProcess  # noqa: E402

CHILD = Path(__file__).parent / "spooled_states.py"
OFFLINE = SPEC.model_copy(
    update={"steps": 6, "checkpoint_every": 2, "evaluate_every": 3, "accumulate": 2, "batch_tokens": 256}
    | {"ttt_steps": 1, "num_speculative_tokens": 1}
)
"""Two epochs, nearly."""
NEED = 501_064
"""The least budget for these data: what the refusal below says."""
ONLINE = OFFLINE.model_copy(update={"states": "online", "max_states_bytes": NEED})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def data(tmp_path: Path, target: Path) -> DraftData:
    """Responses without states; those lie in `captured` beside them."""
    data = write_data(tmp_path / "work", target)
    data.states.rename(tmp_path / "captured")
    return data


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Sets how states are captured from now on, and names the log of it."""

    def use(mode: str = "works", source: str = "captured") -> Path:
        log = tmp_path / "requests.jsonl"
        log.unlink(missing_ok=True)

        def process(data: DraftData, *_: Any, **__: Any) -> EngineProcess:
            where = [str(tmp_path / source), str(data.spool), str(log)]
            return EngineProcess(
                [sys.executable, str(CHILD), *where, mode], data.workdir / "online.log", dict(os.environ)
            )

        monkeypatch.setattr(online, "_engine", process)
        return log

    return use


def _requests(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def _noisy(source: Path, out: Path) -> None:
    """Other states of the same tokens: what a run that is started again must not read again."""
    out.mkdir()
    for path in source.iterdir():
        content = load_file(path)
        content["hidden_states"] = content["hidden_states"] + 0.5 * torch.randn_like(content["hidden_states"])
        save_file(content, out / path.name)


def test_training_on_line_is_training_off_line_within_the_budget(
    tmp_path: Path, data: DraftData, target: Path, engine: Callable[..., Path]
) -> None:
    """The same log and weights, from a spool that never holds more than the least it can."""
    log, lines, held = engine(), list[str](), list[int]()
    twin = write_data(tmp_path / "twin", target)
    offline = train(target, OFFLINE, twin, lambda _: None)

    def look(_: Any) -> None:
        held.append(sum(path.stat().st_size for path in data.spool.glob("*-*")))

    found = train(target, ONLINE, data, lines.append, on_step=look)
    assert (data.workdir / LOG_NAME).read_bytes() == (twin.workdir / LOG_NAME).read_bytes()
    assert found.predictions == offline.predictions
    assert found.metrics | {"layer_proof": 0} == offline.metrics | {"layer_proof": 0}
    for name, value in load_file(twin.workdir / TRAINING_STATE).items():
        assert torch.equal(load_file(data.workdir / TRAINING_STATE)[name], value), name

    held += [most for request in _requests(log) for most in request["held"]]
    assert 0.9 * NEED < max(held) <= NEED
    left = {path.name.split("-")[0] for path in data.spool.glob("*.safetensors")}
    assert left == {"kept"}
    assert any(
        "up to 0.000395 GB between two checkpoints; the budget is 0.000501 GB" in line for line in lines
    )

    log = engine()  # what `export` does: nothing is left to capture
    assert train(target, ONLINE, data, lambda _: None).predictions == found.predictions
    assert not log.exists()


def test_too_small_a_budget_is_refused_with_the_bytes_that_are_needed(
    data: DraftData, target: Path, engine: Callable[..., Path]
) -> None:
    log = engine()
    with pytest.raises(BadInput, match=f"needs {NEED} bytes .* the budget is {NEED - 1}") as caught:
        train(target, ONLINE.model_copy(update={"max_states_bytes": NEED - 1}), data, lambda _: None)
    assert "--max-states-bytes" in caught.value.remedy
    assert not log.exists()
    result = CliRunner().invoke(command, ["train", str(target), str(data.workdir), "--states", "online"])
    assert "online needs max_states_bytes" in str(result.exception)
    with pytest.raises(BadInput, match="responses without hidden states") as caught:
        train(target, OFFLINE, data, lambda _: None)
    assert "--states online" in caught.value.remedy


def _stop_after(step: int) -> Callable[[Any], None]:
    def on_step(now: Any) -> None:
        if now.done == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.slow
def test_a_run_that_goes_on_reads_the_states_that_it_had_read_before(
    tmp_path: Path, data: DraftData, target: Path, engine: Callable[..., Path]
) -> None:
    """Broken off behind step 3, with a checkpoint at 2. From then on other states would be captured: the
    steps up to 4, whose states were in the spool, see the old ones; the later ones see the new."""
    _noisy(tmp_path / "captured", tmp_path / "noisy")
    twin = write_data(tmp_path / "twin", target)
    train(target, OFFLINE, twin, lambda _: None)
    losses = [row["loss"] for row in read_log(twin.workdir / LOG_NAME)]
    engine()
    with pytest.raises(KeyboardInterrupt):
        train(target, ONLINE, data, lambda _: None, on_step=_stop_after(3))
    cut, torn = sorted(data.spool.glob("kept-*"))[:2]
    cut.write_bytes(cut.read_bytes()[:-1])  # what a kill, or the loss of power, may leave behind
    torn.rename(torn.with_name(f"{torn.name}.partial"))

    log, lines = engine(source="noisy"), list[str]()
    train(target, ONLINE, data, lines.append)
    assert "draft: training goes on from step 2" in lines
    found = [row["loss"] for row in read_log(data.workdir / LOG_NAME)]
    assert found[:4] == losses[:4]
    assert all(mine != theirs for mine, theirs in zip(found[4:], losses[4:], strict=True))
    taken = [name for request in _requests(log) for name in request["states"] if name]
    assert sorted(name for name in taken if name.startswith("kept")) == [cut.name, torn.name]
    assert min(name for name in taken if not name.startswith("kept")).startswith("0000004-")
    assert max(most for request in _requests(log) for most in request["held"]) <= NEED


def test_an_engine_that_dies_and_a_full_disk_lose_nothing(
    data: DraftData, target: Path, engine: Callable[..., Path]
) -> None:
    engine("dies")
    spec = ONLINE.model_copy(update={"steps": 4, "checkpoint_every": 1, "accumulate": 1})
    with pytest.raises(RemoteFailure, match=r"(?s)exit code 1.*has had enough") as caught:
        train(target, spec, data, lambda _: None)
    assert "online.log" in caught.value.remedy
    assert "goes on from the last checkpoint" in caught.value.remedy
    there = set(data.spool.glob("kept-*"))
    assert there
    with (data.spool / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageProblem, match="another run trains on"):
            train(target, spec, data, lambda _: None)
    log = engine("full")
    with pytest.raises(BadInput, match=r"the disk of .*spool is full"):
        train(target, spec, data, lambda _: None)
    assert not log.exists()
    assert set(data.spool.glob("kept-*")) == there
    engine()
    assert train(target, spec, data, lambda _: None).trainer.done == 4


@pytest.mark.slow
def test_a_damaged_file_in_the_spool_is_named_and_captured_anew_alone(
    data: DraftData, target: Path, engine: Callable[..., Path]
) -> None:
    engine()
    with pytest.raises(KeyboardInterrupt):
        train(target, ONLINE, data, lambda _: None, on_step=_stop_after(3))
    bad = min(data.spool.glob("0000002-*"))
    size, whole = bad.stat().st_size, bad.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    bad.write_bytes(whole[:header] + b"\xff" * (size - header))
    with pytest.raises(BadInput, match=bad.name) as caught:
        train(target, ONLINE, data, lambda _: None)
    assert "`packager draft train` again" in caught.value.remedy
    bad.unlink()
    log = engine()
    train(target, ONLINE, data, lambda _: None)
    first = _requests(log)[0]["states"]
    assert [name for name in first if name] == [bad.name]
    assert len(first) > 1, "the others of its step are computed with it, so that its bytes are the same"


def test_states_of_another_target_are_never_mixed_in(
    data: DraftData, target: Path, engine: Callable[..., Path]
) -> None:
    """The command finds that another target gave the responses; a spool of another is emptied."""
    engine()
    with pytest.raises(KeyboardInterrupt):
        train(target, ONLINE, data, lambda _: None, on_step=_stop_after(3))
    (data.workdir / "prepared_from").write_text(data.target)
    (target / "config.json").write_text(json.dumps(TARGET | {"rope_theta": 5000.0}))
    options = ["--states", "online", "--max-states-bytes", str(NEED)]
    result = CliRunner().invoke(command, ["train", str(target), str(data.workdir), *options])
    assert "not the one the hidden states were taken from" in str(result.exception)

    from packager.draft.prepare import target_digest

    other, lines, log = DraftData(data.workdir, target_digest(target)), list[str](), engine()
    with pytest.raises(KeyboardInterrupt):
        train(target, ONLINE, other, lines.append, on_step=_stop_after(1))
    assert any("on-line states are captured anew" in line for line in lines)
    assert all(all(request["states"]) for request in _requests(log))


_KILLED = """
import sys
from pathlib import Path
from test_draft_online import EngineProcess, ONLINE, online, train
from packager.draft.prepare import DraftData, target_digest
import os
work, target, child, source = map(Path, sys.argv[1:])
def process(data, *_, **__):
    arguments = [sys.executable, str(child), str(source), str(data.spool), str(work / "requests"), "works"]
    return EngineProcess(arguments, work / "online.log", dict(os.environ))
online._engine = process
train(target, ONLINE, DraftData(work, target_digest(target)), print,
      on_step=lambda now: print("loss", now.done, repr(now.loss), flush=True))
"""


@pytest.mark.slow
def test_training_killed_on_line_goes_on_with_the_same_states(
    tmp_path: Path, data: DraftData, target: Path
) -> None:
    """SIGKILL at step 3; the capturing process ends with it, and what it would capture now is different."""
    _noisy(tmp_path / "captured", tmp_path / "noisy")

    def start(source: str) -> subprocess.Popen[str]:
        arguments = [str(data.workdir), str(target), str(CHILD), str(tmp_path / source)]
        return subprocess.Popen(
            [sys.executable, "-c", _KILLED, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def losses(child: subprocess.Popen[str], until: int) -> dict[str, str]:
        found: dict[str, str] = {}
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("loss "):
                _, step, loss = line.split()
                found[step] = loss
                if int(step) == until:
                    break
        return found

    child = start("captured")
    before = losses(child, 3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child = start("noisy")
    after = losses(child, 6)
    assert child.wait() == 0
    assert list(after) == [str(step) for step in range(3, 7)]
    assert after["3"] == before["3"]


@pytest.mark.slow
def test_two_processes_read_one_spool(tmp_path: Path, data: DraftData, target: Path) -> None:
    """Under torchrun the first has the engine; the loss at every step is that of one process off-line."""
    twin = write_data(tmp_path / "twin", target)
    train(target, OFFLINE, twin, lambda _: None)
    script = tmp_path / "two.py"
    script.write_text(_KILLED)
    arguments = [str(data.workdir), str(target), str(CHILD), str(tmp_path / "captured")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]  # any free port
    done = subprocess.run(
        [*launcher, *meeting, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    rows, ours = read_log(data.workdir / LOG_NAME), read_log(twin.workdir / LOG_NAME)
    assert [row["step"] for row in rows] == list(range(1, 7)), done.stderr
    for row, other in zip(rows, ours, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-3), f"step {row['step']}"
    assert not list(data.spool.glob("0*"))
