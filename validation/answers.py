"""Answers on disk: one JSONL file per settings, appended one line at a time and never rewritten.

The first line records the settings, each further line one answer under the digest of its question. What a
kill can lose is the line being written: it is dropped when the file is opened again. Lines reach the disk
itself once a second and at the end (a sync for each answer would cost more than small answers do), so a loss
of power costs a second of answers; the blanks that some file systems leave in their place are dropped too.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from validation.document import canonical_json, digest_of
from validation.errors import AnswersNotKept, MeasurementError

SYNC_S = 1.0
"""Seconds of answers that a loss of power can cost."""
Answer = TypeVar("Answer", bound=BaseModel)


class AnswerFile(Generic[Answer]):
    """The answers to everything asked under one set of settings. One process at a time holds the file.

    Args:
        directory: made if missing.
        settings: what the answers depend on beside the question; their digest names the file.
        kind: the type of an answer.
        name: beginning of the file's name.

    Raises (on entering):
        MeasurementError: another process holds the file, or a line that is not the last is damaged.
    """

    def __init__(
        self, directory: Path, *, settings: dict[str, Any], kind: type[Answer], name: str = "answers"
    ) -> None:
        self.settings = settings
        self.kind = kind
        self.path = directory / f"{name}-{digest_of(settings).removeprefix('sha256:')[:20]}.jsonl"
        self.found: dict[str, Answer] = {}
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._end = 0
        self._synced = 0.0

    def __enter__(self) -> AnswerFile[Answer]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = FileIO(self.path, "a+")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise MeasurementError(
                    f"{self.path} is in use by another process", "Wait for the other measurement to end."
                ) from None
            self._load(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                os.fsync(file.fileno())
            finally:
                file.close()

    def add(self, key: str, answer: Answer) -> None:
        """Append one answer; from here on a killed process does not lose it.

        Raises:
            AnswersNotKept: the disk is full or failing. The answers before this one are whole.
        """
        line = _line({"key": key, "answer": answer.model_dump(mode="json")})
        with self._lock:
            if self._file is None:  # the run has ended, this answer came too late
                return
            self._append(self._file, line)
            self.found[key] = answer

    def _load(self, file: FileIO) -> None:
        file.seek(0)
        content = file.readall() or b""
        kept = content.rstrip(b"\0")
        kept = kept[: kept.rfind(b"\n") + 1]
        if len(kept) < len(content):
            file.truncate(len(kept))
        self._end = len(kept)
        lines = kept.split(b"\n")[:-1]
        try:
            if lines and json.loads(lines[0]) != {"settings": self.settings}:
                raise ValueError("the first line does not name these settings")
            for line in lines[1:]:
                record = json.loads(line)
                self.found[record["key"]] = self.kind.model_validate(record["answer"])
        except (ValueError, KeyError, TypeError, ValidationError) as err:
            raise MeasurementError(
                f"{self.path} is damaged: {err}", "Remove the file; its questions are then asked again."
            ) from None
        if not lines:
            self._append(file, _line({"settings": self.settings}))
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _append(self, file: FileIO, line: bytes) -> None:
        """Write a whole line or none of it."""
        try:
            written = 0
            while written < len(line):
                written += os.write(file.fileno(), line[written:])
            now = time.monotonic()
            if now - self._synced > SYNC_S:
                os.fsync(file.fileno())
                self._synced = now
        except OSError as err:
            os.ftruncate(file.fileno(), self._end)
            what = (
                "the disk is full"
                if err.errno in (errno.ENOSPC, errno.EDQUOT)
                else f"cannot write answers ({err.strerror})"
            )
            raise AnswersNotKept(
                f"{what}: {self.path}; {len(self.found)} answers are kept in it",
                "Free space; the same command goes on from there.",
            ) from None
        self._end += len(line)


def _line(record: dict[str, Any]) -> bytes:
    return canonical_json(record).encode() + b"\n"
