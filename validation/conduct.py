"""When a measurement ran and how long each part of it took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from validation.document import Document


class Step(Document):
    """One part of a run."""

    name: str
    seconds: float
    """Wall time, from asking to the last answer; about 0 where an earlier run's answers were kept."""
    subject: str | None = None
    """Digest of what was measured."""


class Conduct(Document):
    """A run of measurements: when, and how long. Times are UTC, ISO 8601, to the second."""

    started: str
    finished: str
    seconds: float
    """Wall time of the whole, server starts included."""
    steps: tuple[Step, ...] = ()


class Stopwatch:
    """Notes the steps of a run while it goes on."""

    def __init__(self) -> None:
        self._began, self._from = datetime.now(UTC), time.monotonic()
        self._steps: list[Step] = []

    @contextlib.contextmanager
    def step(self, name: str, subject: str | None = None) -> Iterator[None]:
        """Time the block as one step; a step that fails is not noted."""
        begun = time.monotonic()
        yield
        self._steps.append(Step(name=name, seconds=round(time.monotonic() - begun, 2), subject=subject))

    def conduct(self) -> Conduct:
        """What was noted until now."""
        return Conduct(
            started=f"{self._began:%Y-%m-%dT%H:%M:%SZ}",
            finished=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            seconds=round(time.monotonic() - self._from, 2),
            steps=tuple(self._steps),
        )
