"""Sealed directories: what every stage reads and what every stage leaves behind.

A stage writes its files one by one. Each goes to a temporary name, is flushed to the disk, renamed, and then
recorded in `.journal.jsonl`; `manifest.json` comes last. So a directory with a manifest is complete, and one
without can be continued after a SIGKILL: files in the journal are kept, everything else is written again.
SHA-256 is taken while the bytes are written, once. A manifest holds no time, host or absolute path, and its
digest is the SHA-256 of the manifest file itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from packager import __version__
from packager.errors import BadInput, IntegrityFailure

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = ".journal.jsonl"
SCRATCH_NAME = ".scratch"
_PART = ".part"
_CHUNK = 1 << 22


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """Relative, with forward slashes."""
    size: int = Field(ge=0)
    """Bytes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Bare hexadecimal."""

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        return _relative(value)


class Manifest(BaseModel):
    """What an artifact holds and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    stage: str
    recipe_digest: str
    inputs: dict[str, str]
    """Name of an input -> digest of it."""
    tools: dict[str, str]
    """Tool -> version."""
    files: list[FileEntry]
    """Sorted by path; every file of the directory except the manifest."""
    metrics: dict[str, Any]

    @field_validator("files")
    @classmethod
    def _sorted_once(cls, value: list[FileEntry]) -> list[FileEntry]:
        paths = [entry.path for entry in value]
        if paths != sorted(set(paths)):
            raise ValueError("files must be sorted by path, each named once")
        return value

    def canonical(self) -> bytes:
        """Canonical JSON (sorted keys, no spaces, UTF-8): the exact bytes of `manifest.json`."""
        return _canonical(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the canonical JSON: the identity of the artifact."""
        return "sha256:" + hashlib.sha256(self.canonical()).hexdigest()

    def entry(self, path: str) -> FileEntry | None:
        """The entry of one file, or None."""
        return next((entry for entry in self.files if entry.path == path), None)


def _canonical(document: Any) -> bytes:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _relative(path: str) -> str:
    pure = PurePosixPath(path)
    if (
        not path
        or pure.is_absolute()
        or "\\" in path
        or "\0" in path
        or str(pure) != path
        or ".." in pure.parts
    ):
        raise ValueError(f"{path!r} is not a plain relative path")
    if path in (MANIFEST_NAME, JOURNAL_NAME) or pure.parts[0] == SCRATCH_NAME or path.endswith(_PART):
        raise ValueError(f"{path!r} is a name that artifacts keep for themselves")
    return path


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, bare hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
            for rel in list(_walk(self.path)):
                scratch = rel.split("/", 1)[0] == SCRATCH_NAME
                if rel not in kept and rel != JOURNAL_NAME and not (scratch and same_key):
                    (self.path / rel).unlink()
        else:
            foreign = [rel for rel in _walk(self.path) if rel != JOURNAL_NAME + _PART]
            if foreign:
                raise BadInput(
                    f"{self.path} is not empty and not an unfinished artifact (it holds {foreign[0]})",
                    "Choose an empty or new directory.",
                )
        # The journal's key reaches the disk, whole, before any file does.
        lines = [_canonical(self._key())] + [_journal_line(*found) for found in kept.values()]
        part = self.path / (JOURNAL_NAME + _PART)
        with part.open("wb") as handle:
            handle.write(b"\n".join(lines) + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(journal)
        _fsync_directory(self.path)
        self._entries = {rel: entry for rel, (entry, _) in kept.items()}

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
        target = self.path / _relative(rel)
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
        part = target.with_name(target.name + _PART)
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
        part = target.with_name(target.name + _PART)
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

    def seal(self, metrics: dict[str, Any], tools: dict[str, str] | None = None) -> Manifest:
        """Write the manifest; the artifact is finished.

        Raises:
            IntegrityFailure: the directory holds files that nobody recorded.
        """
        if self._lock is None:
            raise RuntimeError("the artifact is not open for writing")
        known = {*self._entries, JOURNAL_NAME}
        stray = [rel for rel in _walk(self.path) if rel not in known and rel.split("/", 1)[0] != SCRATCH_NAME]
        if stray:
            raise IntegrityFailure(
                f"{self.path} holds files that this stage did not write: {', '.join(sorted(stray))}",
                "Remove them and run the same command again.",
            )
        manifest = Manifest(
            stage=self.stage,
            recipe_digest=self.recipe_digest,
            inputs=self.inputs,
            tools={"packager": __version__, **(tools or {})},
            files=self.entries,
            metrics=json.loads(_canonical(metrics)),
        )
        target = self.path / MANIFEST_NAME
        part = target.with_name(MANIFEST_NAME + _PART)
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


# ---- reading --------------------------------------------------------------------------------------------


def is_sealed(path: Path) -> bool:
    """Whether the directory holds a manifest, that is: whether the stage that wrote it finished."""
    return (Path(path) / MANIFEST_NAME).is_file()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a sealed artifact.

    Raises:
        BadInput: no such directory, not sealed, or a manifest that is malformed.
    """
    path = Path(path)
    if not path.is_dir():
        raise BadInput(f"no directory {path}")
    if not is_sealed(path):
        unfinished = (path / JOURNAL_NAME).is_file()
        raise BadInput(
            f"{path} is {'an unfinished' if unfinished else 'not an'} artifact: it has no {MANIFEST_NAME}",
            "Run the command that makes it again; finished files are kept." if unfinished else "",
        )
    try:
        raw = json.loads((path / MANIFEST_NAME).read_bytes())
        manifest = Manifest.model_validate(raw)
    except (ValueError, ValidationError) as err:
        raise BadInput(f"{path / MANIFEST_NAME} is malformed: {err}", "Make the artifact again.") from None
    if manifest.schema_version != 1:
        raise BadInput(
            f"{path / MANIFEST_NAME} has schema version {manifest.schema_version}; this version reads 1",
            "Use a newer packager.",
        )
    return manifest


def sealed_for(path: Path, *, stage: str, recipe_digest: str, inputs: dict[str, str]) -> Manifest | None:
    """The manifest if `path` is sealed for exactly this stage, recipe and inputs, else None.

    Raises:
        IntegrityFailure: it is that artifact, but files are missing, stray or of another size.
    """
    if not is_sealed(path):
        return None
    manifest = read_manifest(path)
    if (manifest.stage, manifest.recipe_digest, manifest.inputs) != (stage, recipe_digest, inputs):
        return None
    return check(path, deep=False)


def check(path: Path, *, deep: bool = True, ignore: Iterable[str] = ()) -> Manifest:
    """Compare a sealed artifact with its manifest.

    Args:
        path: the artifact.
        deep: hash every file again; False: compare sizes only.
        ignore: glob patterns of files that may lie beside it (what a hub client leaves behind).

    Raises:
        BadInput: not a sealed artifact.
        IntegrityFailure: names each changed, missing or stray file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    patterns = tuple(ignore)
    problems: list[str] = []
    for entry in manifest.files:
        target = path / entry.path
        if not target.is_file():
            problems.append(f"missing: {entry.path}")
        elif (size := target.stat().st_size) != entry.size:
            problems.append(f"changed: {entry.path} ({size} bytes, sealed with {entry.size})")
        elif deep and file_sha256(target) != entry.sha256:
            problems.append(f"changed: {entry.path} (same size, other bytes)")
    known = {entry.path for entry in manifest.files} | {MANIFEST_NAME, JOURNAL_NAME}
    for rel in sorted(set(_walk(path)) - known):
        if not any(fnmatch.fnmatchcase(rel, pattern) for pattern in patterns):
            problems.append(f"stray: {rel}")
    if problems:
        raise IntegrityFailure(
            f"{path} is not what was sealed:\n" + "\n".join(f"  {problem}" for problem in problems),
            "Remove the directory and make (or download) it again.",
        )
    return manifest


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all that is not a directory; a link to a directory counts as a file."""
    for directory, names, files in os.walk(root):
        base = Path(directory)
        links = [name for name in names if (base / name).is_symlink()]
        for name in (*files, *links):
            yield (base / name).relative_to(root).as_posix()


def _journal_line(entry: FileEntry, mtime_ns: int) -> bytes:
    return _canonical({**entry.model_dump(), "mtime_ns": mtime_ns})


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
