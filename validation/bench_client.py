"""One long-lived `vllm bench serve` process, fed one run at a time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from validation.errors import MeasurementError

WATCH_S = 1.0


class BenchTimeout(MeasurementError):
    """A run took longer than it was allowed."""


class BenchFailed(MeasurementError):
    """The benchmark ran and raised; the process goes on."""


class BenchClient:
    """Starts the benchmark process when first needed, or ahead of need by `warm`, and ends it on exit.

    Args:
        python: interpreter that has vLLM.
        startup_timeout_s: the import of vLLM takes 10 s or more on a small machine.
    """

    def __init__(self, *, python: str = sys.executable, startup_timeout_s: float = 180.0) -> None:
        self.python = python
        self.startup_timeout_s = startup_timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._replies: queue.Queue[str] = queue.Queue()
        self._ready = False
        self._log: IO[bytes] | None = None

    def __enter__(self) -> BenchClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def warm(self) -> None:
        """Start the process without waiting for it."""
        if self._process is not None:
            return
        root = str(Path(__file__).resolve().parent.parent)
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        # The client only sends requests: it must not take cores from the server, nor the hub for a directory.
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [self.python, "-m", "validation.vllm_bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    def run(self, arguments: list[str], *, timeout_s: float, watch: Callable[[], None] | None = None) -> None:
        """One `vllm bench serve` with these arguments.

        Args:
            watch: called every `WATCH_S` seconds meanwhile; what it raises ends the run.

        Raises:
            BenchTimeout: it took longer than `timeout_s`. BenchFailed: the benchmark raised.
            MeasurementError: it could not start, or its process ended.
        """
        self.warm()
        if not self._ready:
            self._reply(self.startup_timeout_s, "start")
            self._ready = True
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(arguments) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure("ended unexpectedly") from None
        self._reply(timeout_s, "finish a run", watch)

    def close(self) -> None:
        """End the process; the next run starts another."""
        process, self._process, self._ready = self._process, None, False
        if process is not None:
            with contextlib.suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
        self._replies = queue.Queue()

    def _read(self, stream: IO[str] | None) -> None:
        assert stream is not None
        replies = self._replies
        for line in stream:
            replies.put(line)
        replies.put("")

    def _reply(self, timeout_s: float, what: str, watch: Callable[[], None] | None = None) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                line = self._replies.get(timeout=min(left, WATCH_S) if watch else left)
                break
            except queue.Empty:
                if left == 0 or watch is None:
                    raise self._failure(f"did not {what} in {timeout_s:.0f} s", BenchTimeout) from None
            try:
                watch()
            except BaseException:
                self._kill()
                raise
        if not line:
            raise self._failure("ended unexpectedly")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failure(f"failed: {reply['error']}", BenchFailed)

    def _kill(self) -> None:
        """End a run that is under way, and its process with it."""
        if self._process is not None:
            self._process.kill()
        self.close()

    def _failure(self, what: str, kind: type[MeasurementError] = MeasurementError) -> MeasurementError:
        tail = ""
        if self._log is not None:
            with contextlib.suppress(OSError):
                tail = os.pread(
                    self._log.fileno(), 1500, max(0, os.fstat(self._log.fileno()).st_size - 1500)
                ).decode(errors="replace")
        if kind is not BenchFailed:
            self._kill()
        return kind(
            f"vllm bench serve {what}" + (f"; its last lines:\n{tail.strip()}" if tail.strip() else ""),
            "Throughput is measured with vLLM's own client: the [serve] extra must be installed.",
        )
