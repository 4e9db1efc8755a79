"""What can be wrong with a file of a bundle, and what mends it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packager.bundle.names import shown

_LISTED = 5


@dataclass(frozen=True)
class Fault:
    """One file and what is wrong with it."""

    kind: Literal["missing", "changed", "stray", "hostile"]
    path: str
    what: str

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.what}"


def remedies(root: Path, faults: Sequence[Fault]) -> str:
    """What to do, one line a kind of fault."""
    paths = {kind: [f.path for f in faults if f.kind == kind] for kind in ("missing", "changed", "stray")}
    lines = []
    if any(fault.kind == "hostile" for fault in faults):
        lines.append("Neither load nor serve it, and tell its publisher: no release holds such a file.")
    if paths["missing"]:
        lines.append(f"Finish the download: {finish_command(root)}")
    if paths["changed"]:
        command = finish_command(root, paths["changed"])
        lines.append(f"Get the changed files again: {command}; tell the publisher if they stay as they are.")
    if paths["stray"]:
        names = " ".join(shlex.quote(shown(str(root / path))) for path in paths["stray"][:_LISTED])
        more = " …" if len(paths["stray"]) > _LISTED else ""
        lines.append(f"Remove what was added, unless you know better: rm {names}{more}")
    return "\n            ".join(lines)


def finish_command(root: Path, again: Sequence[str] = ()) -> str:
    """How to complete a download at `root`, as far as its place tells: whole, or the files `again` anew."""
    if cached := cache_place(root):
        repo, revision, cache = cached
        words = ["hf", "download", repo, *again[:_LISTED], "--revision", revision]
        words += ["--force-download"] if again else []
        words += ["--cache-dir", str(cache)] if cache != _default_cache() else []
        return shlex.join(words)
    if (root / ".cache" / "huggingface").is_dir():
        forced = " --force-download" if again else ""
        return f"hf download ORG/NAME --local-dir {shlex.quote(str(root))}{forced}"
    return "get the bundle again from where it came"


def cache_place(root: Path) -> tuple[str, str, Path] | None:
    """Repository, revision and cache folder of a snapshot in a hub cache; None: `root` is none.

    The cache's layout is CACHE/models--org--name/snapshots/REVISION (huggingface_hub, "Understand caching").
    """
    root = root.resolve()
    repository = root.parent.parent
    if root.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return None
    return "/".join(repository.name.split("--")[1:]), root.name, repository.parent


def _default_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()
