"""Writing an artifact: atomic files, a journal to continue from, the manifest last."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from packager import __version__
from packager.artifact.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    PART_SUFFIX,
    SCRATCH_NAME,
    FileEntry,
    Manifest,
    canonical_json,
    file_sha256,
    is_sealed,
    relative_path,
    walk_files,
)
from packager.errors import BadInput, IntegrityFailure

_CHUNK = 1 << 22


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the failures of a disk (full, read-only, forbidden) into BadInput that names `path`."""
    try:
        yield
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(
                f"the disk is full: cannot write {path}",
                "Free space and run the same command again: finished files are kept.",
            ) from err
        if err.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
            raise BadInput(
                f"cannot write {path}: {os.strerror(err.errno)}", "Choose a directory that you may write to."
            ) from err
        if err.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise BadInput(f"cannot write {path}: something else has that name") from err
        if err.errno == errno.EFBIG:
            raise BadInput(f"cannot write {path}: larger than the file size limit") from err
        raise


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashingFile:
    """A binary file open for writing that hashes what passes through it."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        self._raw, self._path = raw, path
        self._sha = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data`. Raises BadInput when the disk is full or read-only."""
        view = memoryview(data).cast("B")
        with writing(self._path):
            self._raw.write(view)
        self._sha.update(view)
        self.size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Nothing to do: the file is flushed to the disk once, when it is complete."""

    def hexdigest(self) -> str:
        """SHA-256 of all bytes written so far."""
        return self._sha.hexdigest()


class ArtifactWriter:
    """Writes one artifact, or continues an unfinished one.

    An unfinished directory is continued when its journal was opened for the same stage, recipe digest, inputs
    and version of this package; otherwise what it holds is discarded. Other people's files are never touched.

    Raises:
        BadInput: on entering, when the directory is sealed already, holds foreign files or cannot be written,
            or another process is writing it.
    """

    def __init__(self, path: Path, *, stage: str, recipe_digest: str, inputs: dict[str, str]) -> None:
        self.path = Path(path)
        self.stage, self.recipe_digest, self.inputs = stage, recipe_digest, dict(inputs)
        self._entries: dict[str, FileEntry] = {}
        self._lock: int | None = None

    # ---- life cycle -----------------------------------------------------------------------------------

    def __enter__(self) -> ArtifactWriter:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        # A lock on the directory itself dies with the process and leaves no file behind.
        lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(
                    f"another process is writing {self.path}", "Wait for it, or choose another directory."
                ) from None
            if is_sealed(self.path):
                raise BadInput(
                    f"{self.path} is a finished artifact; it is never written into again",
                    "Choose another directory, or remove this one first.",
                )
            with writing(self.path):
                self._reopen()
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _key(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "recipe_digest": self.recipe_digest,
            "inputs": self.inputs,
            "packager": __version__,
        }

    def _reopen(self) -> None:
        journal = self.path / JOURNAL_NAME
        kept: dict[str, tuple[FileEntry, int]] = {}
        if journal.is_file():
            same_key, recorded = _read_journal(journal, self._key())
            if same_key:
                kept = {rel: found for rel, found in recorded.items() if _unchanged(self.path, *found)}
            for rel in list(walk_files(self.path)):
                scratch = rel.split("/", 1)[0] == SCRATCH_NAME
                if rel not in kept and rel != JOURNAL_NAME and not (scratch and same_key):
                    (self.path / rel).unlink()
        else:
            foreign = [rel for rel in walk_files(self.path) if rel != JOURNAL_NAME + PART_SUFFIX]
            if foreign:
                raise BadInput(
                    f"{self.path} is not empty and not an unfinished artifact (it holds {foreign[0]})",
                    "Choose an empty or new directory.",
                )
        self._begin_journal(kept)

    def _begin_journal(self, kept: dict[str, tuple[FileEntry, int]]) -> None:
        # The journal's key reaches the disk, whole, before any file does.
        lines = [canonical_json(self._key())] + [_journal_line(*found) for found in kept.values()]
        part = self.path / (JOURNAL_NAME + PART_SUFFIX)
        with part.open("wb") as handle:
            handle.write(b"\n".join(lines) + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(self.path / JOURNAL_NAME)
        _fsync_directory(self.path)
        self._entries = {rel: entry for rel, (entry, _) in kept.items()}

    def discard(self) -> None:
        """Forget and remove all that was finished so far: an input has turned out to be another one.

        A kill in the middle leaves nothing that a later run would keep without having made it itself.
        """
        if self._lock is None:
            raise RuntimeError("the artifact is not open for writing")
        with writing(self.path):
            shutil.rmtree(self.path / SCRATCH_NAME, ignore_errors=True)
            self._begin_journal({})
            for rel in list(walk_files(self.path)):
                if rel != JOURNAL_NAME:
                    (self.path / rel).unlink()

    def _record(self, entry: FileEntry) -> FileEntry:
        target = self.path / entry.path
        with writing(target):
            _fsync_directory(target.parent)
            line = _journal_line(entry, target.stat().st_mtime_ns)
            with (self.path / JOURNAL_NAME).open("ab") as handle:
                handle.write(line + b"\n")
                handle.flush()
                os.fsync(handle.fileno())
        self._entries[entry.path] = entry
        return entry

    def _target(self, rel: str) -> Path:
        if self._lock is None:
            raise RuntimeError("the artifact is not open for writing")
        target = self.path / relative_path(rel)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        return target

    # ---- files ----------------------------------------------------------------------------------------

    @property
    def scratch(self) -> Path:
        """A directory for work in progress: kept while the artifact is unfinished, gone once sealed."""
        directory = self.path / SCRATCH_NAME
        with writing(directory):
            directory.mkdir(exist_ok=True)
        return directory

    @property
    def entries(self) -> list[FileEntry]:
        """Files finished so far, sorted by path."""
        return [self._entries[rel] for rel in sorted(self._entries)]

    def done(self, rel: str) -> FileEntry | None:
        """The entry of a file finished in this or an earlier run, else None."""
        return self._entries.get(rel)

    @contextlib.contextmanager
    def create(self, rel: str) -> Iterator[HashingFile]:
        """Write a file: it appears under its name, complete, when the block ends without an error."""
        target = self._target(rel)
        part = target.with_name(target.name + PART_SUFFIX)
        try:
            with writing(target):
                raw = part.open("wb")
            try:
                hashing = HashingFile(raw, target)
                yield hashing
                with writing(target):
                    raw.flush()
                    os.fsync(raw.fileno())
            finally:
                # Closing flushes what is buffered: on a full disk it fails again, and the first error counts.
                with contextlib.suppress(OSError):
                    raw.close()
            with writing(target):
                part.replace(target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self._record(FileEntry(path=rel, size=hashing.size, sha256=hashing.hexdigest()))

    def write_bytes(self, rel: str, data: bytes) -> FileEntry:
        """Write a file that holds `data`."""
        with self.create(rel) as handle:
            handle.write(data)
        return self._entries[rel]

    def write_text(self, rel: str, text: str) -> FileEntry:
        """Write a UTF-8 file."""
        return self.write_bytes(rel, text.encode())

    def write_json(self, rel: str, document: Any) -> FileEntry:
        """Write indented JSON, keys in the given order, ending in a newline. NaN and infinity are refused."""
        return self.write_text(
            rel, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )

    def link(self, rel: str, source: Path, sha256: str | None) -> FileEntry:
        """Put `source` into the artifact as a hard link; where that cannot be, as a copy.

        `sha256` is the file's hash where a manifest already states it; None: it is taken now. A copy is
        hashed in any case, and IntegrityFailure is raised if it is not what `sha256` says.
        """
        target, real = self._target(rel), Path(source).resolve()
        if not real.is_file():
            raise BadInput(f"no file {source}")
        part = target.with_name(target.name + PART_SUFFIX)
        part.unlink(missing_ok=True)
        try:
            os.link(real, part)
        except OSError:
            return self.copy(rel, real, sha256)
        # Between two names of one file rename does nothing, by POSIX: the old name must go first.
        target.unlink(missing_ok=True)
        part.replace(target)
        size = target.stat().st_size
        return self._record(FileEntry(path=rel, size=size, sha256=sha256 or file_sha256(target)))

    def copy(self, rel: str, source: Path, sha256: str | None = None) -> FileEntry:
        """Copy a file in. Raises IntegrityFailure if `sha256` is given and is not the hash of its bytes."""
        with Path(source).open("rb") as origin, self.create(rel) as handle:
            while chunk := origin.read(_CHUNK):
                handle.write(chunk)
            if sha256 is not None and handle.hexdigest() != sha256:
                raise IntegrityFailure(
                    f"{source} is not the file that was sealed", "Make the artifact that holds it again."
                )
        return self._entries[rel]

    def adopt(self, rel: str) -> FileEntry:
        """Take in a file that another tool wrote straight into the directory: flush, hash and journal it."""
        target = self._target(rel)
        if target.is_symlink() or not target.is_file():
            raise BadInput(f"no regular file {target}")
        with writing(target), target.open("rb") as handle:
            os.fsync(handle.fileno())
        return self._record(FileEntry(path=rel, size=target.stat().st_size, sha256=file_sha256(target)))

    def take(self, rel: str, finished: Path, sha256: str) -> FileEntry:
        """Move a file in from `scratch`, complete, under its name.

        `sha256` (bare hexadecimal) was taken as its bytes were written. The data reaches the disk before the
        name does.
        """
        target = self._target(rel)
        with writing(target):
            with finished.open("rb") as handle:
                os.fsync(handle.fileno())
                size = os.fstat(handle.fileno()).st_size
            finished.replace(target)
        return self._record(FileEntry(path=rel, size=size, sha256=sha256))

    def seal(
        self,
        metrics: dict[str, Any],
        tools: dict[str, str] | None = None,
        inputs: dict[str, str] | None = None,
    ) -> Manifest:
        """Write the manifest; the artifact is finished.

        `inputs` replaces what the journal was opened with, for a stage that knows the digests of its inputs
        only once it has read them.

        Raises:
            IntegrityFailure: the directory holds files that nobody recorded.
        """
        if self._lock is None:
            raise RuntimeError("the artifact is not open for writing")
        known = {*self._entries, JOURNAL_NAME}
        stray = [
            rel for rel in walk_files(self.path) if rel not in known and rel.split("/", 1)[0] != SCRATCH_NAME
        ]
        if stray:
            raise IntegrityFailure(
                f"{self.path} holds files that this stage did not write: {', '.join(sorted(stray))}",
                "Remove them and run the same command again.",
            )
        manifest = Manifest(
            stage=self.stage,
            recipe_digest=self.recipe_digest,
            inputs=self.inputs if inputs is None else dict(inputs),
            tools={"packager": __version__, **(tools or {})},
            files=self.entries,
            metrics=json.loads(canonical_json(metrics)),
        )
        target = self.path / MANIFEST_NAME
        part = target.with_name(MANIFEST_NAME + PART_SUFFIX)
        with writing(target):
            shutil.rmtree(self.path / SCRATCH_NAME, ignore_errors=True)
            try:
                with part.open("wb") as handle:
                    handle.write(manifest.canonical())
                    handle.flush()
                    os.fsync(handle.fileno())
                part.replace(target)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            _fsync_directory(self.path)
            # A kill just here leaves a sealed artifact with a journal beside it; `check` knows that name.
            (self.path / JOURNAL_NAME).unlink(missing_ok=True)
        return manifest


def _journal_line(entry: FileEntry, mtime_ns: int) -> bytes:
    return canonical_json({**entry.model_dump(), "mtime_ns": mtime_ns})


def _read_journal(journal: Path, key: dict[str, Any]) -> tuple[bool, dict[str, tuple[FileEntry, int]]]:
    """Whether the journal was opened with `key`, and what it records; a torn last line counts for nothing."""
    lines = journal.read_bytes().split(b"\n")
    try:
        if json.loads(lines[0]) != key:
            return False, {}
    except ValueError:
        return False, {}
    recorded: dict[str, tuple[FileEntry, int]] = {}
    for line in lines[1:]:
        try:
            raw = json.loads(line)
            mtime_ns = int(raw.pop("mtime_ns"))
            entry = FileEntry.model_validate(raw)
        except (ValueError, TypeError, KeyError, AttributeError):
            break
        recorded[entry.path] = (entry, mtime_ns)
    return True, recorded


def _unchanged(root: Path, entry: FileEntry, mtime_ns: int) -> bool:
    target = root / entry.path
    if target.is_symlink() or not target.is_file():
        return False
    status = target.stat()
    return status.st_size == entry.size and status.st_mtime_ns == mtime_ns
