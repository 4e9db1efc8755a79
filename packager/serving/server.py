"""Life cycle of one vLLM server: started under a guard, awaited until healthy, watched, stopped whole."""

from __future__ import annotations

import atexit
import contextlib
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from packager.errors import RemoteFailure, UsageProblem
from packager.serving import guard
from packager.serving.engine import ServeSpec, server_environment, sglang_command, vllm_command
from packager.serving.engine_log import StartupProgress, log_cause, memory_trouble
from packager.serving.installed import Engine

_QUIET = ("--disable-uvicorn-access-log",)  # a line a request would fill the tail that errors show
TAIL_LINES = 20
"""Lines of a log that an error shows."""
_POLL_S = 0.1
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*?)(?:_total)?(?:\{(.*)\})? (\S+)$")
_POSITION = re.compile(r'position="(\d+)"')


class EngineFailed(RemoteFailure):
    """An engine died, or was not healthy in time."""

    def __init__(
        self, message: str, remedy: str, *, exit_code: int | None, cause: str | None, log: str
    ) -> None:
        super().__init__(message, remedy)
        self.engine_exit_code = exit_code
        """None: it still runs."""
        self.cause = cause
        """The exception that ended it, as its log has it."""
        self.log = log


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def claim_port(host: str, port: int) -> None:
    """Raise UsageProblem if `port` is taken. vLLM would not notice another vLLM: it sets SO_REUSEPORT."""
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as err:
            raise UsageProblem(
                f"cannot listen on {host}:{port}: {err.strerror}",
                "Choose another port, or stop the program that holds this one.",
            ) from None


def parse_counters(exposition: str) -> dict[str, float]:
    """Counters of a Prometheus text exposition, summed over labels, without the `_total` suffix.

    A counter labelled by position (vLLM's accepted draft tokens) also appears for each, as `name:POSITION`.
    """
    counters: set[str] = set()
    sums: dict[str, float] = {}
    for line in exposition.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(maxsplit=3)
            if kind == "counter":
                counters.add(name.removesuffix("_total"))
        elif line and not line.startswith("#") and (sample := _SAMPLE.match(line)):
            name, labels, value = sample[1], sample[2] or "", float(sample[3])
            if name not in counters:
                continue
            sums[name] = sums.get(name, 0.0) + value
            if position := _POSITION.search(labels):
                key = f"{name}:{position[1]}"
                sums[key] = sums.get(key, 0.0) + value
    return sums


def fetch_counters(url: str, *, timeout_s: float = 30) -> dict[str, float]:
    """The Prometheus counters of the server at `url` (without /v1), see `parse_counters`. Raises OSError."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=timeout_s) as reply:
        return parse_counters(reply.read().decode())


class Server:
    """A server of `engine` for `spec`, a context manager; it is healthy when `__enter__` returns.

    An interrupt while it stops kills it at once, and is raised again.

    Raises (from start):
        BadInput: model or draft is not a checkpoint directory.
        UsageProblem: the port is in use.
        RemoteFailure: the engine died or was not healthy in time; the message ends with the tail of its log.
    """

    def __init__(
        self,
        spec: ServeSpec,
        log: Path,
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        startup_timeout_s: float = 300,
        engine: Engine = "vllm",
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`say` is told how far the start is, as its log says."""
        self.spec = spec
        self.engine = engine
        self._say = say
        self.log = log
        self.host = host
        self.port = port or 0
        self.startup_timeout_s = startup_timeout_s
        self.startup_s: float | None = None
        """Seconds from launch to healthy."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base address, without `/v1`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def start(self) -> Server:
        """Launch the server and wait until it is healthy."""
        if self._process is not None:
            return self
        self.spec.check()
        if self.port:
            claim_port(self.host, self.port)
        else:
            self.port = free_port(self.host)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = self._command()
        began = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(self.spec),
                start_new_session=True,
            )
        atexit.register(self.stop)
        try:
            self._await_health(began + self.startup_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.startup_s = time.monotonic() - began
        return self

    def _command(self) -> list[str]:
        if self.engine == "sglang":
            return sglang_command(self.spec, host=self.host, port=self.port, python=sys.executable)
        spec = replace(self.spec, extra_args=(*self.spec.extra_args, *_QUIET))
        command = vllm_command(spec, host=self.host, port=self.port)
        # The environment may not be activated: take the command that was installed beside this package.
        script = Path(sys.executable).with_name("vllm")
        return [str(script), *command[1:]] if command[0] == "vllm" and script.exists() else command

    def _await_health(self, deadline: float) -> None:
        progress = StartupProgress(self.log, self._say) if self._say else None
        while True:
            self.check_alive()
            if progress is not None:
                progress.look()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            if time.monotonic() > deadline:
                raise self.failure(f"the engine was not healthy after {self.startup_timeout_s:.0f} s")
            time.sleep(_POLL_S)

    def check_alive(self) -> None:
        """Raise RemoteFailure, with the tail of the log, if the server has died."""
        if self._process is None:
            raise RemoteFailure("the server is not running")
        code = self._process.poll()
        if code is not None:
            raise self.failure(f"the engine died with exit code {code}", code)

    def failure(self, what: str, exit_code: int | None = None) -> EngineFailed:
        """The error to raise when `what` has happened, with the cause and the tail of the log."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        cause, advice = log_cause(text), ""
        if trouble := memory_trouble(text, exit_code):
            # The engine's own words stay beside ours: they say where it ran out.
            cause = f"{trouble[0]} ({cause})" if cause else trouble[0]
            advice = trouble[1] + " "
        tail = "\n".join("  | " + line for line in self.log_tail())
        message = f"{what} while serving {self.spec.model}" + (f": {cause}" if cause else "")
        return EngineFailed(
            f"{message}\n{tail}",
            f"{advice}The whole log is {self.log}.",
            exit_code=exit_code,
            cause=cause,
            log=text,
        )

    def log_tail(self) -> tuple[str, ...]:
        """Last lines of the log, as far as it is written."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ()
        return tuple(text.splitlines()[-TAIL_LINES:])

    def wait(self) -> int:
        """Block until the server ends by itself; its exit code."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """Stop the server and everything it started. Safe to call twice."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()  # the guard ends the server when this pipe closes
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=4 * guard.PATIENCE_S)
        except KeyboardInterrupt:
            process.terminate()  # the guard kills all of it at once
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=guard.PATIENCE_S)
            raise
        finally:
            process.kill()  # nothing, unless the guard itself hangs
            process.wait()

    def metrics(self) -> dict[str, float]:
        """vLLM's Prometheus counters now, see `parse_counters`; e.g. `vllm:spec_decode_num_drafts`."""
        self.check_alive()
        try:
            return fetch_counters(self.url)
        except OSError as err:
            self.check_alive()
            raise RemoteFailure(f"no metrics from {self.url}: {err}") from err

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
