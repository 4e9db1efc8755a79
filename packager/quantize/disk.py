"""What the disks can do, measured before the work, so that progress can be told as a share of it."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

_PROBE_BYTES = 128 << 20
_CHUNK = 8 << 20
PROBE_NAME = "disk-probe"


@dataclass(frozen=True)
class DiskSpeed:
    """Sequential speed of the source's disk and of the output's, in bytes a second."""

    read: float
    write: float

    def bound(self, written_per_read: float) -> float:
        """Bytes of source a second at the most, reading and writing taking turns.

        Args:
            written_per_read: bytes written for each byte read.
        """
        return 1.0 / (1.0 / self.read + written_per_read / self.write)


def probe(source: Path, directory: Path) -> DiskSpeed | None:
    """Read the end of the file `source` and write as much into `directory`, about a second.

    The pages read are dropped from the cache first, and the file written is flushed to the disk and removed.
    None if something of that cannot be done: the work itself will say what is wrong.
    """
    written = directory / PROBE_NAME
    try:
        read = _read_speed(source)
        return DiskSpeed(read, _write_speed(written))
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            written.unlink()


def _read_speed(path: Path) -> float:
    handle = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        begin = max(0, size - _PROBE_BYTES)
        # The end of a file is what an earlier read of all of it has left in the cache; it is needed last.
        os.posix_fadvise(handle, begin, 0, os.POSIX_FADV_DONTNEED)
        began, position = time.perf_counter(), begin
        while position < size:
            position += len(os.pread(handle, _CHUNK, position)) or size
        return (size - begin) / max(time.perf_counter() - began, 1e-9)
    finally:
        os.close(handle)


def _write_speed(path: Path) -> float:
    data = memoryview(os.urandom(_CHUNK))  # of which no file system can make less
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        began, count = time.perf_counter(), 0
        while count < _PROBE_BYTES:
            count += os.write(handle, data)
        os.fsync(handle)
        return count / max(time.perf_counter() - began, 1e-9)
    finally:
        os.close(handle)
