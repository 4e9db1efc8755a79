"""The output shards of a conversion while they are made, and what an earlier run left of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packager.artifact import ArtifactWriter, FileEntry, writing
from packager.checkpoint.writer import ShardPlan, TensorSpec
from packager.quantize.journal import TensorJournal

_CHUNK = 8 << 20
_WRITE_BACK = 32 << 20
"""Bytes that the disk is told of at once."""


@dataclass(frozen=True)
class Place:
    """Where a tensor goes in the output."""

    shard: str
    begin: int
    """Offset of the tensor in the file, or of its codes."""
    rest_begin: int
    """Offset of what follows them at once, scales and the like; the same as `end` where nothing does."""
    end: int
    """Offset after all of it."""
    last: bool
    """Whether the shard ends here."""


class OutputShard:
    """A file in the scratch directory, and the SHA-256 of what has been written to it in order so far."""

    def __init__(self, path: Path, header: bytes, prefix: int = 0) -> None:
        """Open it. `prefix` bytes that an earlier run wrote are kept and hashed; 0: begin anew."""
        self.path = path
        self._sha = hashlib.sha256()
        self._passed, self._told = 0, 0
        with writing(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | (0 if prefix else os.O_TRUNC), 0o666)
        if not prefix:
            self.write(memoryview(header), 0)
            self.passed(memoryview(header))
        while self._passed < prefix:
            chunk = os.pread(self._handle, min(_CHUNK, prefix - self._passed), self._passed)
            if not chunk:
                break  # shorter than it was: the digest will not be the recorded one
            self.passed(memoryview(chunk))

    def write(self, data: memoryview, position: int) -> None:
        """Write at a position; from any thread. Raises BadInput when the disk is full."""
        data = data.cast("B")
        with writing(self.path):
            while data.nbytes:
                count = os.pwrite(self._handle, data, position)
                data, position = data[count:], position + count

    def passed(self, data: memoryview) -> None:
        """Hash what has been written, in order; from one thread at a time."""
        self._sha.update(data)
        self._passed += data.nbytes

    def sha256(self) -> str:
        """Of all that has passed."""
        return self._sha.copy().hexdigest()

    def write_back(self) -> None:
        """Let the disk begin with what has passed: little is left to do when the file is complete."""
        if self._passed - self._told < _WRITE_BACK or not hasattr(os, "posix_fadvise"):
            return
        # Linux begins to write dirty pages when it is told that they will not be needed, and returns.
        os.posix_fadvise(self._handle, self._told, self._passed - self._told, os.POSIX_FADV_DONTNEED)
        self._told = self._passed

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


class OutputShards:
    """All shards of an output. Shards appear in the artifact one by one, complete and under their names."""

    def __init__(
        self,
        plans: Sequence[ShardPlan],
        firsts: Mapping[str, str],
        writer: ArtifactWriter,
        journal: TensorJournal,
    ) -> None:
        """Find out how far an earlier run came.

        Args:
            plans: the shards; a tensor that is not in `firsts` belongs to the one before it.
            firsts: name of the first tensor that each of the source's becomes -> its name there.
            writer: open; takes the finished shards.
            journal: which tensors are finished.
        """
        self._writer, self._journal = writer, journal
        self._plans = {plan.name: plan for plan in plans}
        self._open: dict[str, OutputShard] = {}
        self.places: dict[str, Place] = {}
        self.kept: set[str] = set()
        """Tensors that an earlier run finished, their bytes found as it left them."""
        self.named: list[str] = []
        """Shards that an earlier run finished."""
        self.unnamed: list[str] = []
        """Shards that lack nothing but their name."""
        for plan in plans:
            self._look_at(plan, self._place(plan, firsts))

    def _place(self, plan: ShardPlan, firsts: Mapping[str, str]) -> list[str]:
        position = len(plan.header)
        groups: list[list[TensorSpec]] = []
        for spec in plan.tensors:
            if spec.name in firsts:
                groups.append([])
            groups[-1].append(spec)
        for first, *rest in groups:
            middle = position + first.nbytes
            end = middle + sum(spec.nbytes for spec in rest)
            last = first is groups[-1][0]
            self.places[firsts[first.name]] = Place(plan.name, position, middle, end, last)
            position = end
        return [firsts[first.name] for first, *_ in groups]

    def _look_at(self, plan: ShardPlan, names: list[str]) -> None:
        done = self._journal.tensors
        finished: list[str] = []
        for name in names:
            if name not in done or done[name].output is None:
                break
            finished.append(name)
        complete = len(finished) == len(names)
        if complete and self._writer.done(plan.name) is not None:
            self.kept.update(finished)
            self.named.append(plan.name)
            return
        path = self._scratch(plan.name)
        if not finished or not path.is_file():
            return
        shard = OutputShard(path, plan.header, self.places[finished[-1]].end)
        if shard.sha256() != done[finished[-1]].output:
            shard.close()  # a power cut took some of it: this shard is made again
            return
        self._open[plan.name] = shard
        self.kept.update(finished)
        if complete:
            self.unnamed.append(plan.name)

    def _scratch(self, shard: str) -> Path:
        return self.scratch / shard

    @property
    def scratch(self) -> Path:
        """Folder of shards that are not finished."""
        return self._writer.scratch

    @property
    def remaining_bytes(self) -> int:
        """Bytes still to be written."""
        return sum(p.end - p.begin for name, p in self.places.items() if name not in self.kept)

    def opened(self, shard: str) -> OutputShard:
        """The file of a shard that is not finished; not to be called from two threads at once."""
        if shard not in self._open:
            self._open[shard] = OutputShard(self._scratch(shard), self._plans[shard].header)
        return self._open[shard]

    def write_back(self) -> None:
        """See `OutputShard.write_back`; from the thread that finishes shards."""
        for shard in list(self._open.values()):
            shard.write_back()

    def finish(self, shard: str) -> FileEntry:
        """Give a shard, all of whose tensors are in the journal, its name."""
        found = self._open.pop(shard)
        found.close()
        self._journal.sync()  # a shard that has its name always has its figures
        return self._writer.take(shard, found.path, found.sha256())

    def close(self) -> None:
        """Close what is open; a later run goes on with it."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()
