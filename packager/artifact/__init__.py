"""Sealed directories: what every stage reads and what every stage leaves behind.

A stage writes its files one by one. Each goes to a temporary name, is flushed to the disk, renamed, and then
recorded in `.journal.jsonl`; `manifest.json` comes last. So a directory with a manifest is complete, and one
without can be continued after a SIGKILL: files in the journal are kept, everything else is written again.
SHA-256 is taken while the bytes are written, once. A manifest holds no time, host or absolute path, and its
digest is the SHA-256 of the manifest file itself.
"""

from packager.artifact.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    check,
    file_sha256,
    is_sealed,
    parse_manifest,
    read_manifest,
    sealed_for,
)
from packager.artifact.writer import ArtifactWriter, HashingFile, writing

__all__ = [
    "JOURNAL_NAME",
    "MANIFEST_NAME",
    "ArtifactWriter",
    "FileEntry",
    "HashingFile",
    "Manifest",
    "check",
    "file_sha256",
    "is_sealed",
    "parse_manifest",
    "read_manifest",
    "sealed_for",
    "writing",
]
