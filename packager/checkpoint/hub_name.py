"""The name of a checkpoint on a hub: `hf://org/name@revision`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from packager.errors import UsageProblem

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[A-Za-z0-9][\w./+-]{0,199}))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit id, which names the same bytes for ever, as no tag does."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True)
class HubName:
    """A repository and a revision of it."""

    repo: str
    """`org/name`."""
    revision: str
    """Commit, branch or tag; `main` where none was given."""

    @classmethod
    def parse(cls, source: str | Path) -> Self | None:
        """What `hf://org/name@revision` says; None: a path.

        Raises:
            UsageProblem: malformed, or another scheme.
        """
        # Path("hf://a/b") has lost a slash; it still means the hub.
        scheme, found, rest = str(source).partition(":/")
        if not found or "/" in scheme:
            return None
        match = _NAME.fullmatch(rest.removeprefix("/"))
        if scheme != "hf" or match is None or ".." in rest or "//" in rest.removeprefix("/"):
            raise UsageProblem(
                f"{str(source)!r} does not name a checkpoint", "Write hf://organisation/name@revision."
            )
        return cls(match["repo"], match["revision"] or "main")
