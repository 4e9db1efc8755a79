"""Reads the content-addressed store that hf_xet keeps for an endpoint `local://DIR`.

The hub client hands its bytes to hf_xet, which cuts them into chunks and puts them into a store of its own. A
hub learns of a file by its SHA-256 only, so it must look up which Xet file that is. The answer stands in the
shard files (`*.mdb`) of the store. Their layout, from xet-core's `mdb_shard` crate (little endian): a 48-byte
header; then for each file a 48-byte record (file hash 32, flags u32, number of segments u32, 8 unused); a
48-byte record for each segment (hash 32, flags u32, unpacked bytes u32, first and last chunk u32); where flag
bit 31 is set, a 48-byte verification record for each segment; where bit 30 is set, a 48-byte record with the
file's SHA-256. A file hash of 32 bytes 0xFF ends the list.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from pathlib import Path

_RECORD = 48
_SHARD_TAG = b"HFRepoMetaData\0"
_LAST = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_SHA256 = 1 << 30


@dataclass(frozen=True)
class XetFile:
    """A file in the store."""

    xet_hash: str
    """64 hex digits, as the client and the `X-Xet-Hash` header write it."""
    size: int
    """Bytes."""


class XetStore:
    """The store under `root`; hf_xet writes it, this reads it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._files: dict[str, XetFile] = {}
        self._seen: set[Path] = set()

    @property
    def cas_url(self) -> str:
        """The endpoint to give to hf_xet."""
        return f"local://{self.root}"

    def find(self, sha256: str) -> XetFile | None:
        """The file with this SHA-256 (bare hex), or None."""
        if sha256 not in self._files:
            for shard in sorted(self.root.glob("xet/xorbs/shards/*.mdb")):
                if shard not in self._seen:
                    self._files.update(files_of_shard(shard.read_bytes()))
                    self._seen.add(shard)
        return self._files.get(sha256)

    def extract(self, file: XetFile, target: Path, refresh_url: str) -> None:
        """Write the file's bytes to `target`. `refresh_url` is the hub's own Xet token address."""
        import hf_xet  # type: ignore[import-untyped]

        with hf_xet.XetSession().new_file_download_group(
            endpoint=self.cas_url,
            token="loopback",
            token_expiry_unix_secs=int(time.time()) + 3600,
            token_refresh_url=refresh_url,
            token_refresh_headers={},
            custom_headers={},
            progress_callback=None,
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(file.xet_hash, file.size), str(target))


def files_of_shard(data: bytes) -> dict[str, XetFile]:
    """SHA-256 (bare hex) to file, of every file that a shard describes together with its SHA-256.

    Raises:
        ValueError: not a shard of this layout.
    """
    if not data.startswith(_SHARD_TAG):
        raise ValueError("not a Xet shard")
    files: dict[str, XetFile] = {}
    offset = _RECORD
    while (file_hash := data[offset : offset + 32]) != _LAST:
        if len(file_hash) < 32:
            raise ValueError("a Xet shard that ends early")
        flags, segments = struct.unpack_from("<II", data, offset + 32)
        offset += _RECORD
        size = sum(struct.unpack_from("<I", data, offset + i * _RECORD + 36)[0] for i in range(segments))
        offset += _RECORD * segments * (2 if flags & _HAS_VERIFICATION else 1)
        if flags & _HAS_SHA256:
            files[_hex(data[offset : offset + 32])] = XetFile(_hex(file_hash), size)
            offset += _RECORD
    return files


def _hex(digest: bytes) -> str:
    """Xet writes a hash as four little-endian 64-bit words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
