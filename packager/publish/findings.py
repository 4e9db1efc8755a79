"""What stands in the way of a publication, or deserves a word: gathered first, told all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from packager.errors import BadInput, GateFailed, IntegrityFailure, PackagerError, RemoteFailure, UsageProblem

_GRAVEST_FIRST: tuple[type[PackagerError], ...] = (
    IntegrityFailure, GateFailed, BadInput, RemoteFailure, UsageProblem,
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    what: str
    remedy: str = ""
    kind: type[PackagerError] | None = None
    """The error that it is, which decides the exit code; None: a warning."""


def warnings_of(findings: Sequence[Finding]) -> tuple[str, ...]:
    """The warnings, with what can be done about each, one line each."""
    return tuple(
        f"{found.what}. {found.remedy}".removesuffix(". ") for found in findings if found.kind is None
    )


def refuse(findings: Sequence[Finding], subject: str) -> None:
    """Raise one error that names every error found and its remedy, of the gravest kind; or nothing.

    Raises:
        PackagerError: the class of the gravest: integrity, then gates, input, remote, usage.
    """
    errors = [found for found in findings if found.kind is not None]
    if not errors:
        return
    kind = next(kind for kind in _GRAVEST_FIRST if any(found.kind is kind for found in errors))
    if len(errors) == 1:
        raise kind(errors[0].what, errors[0].remedy)
    lines = [f"{len(errors)} things stand in the way of publishing {subject}:"]
    for number, found in enumerate(errors, 1):
        lines.append(f"  {number}. {found.what}")
        lines += [f"     {found.remedy}"] if found.remedy else []
    raise kind("\n".join(lines), "Mend all of them, then run the same command again.")
