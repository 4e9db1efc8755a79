"""Every failure a user can cause: what happened, what to do next, and the exit code.

Exit codes: 0 ok, 1 a bug of ours, 2 usage, 3 bad input, 4 a gate failed, 5 integrity, 6 a remote.
"""

from __future__ import annotations


class PackagerError(Exception):
    """An expected failure. `message` says what happened, `remedy` what the user can do about it."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UsageProblem(PackagerError):
    """The command was asked for something it cannot do as asked (a port in use, options that conflict)."""

    exit_code = 2


class BadInput(PackagerError):
    """A checkpoint, recipe or data file is missing, malformed or of the wrong kind."""

    exit_code = 3


class GateFailed(PackagerError):
    """A measured figure lies outside the bound that the recipe named beforehand."""

    exit_code = 4


class IntegrityFailure(PackagerError):
    """Bytes are not those that were sealed, signed or measured."""

    exit_code = 5


class RemoteFailure(PackagerError):
    """A hub, server or inference engine did not do what was asked of it."""

    exit_code = 6
