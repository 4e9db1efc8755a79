"""A verified bundle copied to a plain directory, for machines without a network: `dir:PATH`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packager.artifact import MANIFEST_NAME, read_manifest, writing
from packager.bundle.signature import SIGNATURE_NAME
from packager.bundle.verify import verify_bundle
from packager.errors import BadInput
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
    """Copy a bundle and verify the copy; it appears under its name only when it is whole.

    Raises:
        As `packager.publish.preflight.preflight`.
        BadInput: `target` is there and is not this bundle; it cannot be written.
        IntegrityFailure: the copy is not what was sealed.
    """
    preflight(bundle, public_key, progress)
    manifest = read_manifest(bundle)
    if target.exists():
        if not (target / MANIFEST_NAME).is_file() or read_manifest(target).digest != manifest.digest:
            raise BadInput(f"{target} is there and is not this bundle", "Choose another directory.")
    else:
        part = target.with_name(target.name + ".part")
        progress(f"copying {len(manifest.files)} files to {target}")
        with writing(target):
            shutil.rmtree(part, ignore_errors=True)
            for name in [*(entry.path for entry in manifest.files), MANIFEST_NAME, SIGNATURE_NAME]:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle / name, part / name)
            part.rename(target)
    verified = verify_bundle(target, public_key, progress=progress)
    return Copied(target, verified.digest, verified.files, verified.bytes)
