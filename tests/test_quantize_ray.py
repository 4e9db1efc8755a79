"""A real Ray cluster of two nodes on loopback: the same bytes as on this machine, whoever is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint
from quantizing import contents, run

from packager.artifact import is_sealed
from packager.checkpoint import Checkpoint
from packager.checkpoint.header import readable_bytes
from packager.cli import run as packager_command
from packager.errors import BadInput, RemoteFailure, UsageProblem
from packager.publish.loopback_hub import LoopbackHub
from packager.quantize.journal import JOURNAL_NAME
from packager.recipe import QuantizeSpec

SPEC = QuantizeSpec(shard_bytes=6_000_000)
TIMEOUT_S = 180.0
"""For what takes seconds: the machine may be at other work."""
PROGRESS = re.compile(r"[\d.]+ \w+ of [\d.]+ \w+, [\d.]+ \w+/s")
"""A line that comes every few seconds."""
LOOPBACK = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise Ray takes 127.0.0.1 for "this machine" and looks for it under its outside address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DOWNLOAD_TIMEOUT": str(int(TIMEOUT_S)),
}


class TwoNodes:
    """A cluster of two nodes with a CPU each; the driver's node is never the second one."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 150_000_000}
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**self._node, "include_dashboard": False},
        )
        self._second: Any = None
        self.complete()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def complete(self) -> None:
        """Start the second node if it is missing."""
        if self._second is None:
            self._second = self._cluster.add_node(**self._node)

    def close(self) -> None:
        self._cluster.shutdown()

    def _workers(self, node: Any) -> list[Any]:
        import psutil

        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        found = []
        for process in raylet.children():
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                if "agent" not in " ".join(process.cmdline()).lower():
                    found.append(process)
        return found

    def workers(self) -> list[Any]:
        """Processes that run tasks, on both nodes."""
        return self._workers(self._cluster.head_node) + self._workers(self._second)

    def stopped_in_a_task(self, *, second: bool) -> Any:
        """A worker of the driver's node, or of the second one, that is halted in the middle of a task."""
        import psutil

        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end:
            for worker in self._workers(self._second if second else self._cluster.head_node):
                with contextlib.suppress(psutil.Error):
                    if not _converts(worker):
                        continue
                    worker.suspend()
                    # It may have become idle between the look and the halt.
                    if worker.status() == psutil.STATUS_STOPPED and _converts(worker):
                        return worker
                    worker.resume()
        raise AssertionError("no worker converts")

    def kill_second(self) -> None:
        workers = self._workers(self._second)
        os.kill(self._second.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        for worker in workers:
            worker.kill()
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = None


def _converts(worker: Any) -> bool:
    return any("_convert_at_worker" in word for word in worker.cmdline())


class SlowHub:
    """The source on a hub where each request for weights takes a tenth of a second: over a quarter of a
    minute in all, so that there is a middle of the run."""

    def __init__(self, storage: Path, source: Path) -> None:
        from huggingface_hub import HfApi

        self._goes_on = threading.Event()
        self.go_on()
        self._hub = LoopbackHub(storage, storage_host=True, fault=self._delay)
        self._hub.start()
        api = HfApi(endpoint=self._hub.url, token="t")
        api.create_repo("org/model")
        self.name = f"hf://org/model@{api.upload_folder(repo_id='org/model', folder_path=source).oid}"
        self.url = self._hub.url

    def _delay(self, _: str, path: str) -> None:
        if path.startswith("/objects/"):
            time.sleep(self._wait_s)
            self._goes_on.wait()

    def pause(self) -> None:
        """Answer nothing: the run cannot end."""
        self._goes_on.clear()

    def go_on(self, *, wait_s: float = 0.1) -> None:
        """Answer, each request for weights after so many seconds."""
        self._wait_s = wait_s
        self._goes_on.set()

    def close(self) -> None:
        self.go_on()
        self._hub.stop()


@pytest.fixture
def slow_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowHub]:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    hub = SlowHub(tmp_path / "hub", source)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LOOPBACK.items():
            patch.setenv(name, value)
        # Workers are started by the nodes, with their environment.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        pytest.importorskip("ray")
        with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets need a short path
            patch.setenv("RAY_TMPDIR", folder)
            nodes = TwoNodes()
            try:
                yield nodes
            finally:
                nodes.close()


