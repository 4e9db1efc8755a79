"""Where the files of a checkpoint lie: a folder on this machine, or (hub.py) a commit of a hub repository.

Everything above reads through `Folder`, so that headers, index, config and tensor data are judged by the same
code wherever they come from.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from packager.artifact import Manifest, check, file_sha256, is_sealed
from packager.artifact.strict_json import strict_json
from packager.checkpoint.header import ShardHeader, read_header
from packager.errors import BadInput, IntegrityFailure

MAX_JSON_BYTES = 1 << 26
"""Configurations and indexes are parsed whole; a larger one is none."""
MAX_WHOLE_BYTES = 1 << 28
"""The largest file that is held in memory: tokenizers have a few tens of megabytes."""


class OpenFile(ABC):
    """A file open for reading at any position; for one thread at a time."""

    @abstractmethod
    def fill(self, view: memoryview, position: int) -> None:
        """Fill `view` with the bytes from `position` on.

        Raises:
            BadInput: the file is shorter, cannot be read, or has changed since it was first looked at.
            RemoteFailure: a hub does not give the bytes.
            IntegrityFailure: a hub gave other bytes than it announced.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; it cannot be read after that."""


class Folder(ABC):
    """The files of a checkpoint, by name. May be used from many threads."""

    name: str
    """As messages and reports call it: the path, or `hf://org/name@commit`."""
    path: Path | None
    """The directory; None where the files are not on this machine."""

    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file in it, by name, links followed; nothing of what lies deeper.

        Raises:
            BadInput: the folder cannot be read.
        """

    @abstractmethod
    def open(self, name: str) -> OpenFile:
        """Open a file. Raises as `OpenFile.fill`."""

    @abstractmethod
    def sha256(self, name: str) -> str:
        """SHA-256 of a file, bare hexadecimal. Raises as `OpenFile.fill`."""

    @abstractmethod
    def identity(self, name: str) -> str:
        """What stays the same while a file's content does; asked for without reading it. Raises as `open`."""

    @abstractmethod
    def stated_sha256(self, name: str) -> str | None:
        """The SHA-256 that the files' keeper states, known without reading; None where nobody states one."""

    @abstractmethod
    def settle(self, name: str) -> None:
        """Make sure that a file is still what it was when it was opened, before what was made of it counts.

        On a hub: that its bytes have the hash which is listed; what nobody has read in order yet is read.

        Raises:
            As `OpenFile.fill`.
        """

    @abstractmethod
    def manifest(self, *, deep: bool, hashed: Mapping[str, str] | None = None) -> Manifest | None:
        """The manifest if this is a sealed artifact that is as it was sealed, None if it is no artifact.

        Args:
            deep: compare the hash of every file; False: of every file but the weights.
            hashed: SHA-256 (bare hexadecimal) of files that the caller has just read anyway.

        Raises:
            BadInput: a malformed manifest. IntegrityFailure: names each changed, missing or stray file.
        """

    @abstractmethod
    def child(self, name: str) -> Folder | None:
        """The folder of that name within this one, if it has a config.json."""

    @abstractmethod
    def headers(self, names: Iterable[str]) -> dict[str, ShardHeader | BadInput]:
        """The checked header of each safetensors file, or what is wrong with it, in the order given.

        Raises:
            RemoteFailure: a hub does not answer.
        """

    def where(self, name: str) -> str:
        """How messages call a file of this folder."""
        return f"{self.name}/{name}"

    def read(self, name: str) -> bytes:
        """A whole small file. Raises as `OpenFile.fill`, and BadInput: no such file, or a large one."""
        size = self.sizes().get(name)
        if size is None:
            raise BadInput(f"no file {self.where(name)}", "Give the folder of a whole checkpoint.")
        if size > MAX_WHOLE_BYTES:
            raise BadInput(f"{self.where(name)} has {size} bytes: too many for a file that is read whole")
        return self.beginning(name, size)

    def beginning(self, name: str, count: int) -> bytes:
        """The first bytes of a file. Raises as `OpenFile.fill`."""
        data = bytearray(count)
        handle = self.open(name)
        try:
            handle.fill(memoryview(data), 0)
        finally:
            handle.close()
        return bytes(data)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file that holds an object. Raises as `read`, and BadInput: too large, or not sound JSON."""
        if self.sizes().get(name, 0) > MAX_JSON_BYTES:
            raise BadInput(f"{self.where(name)} has more than {MAX_JSON_BYTES} bytes: it is not read")
        return parse_json_object(self.read(name), self.where(name))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """The object that a JSON text holds. Raises BadInput: not JSON, a key twice, or no object."""

    try:
        document = strict_json(text)
    except ValueError as err:
        raise BadInput(f"{where} is not sound JSON: {err}") from None
    if not isinstance(document, dict):
        raise BadInput(f"{where} does not hold a JSON object")
    return document


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises BadInput: missing, not JSON, a key twice, or no object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BadInput(f"{path} has more than {MAX_JSON_BYTES} bytes: it is not read")
        text = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"no file {path}") from None
    except OSError as err:
        raise BadInput(f"cannot read {path}: {err.strerror}") from None
    return parse_json_object(text, str(path))


class LocalFolder(Folder):
    """A directory on this machine; links in it are followed, so a hub cache's snapshot is one."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.name = str(path)
        self._stamps: dict[str, tuple[int, ...]] = {}

    def sizes(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        try:
            for entry in os.scandir(self.path):
                with contextlib.suppress(OSError):  # a link that leads nowhere: as good as missing
                    if entry.is_file():
                        found[entry.name] = entry.stat().st_size
        except OSError as err:
            raise BadInput(f"cannot read {self.path}: {err.strerror}") from None
        return found

    def open(self, name: str) -> OpenFile:
        return _LocalFile(self, name)

    def sha256(self, name: str) -> str:
        # Looked at before and after: the hash is that of the file whose header was read.
        self._look(name)
        try:
            found = file_sha256(self.path / name)
        except OSError as err:
            raise BadInput(f"cannot read {self.path / name}: {err.strerror}") from None
        self._look(name)
        return found

    def identity(self, name: str) -> str:
        try:
            status = (self.path / name).stat()
        except OSError as err:
            raise BadInput(f"cannot read {self.path / name}: {err.strerror}") from None
        # The kernel sets ctime at each change: it cannot be put back as mtime can.
        stamps = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino)
        return "file:" + "-".join(map(str, stamps))

    def stated_sha256(self, _name: str) -> str | None:
        return None

    def settle(self, name: str) -> None:
        self._look(name)

    def manifest(self, *, deep: bool, hashed: Mapping[str, str] | None = None) -> Manifest | None:
        if not is_sealed(self.path):
            return None
        found = check(self.path, deep=deep, hashed=hashed)
        if not deep:
            small = [entry for entry in found.files if not entry.path.endswith(".safetensors")]
            changed = [e.path for e in small if file_sha256(self.path / e.path) != e.sha256]
            if changed:
                raise IntegrityFailure(f"changed since it was sealed: {', '.join(changed)}")
        return found

    def child(self, name: str) -> Folder | None:
        return LocalFolder(self.path / name) if (self.path / name / "config.json").is_file() else None

    def headers(self, names: Iterable[str]) -> dict[str, ShardHeader | BadInput]:
        found: dict[str, ShardHeader | BadInput] = {}
        for name in names:
            try:
                self._look(name)
                found[name] = read_header(self.path / name)
            except BadInput as err:
                found[name] = err
        return found

    def _look(self, name: str) -> None:
        try:
            self.compare(name, (self.path / name).stat())
        except OSError as err:
            raise BadInput(f"cannot read {self.path / name}: {err.strerror}") from None

    def compare(self, name: str, status: os.stat_result) -> None:
        """Raise BadInput unless the file is the one that was looked at first, by size, time and inode."""
        stamp = (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
        if self._stamps.setdefault(name, stamp) != stamp:
            raise BadInput(
                f"{self.path / name} has changed since it was opened",
                "Leave the source alone while it is read, then run the same command again.",
            )


class _LocalFile(OpenFile):
    def __init__(self, folder: LocalFolder, name: str) -> None:
        self._folder, self._name = folder, name
        try:
            self._handle = os.open(folder.path / name, os.O_RDONLY)
        except OSError as err:
            raise BadInput(f"cannot read {folder.where(name)}: {err.strerror}") from None
        try:
            folder.compare(name, os.fstat(self._handle))
        except BadInput:
            self.close()
            raise

    def fill(self, view: memoryview, position: int) -> None:
        while view.nbytes:
            try:
                got = os.preadv(self._handle, [view], position)
            except OSError as err:
                raise BadInput(f"cannot read {self._folder.where(self._name)}: {err.strerror}") from None
            if not got:
                break
            view, position = view[got:], position + got
        # After reading: bytes that were replaced under our hands are not used.
        self._folder.compare(self._name, os.fstat(self._handle))
        if view.nbytes:
            raise BadInput(f"{self._folder.where(self._name)} ends at byte {position}")

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def combined_digest(hashes: Mapping[str, str]) -> str:
    """`sha256:<hex>` over the lines `sha256  name` of files, sorted by name."""
    total = hashlib.sha256()
    for name in sorted(hashes):
        total.update(f"{hashes[name]}  {name}\n".encode())
    return "sha256:" + total.hexdigest()
