"""The files of a bundle as any place that receives them lists them: path, size, SHA-256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from packager.artifact import MANIFEST_NAME, read_manifest
from packager.bundle.signature import SIGNATURE_NAME


@dataclass(frozen=True)
class LocalFile:
    """A file of a bundle."""

    path: Path
    size: int
    """Bytes."""
    sha256: str
    """Hex digest, as sealed: no file of a stage is read again for it."""


def local_files(bundle: Path) -> dict[str, LocalFile]:
    """Every file of a sealed and signed bundle by its path in it, manifest and signature last."""
    manifest = read_manifest(bundle)
    files = {e.path: LocalFile(bundle / e.path, e.size, e.sha256) for e in manifest.files}
    for name in (MANIFEST_NAME, SIGNATURE_NAME):
        data = (bundle / name).read_bytes()
        files[name] = LocalFile(bundle / name, len(data), hashlib.sha256(data).hexdigest())
    return files
