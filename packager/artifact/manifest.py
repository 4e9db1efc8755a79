"""What a sealed directory states about itself, and the comparison of that with what it holds."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from packager.artifact.strict_json import strict_json
from packager.errors import BadInput, IntegrityFailure

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = ".journal.jsonl"
SCRATCH_NAME = ".scratch"
PART_SUFFIX = ".part"
MAX_MANIFEST_BYTES = 1 << 26
"""Room for some 300,000 files."""


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
        return relative_path(value)


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
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the canonical JSON: the identity of the artifact."""
        return "sha256:" + hashlib.sha256(self.canonical()).hexdigest()

    def entry(self, path: str) -> FileEntry | None:
        """The entry of one file, or None."""
        return next((entry for entry in self.files if entry.path == path), None)


def canonical_json(document: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8. Raises ValueError: NaN or infinity."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def relative_path(path: str) -> str:
    """The path itself. Raises ValueError: not plainly inside the directory, or a reserved name."""
    pure = PurePosixPath(path)
    if (
        not pure.parts
        or pure.is_absolute()
        or "\\" in path
        or "\0" in path
        or str(pure) != path
        or ".." in pure.parts
    ):
        raise ValueError(f"{path!r} is not a plain relative path")
    if path in (MANIFEST_NAME, JOURNAL_NAME) or pure.parts[0] == SCRATCH_NAME or path.endswith(PART_SUFFIX):
        raise ValueError(f"{path!r} is a name that artifacts keep for themselves")
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, bare hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


_REMEDY = "Give the folder of a finished stage or of a bundle."


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
        raise BadInput(f"no directory {path}", _REMEDY)
    if not is_sealed(path):
        unfinished = (path / JOURNAL_NAME).is_file()
        raise BadInput(
            f"{path} is {'an unfinished' if unfinished else 'not an'} artifact: it has no {MANIFEST_NAME}",
            "Run the command that makes it again; finished files are kept." if unfinished else _REMEDY,
        )
    file = path / MANIFEST_NAME
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BadInput(f"{file} has more than {MAX_MANIFEST_BYTES} bytes: it is not read", _REMEDY)
    return parse_manifest(file.read_bytes(), str(file))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in the bytes of a `manifest.json`. Raises BadInput: malformed, or of another version."""
    try:
        manifest = Manifest.model_validate(strict_json(data))
    except ValueError as err:
        raise BadInput(f"{where} is malformed: {err}", "Make the artifact again.") from None
    if manifest.schema_version != 1:
        raise BadInput(
            f"{where} has schema version {manifest.schema_version}; this version reads 1",
            "Use a newer packager.",
        )
    return manifest


def sealed_for(path: Path, *, stage: str, recipe_digest: str, inputs: dict[str, str]) -> Manifest | None:
    """The manifest if `path` is sealed for exactly this stage, recipe and inputs, else None.

    Raises:
        IntegrityFailure: it is that artifact, but files are missing, stray or of another size.
    """
    path = Path(path)
    if not is_sealed(path):
        return None
    manifest = read_manifest(path)
    if (manifest.stage, manifest.recipe_digest, manifest.inputs) != (stage, recipe_digest, inputs):
        return None
    with contextlib.suppress(OSError):
        (path / JOURNAL_NAME).unlink(missing_ok=True)  # left by a kill just after the manifest was written
    return check(path, deep=False)


def check(
    path: Path, *, deep: bool = True, ignore: Iterable[str] = (), hashed: Mapping[str, str] | None = None
) -> Manifest:
    """Compare a sealed artifact with its manifest.

    Args:
        path: the artifact.
        deep: hash every file again; False: compare sizes only.
        ignore: glob patterns of files that may lie beside it (what a hub client leaves behind).
        hashed: SHA-256 (bare hexadecimal) of files that the caller has just read anyway.

    Raises:
        BadInput: not a sealed artifact.
        IntegrityFailure: names each changed, missing or stray file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    patterns = tuple(ignore)
    known_hashes = hashed or {}
    problems: list[str] = []
    for entry in manifest.files:
        target = path / entry.path
        if not target.is_file():
            problems.append(f"missing: {entry.path}")
        elif (size := target.stat().st_size) != entry.size:
            problems.append(f"changed: {entry.path} ({size} bytes, sealed with {entry.size})")
        elif deep and (known_hashes.get(entry.path) or file_sha256(target)) != entry.sha256:
            problems.append(f"changed: {entry.path} (same size, other bytes)")
    known = {entry.path for entry in manifest.files} | {MANIFEST_NAME, JOURNAL_NAME}
    for rel in sorted(set(walk_files(path)) - known):
        if not any(fnmatch.fnmatchcase(rel, pattern) for pattern in patterns):
            problems.append(f"stray: {rel}")
    if problems:
        raise IntegrityFailure(
            f"{path} is not what was sealed:\n" + "\n".join(f"  {problem}" for problem in problems),
            "Remove the directory and make (or download) it again.",
        )
    return manifest


def walk_files(root: Path) -> Iterator[str]:
    """Relative paths of all that is not a directory; a link to a directory counts as a file."""
    for directory, names, files in os.walk(root):
        base = Path(directory)
        links = [name for name in names if (base / name).is_symlink()]
        for name in (*files, *links):
            yield (base / name).relative_to(root).as_posix()
