"""Which tensors of an unfinished conversion are finished, and from which bytes they were made.

One JSON object a line, appended as work is done. A tensor's line states the SHA-256 of its source file and
of its output shard *up to the end of that tensor*: the state of a hash that runs over the file anyway, so it
costs nothing, and what was done earlier can be checked by hashing that much of the file again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from packager.artifact import writing
from packager.quantize.fidelity import LedgerEntry

JOURNAL_NAME = "tensors.jsonl"


@dataclass(frozen=True)
class FinishedTensor:
    """A tensor of the source that has been dealt with."""

    name: str
    source: str | None
    """SHA-256 of its file up to its end; None: the whole file's digest was known, so it was not taken."""
    output: str | None
    """The same of the output shard (its scale included); None: the tensor is left out."""
    entry: LedgerEntry | None
    """Its figures, where it was quantized."""


@dataclass(frozen=True)
class FinishedFile:
    """A source file that was read to its end, and every tensor of which is finished."""

    name: str
    sha256: str
    identity: str
    """As `Folder.identity`: while it is the same, so is the content."""


class TensorJournal:
    """Reads what earlier runs finished, and records what this one does. Use it in a `with` block."""

    def __init__(self, directory: Path, plan: str) -> None:
        """`plan` identifies the whole of the output's layout: lines of another plan are dropped."""
        self._path = directory / JOURNAL_NAME
        self.tensors: dict[str, FinishedTensor] = {}
        self.files: dict[str, FinishedFile] = {}
        kept = self._read(plan)
        with writing(self._path):
            part = self._path.with_name(JOURNAL_NAME + ".new")
            part.write_bytes(b"".join(line + b"\n" for line in kept))
            part.replace(self._path)
            self._handle = self._path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()

    def _read(self, plan: str) -> list[bytes]:
        """Lines up to the first that is torn; the first line names the plan."""
        first = _line({"plan": plan})
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.is_file() else []
        if not lines or lines[0] != first:
            return [first]
        kept = [first]
        for line in lines[1:]:
            try:
                self._take_in(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError):
                break
            kept.append(line)
        return kept

    def _take_in(self, raw: dict[str, Any]) -> None:
        if "tensor" in raw:
            found = raw["tensor"]
            entry = LedgerEntry.read(found["entry"]) if found["entry"] else None
            tensor = FinishedTensor(found["name"], found["source"], found["output"], entry)
            self.tensors[tensor.name] = tensor
        else:
            found = raw["file"]
            file = FinishedFile(found["name"], found["sha256"], str(found["identity"]))
            self.files[file.name] = file

    def _append(self, document: dict[str, Any]) -> None:
        # Out of this process's hands at once: a SIGKILL loses nothing. What a power cut may take is caught by
        # the digests when the work goes on.
        with writing(self._path):
            self._handle.write(_line(document) + b"\n")
            self._handle.flush()

    def add_tensor(self, tensor: FinishedTensor) -> None:
        """Record a tensor whose output bytes are written."""
        self.tensors[tensor.name] = tensor
        self._append({"tensor": asdict(tensor)})

    def add_file(self, file: FinishedFile) -> None:
        """Record a source file, after all of its tensors."""
        self.files[file.name] = file
        self._append({"file": asdict(file)})

    def sync(self) -> None:
        """Bring all lines to the disk, before a shard gets its name."""
        with writing(self._path):
            os.fsync(self._handle.fileno())


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
