"""The folder in which a release grows: one sealed directory a stage, `work/` for what can be made again."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.artifact import Manifest, check, is_sealed, writing
from packager.checkpoint.hub_name import is_commit
from packager.checkpoint.source import Checkpoint
from packager.errors import BadInput, UsageProblem
from packager.recipe import SourceSpec

PACKAGED = "package:"


@dataclass(frozen=True)
class Workspace:
    """Paths of a release; `open()` makes and locks the folder."""

    root: Path

    @property
    def fp8(self) -> Path:
        return self.root / "fp8"

    @property
    def context(self) -> Path:
        return self.root / "context"

    @property
    def draft(self) -> Path:
        return self.root / "draft"

    @property
    def evidence(self) -> Path:
        return self.root / "evidence"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle"

    @property
    def published(self) -> Path:
        return self.root / "published"

    @property
    def signing_key(self) -> Path:
        """The private key that signs bundles where the caller names none; made when first needed."""
        return self.root / "signing-key.pem"

    @property
    def work(self) -> Path:
        """Caches, server logs, dequantized copies, the dense baseline."""
        return self.root / "work"

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder and hold it for this process; the lock dies with the process.

        Raises:
            UsageProblem: another release is running in it.
            BadInput: it cannot be written.
        """
        with writing(self.root):
            self.work.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.work / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageProblem(
                    f"another release is running in {self.root}",
                    "Wait for it, or choose another --workspace.",
                ) from None
            for left_over in self.work.glob("discarded-*"):
                shutil.rmtree(left_over)
            yield
        finally:
            os.close(handle)

    def discard(self, folder: Path) -> None:
        """Remove an outdated artifact; renamed first, so that a kill leaves no half of it in its place."""
        grave = self.work / f"discarded-{folder.name}-{os.getpid()}"
        folder.rename(grave)
        shutil.rmtree(grave)

    def sealed(self, folder: Path, beside: tuple[str, ...] = ()) -> Manifest | None:
        """The manifest of a sealed folder, None if it is not sealed.

        Files whose size and time are those at sealing are taken as unchanged; if any differs, all are hashed.
        `beside`: patterns of files that may lie in it unsealed.

        Raises:
            IntegrityFailure: files are changed, missing or stray.
        """
        if not is_sealed(folder):
            return None
        stamps = _stamps(folder)
        untouched = self.read_json("sealed.json").get(folder.name) == stamps
        manifest = check(folder, deep=not untouched, ignore=beside)
        if not untouched:
            self.remember_sealed(folder)
        return manifest

    def remember_sealed(self, folder: Path) -> None:
        """Note sizes and times of a folder whose bytes have just been hashed."""
        self.write_json("sealed.json", {**self.read_json("sealed.json"), folder.name: _stamps(folder)})

    def read_json(self, name: str) -> dict[str, Any]:
        """A document of `work/`, empty when it is missing or torn: all of them can be made again."""
        try:
            found = json.loads((self.work / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        """Replace a document of `work/` atomically."""
        target = self.work / name
        part = target.with_name(target.name + ".part")
        with writing(target):
            part.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            part.replace(target)


def _stamps(directory: Path) -> dict[str, list[int]]:
    """Size and modification time of every file that is not hidden."""
    found: dict[str, list[int]] = {}
    for path in sorted(directory.rglob("*")):
        rel = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in rel.parts):
            status = path.stat()
            found[rel.as_posix()] = [status.st_size, status.st_mtime_ns]
    return found


def locate(spec: SourceSpec) -> Path:
    """The directory of a recipe's source checkpoint; a hub repository is downloaded to the hub cache.

    Raises:
        BadInput: no such directory; a hub repository whose revision is not a whole commit.
    """
    if spec.path is not None:
        path = packaged_checkpoint(spec.path) or Path(spec.path).expanduser()
        if not path.is_dir():
            raise BadInput(
                f"the recipe's source {spec.path} is not a folder ({path})", "Correct source.path."
            )
        return path
    assert spec.repo is not None
    if spec.revision is None or not is_commit(spec.revision):
        raise BadInput(
            f"the recipe does not pin a revision of {spec.repo}",
            "Fill source.revision with a commit (40 hexadecimal digits; branches and tags move), so that the "
            "release names the bytes it was made from.",
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(spec.repo, revision=spec.revision))


def at_hand(spec: SourceSpec) -> Path | None:
    """The directory of a recipe's source if it is on this machine already; nothing is downloaded."""
    if spec.path is not None:
        path = packaged_checkpoint(spec.path) or Path(spec.path).expanduser()
        return path if path.is_dir() else None
    from huggingface_hub import try_to_load_from_cache

    assert spec.repo is not None
    found = try_to_load_from_cache(spec.repo, "config.json", revision=spec.revision)
    return Path(found).parent if isinstance(found, str) else None


def packaged_checkpoint(path: str) -> Path | None:
    """The directory behind `package:nano`, None for an ordinary path.

    Raises:
        BadInput: the package brings no checkpoint of that name.
    """
    if not path.startswith(PACKAGED):
        return None
    name = path.removeprefix(PACKAGED)
    directory = Path(__file__).parents[1] / name / "checkpoint"
    if name != "nano" or not (directory / "config.json").is_file():
        raise BadInput(f"the package brings no checkpoint {name!r}", "It brings `package:nano`.")
    return directory


def shipped_recipe(named: str) -> Path:
    """The file that a recipe argument means: a path, or the name of a recipe that the package brings."""
    path = Path(named)
    if path.suffix or path.exists() or path.name != named:
        return path
    return Path(__file__).parents[2] / "recipes" / f"{named}.yaml"


class SourceIdentity:
    """The source's digest, computed from all its bytes once and remembered by file sizes and times.

    Kept in `work/source.json`; losing it costs one more reading of the source, nothing else.
    """

    def __init__(self, directory: Path, workspace: Workspace) -> None:
        self.directory, self._workspace = directory, workspace
        self._stamps = _stamps(directory)

    def digest(self) -> str:
        """As `Checkpoint.digest`. Raises BadInput: not a checkpoint."""
        kept = self._workspace.read_json("source.json")
        if kept.get("files") == self._stamps and kept.get("directory") == str(self.directory.resolve()):
            return str(kept["digest"])
        return self.remember(Checkpoint.open(self.directory).digest())

    def remember(self, digest: str) -> str:
        """Keep a digest that a stage has computed while it read the files, as they were at construction."""
        record = {"digest": digest, "directory": str(self.directory.resolve()), "files": self._stamps}
        self._workspace.write_json("source.json", record)
        return digest
