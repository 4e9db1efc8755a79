"""The files of a source beside their tensors: what they are, whether they are still the same."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Self

from packager.artifact import file_sha256
from packager.checkpoint.source import CONFIG_NAME, INDEX_NAME, Checkpoint
from packager.errors import BadInput


@dataclass(frozen=True)
class FileIdentity:
    """What the file system says of a file; while all of it is the same, so is the content."""

    size: int
    mtime_ns: int
    ctime_ns: int
    """Set by the kernel at each change: cannot be put back as `mtime_ns` can."""
    inode: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, shard: str) -> Self:
        """The identity of a shard (of what it links to) now. Raises BadInput: it is gone."""
        path = checkpoint.path / shard
        try:
            status = path.stat()
        except OSError as err:
            raise BadInput(f"cannot read {path}: {err.strerror}") from None
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def header_bytes(checkpoint: Checkpoint, shard: str) -> bytes:
    """All bytes of a shard before its data. Raises BadInput: it cannot be read."""
    path, length = checkpoint.path / shard, checkpoint.shards[shard].data_start
    try:
        with path.open("rb") as handle:
            found = handle.read(length)
    except OSError as err:
        raise BadInput(f"cannot read {path}: {err.strerror}") from None
    if len(found) != length:
        raise BadInput(f"{path} ended within its header")
    return found


def outline(checkpoint: Checkpoint) -> str:
    """`outline:<hex>`: SHA-256 of all of a checkpoint but its tensors' data.

    Read in no time, and enough to tell to which source an unfinished output belongs.
    """
    total = hashlib.sha256()
    small = [checkpoint.path / name for name in (CONFIG_NAME, INDEX_NAME)]
    for file in sorted([file for file in small if file.is_file()] + checkpoint.side_files()):
        total.update(f"{file_sha256(file)}  {file.name}\n".encode())
    for shard, header in sorted(checkpoint.shards.items()):
        digest = hashlib.sha256(header_bytes(checkpoint, shard)).hexdigest()
        total.update(f"{digest} {header.size} {shard}\n".encode())
    return "outline:" + total.hexdigest()
