"""Child processes that run vLLM for a draft's data: their environment, and what is said when one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from packager.errors import BadInput, RemoteFailure

_LOG_TAIL = 15


def engine_environment() -> dict[str, str]:
    """This process's environment, with what vLLM needs on a CPU where nothing else is set."""
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"  # vLLM's CPU build is slow without it
    if openmp.exists() and not any(map(str.isspace, sys.prefix)):  # the variable is split at blanks
        wanted["LD_PRELOAD"] = str(openmp)
    return wanted | dict(os.environ)


def death(code: int, log: Path) -> RemoteFailure:
    """The error for a child that ended with `code`: it ends with the tail of its log."""
    tail = "\n".join("  | " + line for line in log.read_text("utf-8", "replace").splitlines()[-_LOG_TAIL:])
    return RemoteFailure(
        f"the engine that serves the target died with exit code {code}\n{tail}", f"The whole log is {log}."
    )


class EngineProcess:
    """A child that reads requests, a JSON line each, from stdin, and is started with the first of them.

    It answers with the files it writes. It must end when its stdin closes, hence with this process, however
    that ends.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        refusal: BadInput | None = None,
    ) -> None:
        """`refusal`: what speaks against starting the child, raised if it is needed."""
        self.log, self._refusal = log, refusal
        self._command, self._environment = list(command), dict(environment)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def started(self) -> bool:
        """Whether there was anything to ask of it."""
        return self._child is not None

    def ask(self, request: Mapping[str, Any]) -> None:
        """Hand over a request. Raises RemoteFailure if the child is dead."""
        if self._refusal is not None:
            raise self._refusal
        if self._child is None:
            with self.log.open("wb") as out:
                self._child = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=self._environment
                )
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(dict(request)).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise death(self._child.wait(), self.log) from None

    def check(self) -> None:
        """Raise RemoteFailure if the child was started and has ended."""
        if self._child is not None and (code := self._child.poll()) is not None:
            raise death(code, self.log)

    def close(self) -> None:
        """End the child, whatever it is doing."""
        if self._child is None:
            return
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, and something was left to flush
            self._child.stdin.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
