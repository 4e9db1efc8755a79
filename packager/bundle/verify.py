"""Is this directory the bundle that was sealed, signed and measured? Works offline and in a hub cache."""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packager.artifact import MANIFEST_NAME, FileEntry, Manifest, file_sha256, read_manifest
from packager.bundle.companions import COMPANIONS, companion_problems
from packager.bundle.contents import TOLERATED, content_problem, path_problem
from packager.bundle.lock import LOCK_NAME, REPORT_NAME, Lock, chain_problems, gate_state, read_lock
from packager.bundle.lock import unmeasured_stages as unmeasured
from packager.bundle.signature import SIGNATURE_NAME, open_signature
from packager.errors import BadInput, IntegrityFailure

STAGE = "bundle"
"""What a bundle's manifest calls itself."""
GENERATED = frozenset({LOCK_NAME, "README.md", "LICENSE-NOTE.md", "serve.yaml"}) | COMPANIONS
"""Files of a bundle that no stage made: they are written when it is assembled."""
_REMEDY = "Remove the directory and get the bundle again from its publisher."


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle that stands every check."""

    path: Path
    digest: str
    """Digest of its manifest: the identity of the bundle on every hub."""
    files: int
    bytes: int
    signer: str | None
    """Fingerprint of the signing key; None: not signed."""
    authenticated: bool
    """The signature was checked with a public key that the caller gave."""
    lock: Lock


def verify_bundle(
    path: Path, public_key: Path | None = None, *, progress: Callable[[str], None] | None = None
) -> VerifiedBundle:
    """Check files, digests, signature and lock chain, and that the evidence was taken from these bytes.

    Every file is hashed, on all cores. What hub and client leave beside the files is tolerated; a symlink is
    followed only inside the hub cache that the bundle lies in.

    Raises:
        BadInput: no directory, or not sealed at all.
        IntegrityFailure: names every file that is wrong and says what is wrong with it.
    """
    manifest = read_manifest(path)
    raw = (path / MANIFEST_NAME).read_bytes()
    if raw != manifest.canonical():
        raise IntegrityFailure(f"{path / MANIFEST_NAME} is not as it was sealed", _REMEDY)
    if not (path / LOCK_NAME).is_file():
        raise IntegrityFailure(
            f"{path} has no {LOCK_NAME}: it is not a bundle, or part of it is gone", _REMEDY
        )
    total = sum(entry.size for entry in manifest.files)
    if progress:
        progress(f"hashing {len(manifest.files)} files, {total / 1e9:.2f} GB")
    _refuse(path, _layout_problems(path, manifest))
    # Before hashing: it costs nothing, and a changed manifest would put the blame on another file.
    signer = _check_signature(path, manifest, public_key)
    _refuse(path, _byte_problems(path, manifest))
    lock = read_lock(path)
    _refuse(path, [*chain_problems(lock), *_origin_problems(manifest, lock), *_evidence_problems(path, lock)])
    _refuse(path, companion_problems(path, manifest))
    return VerifiedBundle(
        path, manifest.digest, len(manifest.files), total, signer, bool(signer and public_key), lock
    )


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        raise IntegrityFailure(f"{path} is not what was released:\n  " + "\n  ".join(problems), _REMEDY)


def _tolerated(relative: str) -> bool:
    return any(fnmatch.fnmatchcase(relative, pattern) for pattern in TOLERATED)


def _layout_problems(root: Path, manifest: Manifest) -> list[str]:
    """Missing, stray, mis-sized and forbidden files; links that lead out."""
    allowed_targets = _link_targets(root)
    problems: list[str] = []
    found: set[str] = set()
    for directory, folders, names in os.walk(root):
        for name in [*folders, *names]:
            entry = Path(directory) / name
            relative = entry.relative_to(root).as_posix()
            if entry.is_symlink():
                target = entry.resolve()
                inside = any(target.is_relative_to(allowed) for allowed in allowed_targets)
                if not inside or not target.is_file():
                    problems.append(f"{relative}: a link that leads out of the bundle ({entry.readlink()})")
                    found.add(relative)
                    continue
            mode = entry.stat().st_mode
            if stat.S_ISDIR(mode):
                continue
            found.add(relative)
            if not stat.S_ISREG(mode):
                problems.append(f"{relative}: neither a file nor a directory")
    sealed = {entry.path: entry for entry in manifest.files}
    for relative in sorted(found - set(sealed) - {MANIFEST_NAME}):
        if not _tolerated(relative) and not any(p.startswith(f"{relative}:") for p in problems):
            problems.append(f"{relative}: stray, it was not sealed")
    for relative, sealed_entry in sealed.items():
        reason = path_problem(relative)
        if reason:
            problems.append(f"{relative}: {reason}")
        elif relative not in found:
            problems.append(f"{relative}: missing")
        elif (size := (root / relative).stat().st_size) != sealed_entry.size:
            problems.append(f"{relative}: changed ({size} bytes, sealed with {sealed_entry.size})")
    return problems


def _link_targets(root: Path) -> list[Path]:
    """Where a symlink may lead if the bundle is a snapshot in a hub cache.

    CACHE/models--org--name/snapshots/REVISION links into `blobs/` beside it, and Xet files from there into
    CACHE/blobs, which repositories share (huggingface_hub's `_shared_blobs.py`).
    """
    snapshots = root.resolve().parent
    repository = snapshots.parent
    if snapshots.name != "snapshots" or not repository.name.startswith("models--"):
        return []
    return [repository / "blobs", repository.parent / "blobs"]


def _byte_problems(root: Path, manifest: Manifest) -> list[str]:
    def examine(entry: FileEntry) -> str | None:
        file = root / entry.path
        if file_sha256(file) != entry.sha256:
            return f"{entry.path}: changed (same size, other bytes)"
        reason = content_problem(file)
        return f"{entry.path}: {reason}" if reason else None

    # Hashing releases the interpreter lock. The largest first, so that no core waits for one at the end.
    largest_first = sorted(manifest.files, key=lambda entry: -entry.size)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return sorted(problem for problem in pool.map(examine, largest_first) if problem)


def _check_signature(root: Path, manifest: Manifest, public_key: Path | None) -> str | None:
    file = root / SIGNATURE_NAME
    if not file.is_file():
        if public_key is not None:
            raise IntegrityFailure(f"{root} is not signed: it has no {SIGNATURE_NAME}", _REMEDY)
        return None
    signed = open_signature(file.read_bytes(), public_key)
    expected = {entry.path: entry.sha256 for entry in manifest.files}
    expected[MANIFEST_NAME] = manifest.digest.removeprefix("sha256:")
    differing = [n for n in {*expected, *signed.files} if expected.get(n) != signed.files.get(n)]
    _refuse(root, [f"{name}: not what was signed" for name in sorted(differing)])
    return signed.key_fingerprint


def _origin_problems(manifest: Manifest, lock: Lock) -> list[str]:
    """Every file is, byte for byte, one that a locked stage made, or one of the few written at assembly."""
    origins = {path: entry.sha256 for path, _, entry in lock.files()}
    problems = []
    for entry in manifest.files:
        if entry.path not in GENERATED and origins.get(entry.path) != entry.sha256:
            problems.append(f"{entry.path}: not the file of the stage that {LOCK_NAME} names")
    for name, stage in lock.stages.items():
        if manifest.inputs.get(name) != stage.digest:
            problems.append(f"{LOCK_NAME}: its {name} is not the one that the bundle was sealed with")
    return problems


def _evidence_problems(root: Path, lock: Lock) -> list[str]:
    report = root / "evidence" / REPORT_NAME
    name = f"evidence/{REPORT_NAME}"
    try:
        problems = [
            f"{name}: it does not measure the {stage} of this bundle" for stage in unmeasured(report, lock)
        ]
        if gate_state(report, lock.gates.override) != lock.gates:
            problems.append(f"{LOCK_NAME}: it tells of other gates than {name}")
    except BadInput as err:
        return [err.message]
    for config in ("config.json", "draft/config.json"):
        if (root / config).is_file():
            try:
                found = json.loads((root / config).read_bytes())
            except ValueError as err:
                problems.append(f"{config}: not JSON ({err})")
                continue
            if "auto_map" in found:
                problems.append(f"{config}: it names code to run (auto_map)")
    return problems