@pytest.fixture
def two_nodes(cluster: TwoNodes) -> TwoNodes:
    cluster.complete()
    return cluster


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "source"
    return write_checkpoint(path, shards=3, num_experts=64, hidden_size=512, moe_intermediate_size=384)


@pytest.fixture(scope="module")
def local(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ray") / "local"
    run(source, out, SPEC)
    return out


def started(source: str | Path, out: Path, *options: str, says: Path | None = None) -> subprocess.Popen[str]:
    """The command, on its way; what it tells goes to the file `says`, if that is named."""
    command = [sys.executable, "-m", "packager", "quantize", str(source), str(out), "--json"]
    command += ["--shard-bytes", str(SPEC.shard_bytes), *options]
    with says.open("w") if says else contextlib.nullcontext(subprocess.PIPE) as stderr:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # A shell starts what runs in its background with this signal ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def on(nodes: TwoNodes) -> tuple[str, ...]:
    return ("--executor", "ray", "--ray-address", nodes.address)


def until(condition: Callable[[], bool], *state: Callable[[], Any]) -> None:
    """Wait for it; what `state` gives is said if it does not come to pass."""
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, [one() for one in state]
        time.sleep(0.01)


def finished(out: Path) -> list[str]:
    """Names of the tensors in the journal of an unfinished output."""
    journal = out / ".scratch" / JOURNAL_NAME
    lines = journal.read_text().splitlines()[1:] if journal.is_file() else []
    return [json.loads(line)["tensor"]["name"] for line in lines if line.startswith('{"tensor"')]


@pytest.mark.engine
@pytest.mark.slow
def test_a_cluster_writes_what_this_machine_writes_and_says_what_it_would_say(
    two_nodes: TwoNodes, source: Path, local: Path, tmp_path: Path
) -> None:
    import psutil

    job = started(source, tmp_path / "out", *on(two_nodes))
    stdout, stderr = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, stderr
    assert contents(tmp_path / "out") == contents(local)
    shards = [f"{file.name}: {readable_bytes(file.stat().st_size)}" for file in sorted(local.glob("model-*"))]
    told = [line for line in stderr.splitlines() if not PROGRESS.match(line)]
    assert told == ["Ray: 2 nodes with 2 CPUs", *shards]
    assert json.loads(stdout)["path"] == str(tmp_path / "out")
    listening = {
        c.laddr.ip
        for p in two_nodes.workers()
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}


@pytest.mark.engine
@pytest.mark.slow
def test_a_worker_and_a_node_killed_in_the_middle_cost_their_tensors_a_second_time_and_nothing_else(
    two_nodes: TwoNodes, slow_hub: SlowHub, local: Path, tmp_path: Path
) -> None:
    out, says = tmp_path / "out", tmp_path / "says"
    job = started(slow_hub.name, out, *on(two_nodes), "--workers", "6", says=says)
    try:
        until(lambda: len(finished(out)) >= 5)
        two_nodes.stopped_in_a_task(second=True)
        two_nodes.stopped_in_a_task(second=False).kill()
        until(lambda: "1 tensor done again by others, 1 so far" in says.read_text(), says.read_text)
        slow_hub.pause()
        two_nodes.kill_second()
        until(lambda: "Ray: 1 node with 1 CPU" in says.read_text(), says.read_text)
        assert job.poll() is None and not is_sealed(out)
        slow_hub.go_on(wait_s=0)
        job.communicate(timeout=TIMEOUT_S)
    finally:
        job.kill()
    told = says.read_text()
    assert job.returncode == 0, told
    lost = re.findall(r"workers were lost \((\w+)[^)]*\): (\d+) tensors? done again .*, (\d+) so far", told)
    # One task at a time on each: it is lost, and perhaps one that was on its way to a node already dead.
    assert len(lost) >= 2 and 2 <= int(lost[-1][2]) <= 12
    # Ray's C++ part writes there what it does about objects of the node that is gone.
    ours = re.compile(r"Ray: [12] node|workers were lost|model-|\[.* core_worker\.cc:")
    assert [line for line in told.splitlines() if not ours.match(line) and not PROGRESS.match(line)] == []
    assert contents(out) == contents(local)


@pytest.mark.engine
@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_running_and_either_executor_goes_on(
    two_nodes: TwoNodes, slow_hub: SlowHub, local: Path, tmp_path: Path
) -> None:
    import psutil

    out = tmp_path / "out"
    before: list[str] = []
    for deadly in (signal.SIGKILL, signal.SIGINT):
        wanted = len(before) + 5
        job = started(slow_hub.name, out, *on(two_nodes))
        try:
            until(lambda: len(finished(out)) >= wanted)  # noqa: B023
            workers = two_nodes.workers()
            job.send_signal(deadly)
            _, stderr = job.communicate(timeout=TIMEOUT_S)
        finally:
            job.kill()
        assert not is_sealed(out)
        if deadly == signal.SIGINT:
            assert job.returncode == 130, stderr
            assert stderr.splitlines()[-1] == "interrupted; the same command resumes"
        psutil.wait_procs(workers, timeout=TIMEOUT_S)
        assert not any(worker.is_running() for worker in workers)
        now = finished(out)
        assert now[: len(before)] == before and len(now) == len(set(now))
        before = now
    slow_hub.go_on(wait_s=0)
    job = started(slow_hub.name, out)
    _, stderr = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 0, stderr
    assert "kept from an earlier run" in stderr
    assert contents(out) == contents(local)


@pytest.mark.engine
@pytest.mark.slow
def test_nan_at_a_worker_is_the_error_that_it_is_here(
    two_nodes: TwoNodes, source: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in source.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    opened = Checkpoint.open(damaged)
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    info = opened.tensors[name]
    with (damaged / info.shard).open("r+b") as handle:
        handle.seek(opened.shards[info.shard].data_start + info.begin + 2 * (3 * info.shape[1] + 5))
        handle.write(b"\xc0\x7f")
    with pytest.raises(BadInput) as here:
        run(damaged, tmp_path / "here", SPEC)
    job = started(damaged, tmp_path / "there", *on(two_nodes))
    _, stderr = job.communicate(timeout=TIMEOUT_S)
    assert here.value.message == f"{name}[3, 5] is NaN (in {info.shard})"
    assert job.returncode == 3
    assert stderr.splitlines()[-2:] == [f"error: {here.value.message}", f"what to do: {here.value.remedy}"]
    assert "workers were lost" not in stderr


# ---- without a cluster ----------------------------------------------------------------------------------


def test_without_ray_the_error_says_what_to_install(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageProblem, match="ray is not installed") as caught:
        run(tiny_checkpoint, tmp_path / "out", executor="ray", ray_address="127.0.0.1:1")
    assert "moe-packager[ray]" in caught.value.remedy


@pytest.mark.parametrize(
    ("address", "error", "says"),
    [
        (None, UsageProblem, "no Ray cluster is named"),
        ("auto", UsageProblem, "'auto' is no address"),
        ("ray://127.0.0.1:10001", UsageProblem, "is no address"),
        ("127.0.0.1:1", RemoteFailure, "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_an_address_where_no_cluster_is_fails_at_once(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    error: type[Exception],
    says: str,
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(error, match=says):
        run(tiny_checkpoint, tmp_path / "out", executor="ray", ray_address=address)


def test_an_address_without_its_executor_is_not_passed_over_in_silence(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny_checkpoint), str(tmp_path / "out"), "--ray-address", "127.0.0.1:6379"]
    assert packager_command(command) == 2
    assert "--ray-address is of use with --executor ray only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
