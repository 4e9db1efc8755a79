"""Run a command for as long as its owner lives: `python guard.py COMMAND...`, with the owner's pipe as stdin.

A server must not outlive a release that was killed: it would hold the port, the memory and the processor
that the next run measures with. When the pipe closes, whether by `Server.stop` or because the owner died, the
command gets SIGINT, then SIGTERM, then SIGKILL; a SIGTERM to this program kills it at once. However it ends,
nothing of its process group outlives it. Standard library only: it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

PATIENCE_S = 10.0
"""Seconds the command gets to end after SIGINT, and again after SIGTERM."""


def _end(process: subprocess.Popen[bytes]) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(signum)
        try:
            process.wait(timeout=PATIENCE_S)
            return
        except subprocess.TimeoutExpired:
            continue
    process.kill()


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    """Exit code of the command; 128 + signal if one ended it."""
    # A shell's background job ignores SIGINT, and so would the command, which is to be ended by it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: _kill(process))

    def watch() -> None:
        while os.read(0, 4096):
            pass
        _end(process)

    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    _kill(process)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
