"""Shards written into an artifact: a plan made from shapes alone, then one file at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from packager.artifact import ArtifactWriter, FileEntry, HashingFile, is_sealed, read_manifest
from packager.checkpoint.folder import Folder
from packager.checkpoint.header import DTYPE_BYTES, build_header, readable_bytes
from packager.checkpoint.source import INDEX_NAME
from packager.errors import BadInput, IntegrityFailure

_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardPlan:
    """One file to be written, its tensors in data order."""

    name: str
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def header(self) -> bytes:
        """The bytes before the data."""
        return build_header((spec.name, spec.dtype, spec.shape) for spec in self.tensors)


def plan_shards(groups: Iterable[Sequence[TensorSpec]], shard_bytes: int) -> list[ShardPlan]:
    """Cut groups of tensors (a weight and its scale stay together) into files of at most `shard_bytes`.

    A group larger than that gets a file of its own. Order is kept; equal input gives equal names and bytes.
    """
    bins: list[list[TensorSpec]] = []
    filled = 0
    for group in groups:
        size = sum(spec.nbytes for spec in group)
        if not bins or (filled and filled + size > shard_bytes):
            bins.append([])
            filled = 0
        bins[-1].extend(group)
        filled += size
    total = len(bins)
    return [
        ShardPlan(f"model-{number:05d}-of-{total:05d}.safetensors", tuple(tensors))
        for number, tensors in enumerate(bins, start=1)
    ]


class ShardData:
    """The data section of a shard while it is written; it must become as long as the header announced."""

    def __init__(self, plan: ShardPlan, handle: HashingFile) -> None:
        self._handle, self._plan = handle, plan
        handle.write(plan.header)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes of the next tensors."""
        self._handle.write(data)

    def finish(self) -> None:
        """Check that the shard is full. Raises RuntimeError: it is not."""
        expected = len(self._plan.header) + self._plan.nbytes
        if self._handle.size != expected:
            raise RuntimeError(f"{self._plan.name}: {self._handle.size} bytes written, {expected} announced")


def write_index(writer: ArtifactWriter, plans: Sequence[ShardPlan]) -> FileEntry:
    """The standard index beside shards that are finished."""
    weight_map = {spec.name: plan.name for plan in plans for spec in plan.tensors}
    total = sum(plan.nbytes for plan in plans)
    return writer.write_json(
        INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def carry_over(writer: ArtifactWriter, source: Folder, names: Iterable[str]) -> None:
    """Put unchanged files of the checkpoint in `source` into the artifact.

    Weights are linked, never copied. Small files are linked only where a manifest states their hash: their
    owner may edit any other in place, and the edit would show in the sealed artifact. From a hub every file
    comes straight into the artifact, and does not appear there unless it has the listed hash.

    Raises:
        IntegrityFailure: bytes other than those sealed or listed.
        BadInput, RemoteFailure: as `Folder.open`.
    """
    path = source.path
    manifest = read_manifest(path) if path is not None and is_sealed(path) else None
    for name in names:
        if writer.done(name) is not None:
            continue
        entry = manifest.entry(name) if manifest else None
        if path is None:
            _download(writer, source, name)
        elif entry is not None:
            writer.link(name, path / name, entry.sha256)
        elif name.endswith(".safetensors"):
            writer.link(name, path / name, None)
        else:
            writer.copy(name, path / name)


def _download(writer: ArtifactWriter, source: Folder, name: str) -> None:
    stated = source.stated_sha256(name)
    if stated is None:
        writer.write_bytes(name, source.read(name))
        return
    size, origin = source.sizes()[name], source.open(name)
    try:
        with writer.create(name) as handle:
            for begin in range(0, size, _CHUNK):
                piece = bytearray(min(_CHUNK, size - begin))
                origin.fill(memoryview(piece), begin)
                handle.write(piece)
            if handle.hexdigest() != stated:
                raise IntegrityFailure(
                    f"the bytes of {source.where(name)} are not those that the hub lists",
                    "Run the same command again; if it happens again, something on the way alters them.",
                )
    finally:
        origin.close()


def require_space(directory: Path, needed: int) -> None:
    """Raise BadInput before the work rather than after hours of it, if `needed` bytes will not fit."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise BadInput(
            f"{directory} has {readable_bytes(free)} free; {readable_bytes(needed)} are still to be written",
            "Free space or choose another directory; finished files are kept.",
        )
