"""A verified bundle copied to a plain directory, for machines without a network: `dir:PATH`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packager.artifact import MANIFEST_NAME, read_manifest, writing
from packager.bundle.verify import verify_bundle
from packager.checkpoint.writer import require_space
from packager.errors import BadInput, IntegrityFailure
from packager.publish.hub_transaction import LocalFile, local_files, short_digest
from packager.publish.preflight import preflight


@dataclass(frozen=True)
class Copied:
    """A bundle in another directory."""

    path: Path
    digest: str
    """Of the bundle: the same wherever it is published."""
    files: int
    bytes: int


def copy_bundle(
    bundle: Path, target: Path, *, public_key: Path | None = None, progress: Callable[[str], None]
) -> Copied:
    """Copy a bundle and verify the copy; it appears under its name only when it is whole and verified.

    Run again after an interruption, it goes on behind the last file that was copied whole.

    Raises:
        As `packager.publish.preflight.preflight`.
        BadInput: `target` holds something else; it cannot be written; no room.
        IntegrityFailure: the copy is not what was sealed.
    """
    digest = preflight(bundle, public_key, progress).digest
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        if not (target / MANIFEST_NAME).is_file() or read_manifest(target).digest != digest:
            raise BadInput(f"{target} is there and is not this bundle", "Choose another directory.")
        verified = verify_bundle(target, public_key, progress=progress)
        return Copied(target, digest, verified.files, verified.bytes)
    # Named after the bundle, so that what another one left there is never taken for a part of this.
    part = target.with_name(f".{target.name}.{short_digest(digest)}.part")
    files = local_files(bundle)
    missing = {name: file for name, file in files.items() if not _whole(part / name, file)}
    size = sum(file.size for file in missing.values())
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, size)
    progress(f"copying {len(missing)} of {len(files)} files, {size / 1e9:.2f} GB, to {target}")
    with writing(target):
        for name, file in missing.items():
            unfinished = part / f"{name}.unfinished"
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, unfinished)
            unfinished.rename(part / name)
    try:
        verified = verify_bundle(part, public_key, progress=progress)
    except IntegrityFailure:
        shutil.rmtree(part)
        raise
    with writing(target):
        part.rename(target)
    return Copied(target, digest, verified.files, verified.bytes)


def _whole(copy: Path, file: LocalFile) -> bool:
    """It got its name when all of it was there; its bytes are verified with the others."""
    return copy.is_file() and copy.stat().st_size == file.size
