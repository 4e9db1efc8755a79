"""What an engine's log says: how far its start is, what ended it, and what to do if that was memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

# A Python exception as vLLM logs it, with or without its process and level prefix.
_EXCEPTION = re.compile(r"(?:^|\s)((?:\w+\.)*\w+(?:Error|Exception|Interrupt)): (.+)")
_LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]+\] )?")
# What the API server says after the engine has died: the cause stands above it.
_AFTERMATH = (
    "Engine core initialization failed",
    "Failed core proc",
    "EngineDeadError",
    "WorkerProc initialization",
)


def log_cause(text: str) -> str | None:
    """The exception that ended a server, picked out of its log: the last that is not merely its aftermath."""
    found, unfinished = None, False
    for line in text.splitlines():
        match = _EXCEPTION.search(line)
        if match:
            unfinished = not any(phrase in line for phrase in _AFTERMATH) and line.rstrip().endswith(":")
            if not any(phrase in line for phrase in _AFTERMATH):
                found = f"{match[1]}: {match[2]}".strip()
        elif unfinished and found:  # "…. Reasons:" and the first of them on the next line
            found, unfinished = f"{found} {_LOG_PREFIX.sub('', line).strip()}", False
    return found


# --- how far a start is: the messages of vLLM 0.32 ---

_LOADING, _LOADING_DRAFT = "loading weights", "loading the draft"
_STEPS = (
    (re.compile(r"Initializing a V1 LLM engine"), "starting the engine"),
    (re.compile(r"Starting to load model"), _LOADING),
    (
        re.compile(r"Loading safetensors checkpoint shards.*\| *(\d+)/(\d+)"),
        _LOADING + ": {} of {} files",
    ),
    (re.compile(r"Loading drafter model"), _LOADING_DRAFT),
    (
        re.compile(
            r"Starting torch\.compile|Dynamo bytecode|Compiling a graph|Compile and warming|Warming up model"
        ),
        "compiling",
    ),
    (re.compile(r"(?:Capturing|Profiling) CUDA graph"), "capturing CUDA graphs"),
    (re.compile(r"KV cache size: ([\d,]+) tokens"), "KV cache of {} tokens"),
    (re.compile(r"Starting vLLM server"), "starting the API"),
)
_COUNT_S, _REMIND_S = 5.0, 30.0


def step_of(line: str) -> str | None:
    """What the engine does at a line of its log; None: the line says nothing of it."""
    for pattern, says in _STEPS:
        if match := pattern.search(line):
            return says.format(*match.groups())
    return None


class StartupProgress:
    """Follows a log and says what the engine is at: when that changes, and now and then while it does not."""

    def __init__(
        self, log: Path, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._say, self._clock = log, say, clock
        self._began = self._said = clock()
        self._read = 0
        self._rest = b""
        self._step = "starting the engine"

    def look(self) -> None:
        """Read what the log has more, and say it if it is time."""
        step = self._step
        with self._log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        # A progress bar's line ends where the next begins, with a carriage return.
        lines = re.split(rb"[\r\n]", self._rest + new)
        self._rest = lines[-1]
        for line in lines:
            found = step_of(line.decode(errors="replace"))
            if found and found.startswith(f"{_LOADING}:") and step.startswith(_LOADING_DRAFT):
                found = found.replace(_LOADING, _LOADING_DRAFT)
            step = found or step
        now = self._clock()
        new_kind = step.partition(":")[0] != self._step.partition(":")[0]
        patience = 0.0 if new_kind else _COUNT_S if step != self._step else _REMIND_S
        if now - self._said >= patience:
            self._step, self._said = step, now
            self._say(f"{now - self._began:5.0f} s  {step}")


# --- memory ---

_KV_TOO_SMALL = re.compile(
    r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed, which is larger than the available KV cache "
    r"memory \(([\d.]+) GiB\)(?:.*?estimated maximum model length is (\d+))?",
    re.DOTALL,
)
_HELD = re.compile(
    r"\(([\d.]+)/([\d.]+) GiB\) on startup is less than desired (?:GPU|CPU) memory utilization \(([\d.]+),",
    re.DOTALL,
)
_NO_ROOM = "No available memory for the cache blocks"
_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|can't allocate memory|Cannot allocate memory|MemoryError"
)
_KILLED = 128 + 9
_SMALLER = "Serve a shorter context (--context), without the draft (--no-draft), or on a profile of more GPUs"


def memory_trouble(text: str, exit_code: int | None = None) -> tuple[str, str] | None:
    """What a log says of memory that was not enough, and what to do; None: that was not it.

    The messages are those of vLLM 0.32 and torch 2.13; `exit_code` 137 is what the kernel leaves of a process
    that it killed for memory.
    """
    if match := _KV_TOO_SMALL.search(text):
        tokens, needed, room, most = match.groups()
        reach = f"--context {most} fits. " if most else ""
        return (
            f"out of memory: a request of {tokens} tokens needs {needed} GiB of KV cache, {room} are left",
            f"{reach}More of the GPU: --gpu-memory-utilization. {_SMALLER}.",
        )
    if match := _HELD.search(text):
        free, total, share = match.groups()
        return (
            f"out of memory: the engine takes {float(share):.0%} of {total} GiB, {free} GiB are free",
            "Stop the program that holds the rest, or take less: --gpu-memory-utilization "
            f"{max(1, int(98 * float(free) / float(total))) / 100}.",
        )
    if _NO_ROOM in text:
        return (
            "out of memory: the weights leave none for the KV cache",
            f"More of the GPU: --gpu-memory-utilization. {_SMALLER}.",
        )
    if _OUT_OF_MEMORY.search(text):
        return (
            "out of memory",
            f"{_SMALLER}; fewer requests at once: `-- --max-num-seqs 8`; or, if it ran out while capturing "
            "graphs, leave the engine less of the GPU: --gpu-memory-utilization 0.85.",
        )
    if exit_code == _KILLED:
        return (
            "killed, as the kernel does when memory runs out",
            f"See `dmesg`. {_SMALLER}.",
        )
    return None
