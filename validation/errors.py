"""Every expected failure of a measurement: what happened, and what the user can do about it."""

from __future__ import annotations


class MeasurementError(Exception):
    """A measurement cannot be made or read as asked (malformed items, a refused request, a bad cache)."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class ServerUnreachable(MeasurementError):
    """A server did not answer, or went on failing after the bounded number of retries."""


class AnswersNotKept(MeasurementError):
    """The disk that keeps the answers is full or failing."""
