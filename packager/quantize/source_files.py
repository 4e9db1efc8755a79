"""The files of a source beside their tensors: enough of them to recognise it."""

from __future__ import annotations

import hashlib

from packager.checkpoint.source import CONFIG_NAME, INDEX_NAME, Checkpoint


def header_bytes(checkpoint: Checkpoint, shard: str) -> bytes:
    """All bytes of a shard before its data. Raises as `Folder.open`."""
    return checkpoint.folder.beginning(shard, checkpoint.shards[shard].data_start)


def outline(checkpoint: Checkpoint) -> str:
    """`outline:<hex>`: SHA-256 of all of a checkpoint but its tensors' data.

    Read in no time, and enough to tell to which source an unfinished output belongs.
    """
    total = hashlib.sha256()
    small = {CONFIG_NAME, INDEX_NAME} & checkpoint.folder.sizes().keys()
    for name in sorted(small | {file.name for file in checkpoint.side_files()}):
        total.update(f"{checkpoint.folder.sha256(name)}  {name}\n".encode())
    for shard, header in sorted(checkpoint.shards.items()):
        digest = hashlib.sha256(header_bytes(checkpoint, shard)).hexdigest()
        total.update(f"{digest} {header.size} {shard}\n".encode())
    return "outline:" + total.hexdigest()
