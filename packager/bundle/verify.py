"""Is this directory the bundle that was sealed, signed and measured? Works offline and in a hub cache."""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packager.artifact import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from packager.bundle.card_check import card_problems, is_card
from packager.bundle.companions import COMPANIONS, companion_problems
from packager.bundle.contents import TOLERATED, examine, path_problem
from packager.bundle.faults import Fault, remedies
from packager.bundle.keyless import Identity
from packager.bundle.lock import LOCK_NAME, REPORT_NAME, Lock, chain_problems, gate_state, read_lock
from packager.bundle.lock import unmeasured_stages as unmeasured
from packager.bundle.names import clashes, shown
from packager.bundle.signature import SIGNATURE_NAME, open_signature
from packager.bundle.structure import check_weights
from packager.errors import BadInput, IntegrityFailure

STAGE = "bundle"
"""What a bundle's manifest calls itself."""
GENERATED = frozenset({LOCK_NAME, "serve.yaml"}) | COMPANIONS
"""Files of a bundle that no stage made, beside the card: they are written when it is assembled."""
_REMEDY = "Remove the directory and get the bundle again from its publisher."
_SEALED_WRONG = "No download does this: tell its publisher, who has to bundle again from sound stages."


@dataclass(frozen=True)
class VerifiedBundle:
    """A bundle that stands every check."""

    path: Path
    digest: str
    """Digest of its manifest: the identity of the bundle on every hub."""
    files: int
    bytes: int
    signer: str | None
    """Fingerprint of the signing key, or the identity of a keyless signature; None: not signed."""
    authenticated: bool
    """The signature was checked with a public key or an identity that the caller gave."""
    lock: Lock
    structure: str
    """What the weights' headers were held against."""


def verify_bundle(
    path: Path,
    public_key: Path | None = None,
    *,
    identity: Identity | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifiedBundle:
    """Check files, digests, signature, structure and lock chain, and what the evidence was taken from.

    Every file is read once, on all cores: hashed, and looked through for pickles, code and secrets. What hub
    and client leave beside the files is tolerated; a symlink is followed only inside the hub cache that the
    bundle lies in.

    Args:
        public_key: whose signature it must bear.
        identity: who must have signed it without a key of their own.

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
    # First: it costs nothing, and a changed manifest would put the blame on another file.
    trusted = public_key or identity
    signer = _check_signature(path, manifest, trusted)
    _refuse_faults(path, _layout_faults(path, manifest))
    _refuse_faults(path, _byte_faults(path, manifest))
    lock = read_lock(path)
    _refuse(path, [*chain_problems(lock), *_origin_problems(manifest, lock), *_evidence_problems(path, lock)])
    _refuse(path, card_problems(path, lock, manifest))
    structure = check_weights(path)
    _refuse(path, structure.problems)
    _refuse(path, companion_problems(path, manifest))
    return VerifiedBundle(
        path,
        manifest.digest,
        len(manifest.files),
        total,
        signer,
        bool(signer and trusted),
        lock,
        structure.looked_at,
    )


def _refuse(path: Path, problems: list[str], remedy: str = _SEALED_WRONG) -> None:
    if problems:
        raise IntegrityFailure(f"{path} is not what was released:\n  " + "\n  ".join(problems), remedy)


def _refuse_faults(path: Path, faults: list[Fault]) -> None:
    _refuse(path, [str(fault) for fault in faults], remedies(path, faults))


def _tolerated(relative: str) -> bool:
    return any(fnmatch.fnmatchcase(relative, pattern) for pattern in TOLERATED)


def _layout_faults(root: Path, manifest: Manifest) -> list[Fault]:
    """Missing, stray, mis-sized and forbidden files; links that lead out; names that clash."""
    faults, found = _walk(root)
    wrong = {fault.path for fault in faults}
    sealed = {entry.path: entry for entry in manifest.files}
    for relative in sorted(found - set(sealed) - {MANIFEST_NAME} - wrong):
        if not _tolerated(relative):
            faults.append(Fault("stray", relative, "stray, it was not sealed"))
    for relative, entry in sealed.items():
        reason = path_problem(relative)
        if reason:
            faults.append(Fault("hostile", relative, reason))
        elif relative not in found:
            faults.append(Fault("missing", relative, "missing"))
        elif relative not in wrong and (size := (root / relative).stat().st_size) != entry.size:
            said = f"changed ({size} bytes, sealed with {entry.size})"
            faults.append(Fault("changed", relative, said))
    for first, second in clashes([*sealed, MANIFEST_NAME]):
        faults.append(Fault("hostile", second, f"on macOS and Windows the same name as {shown(first)}"))
    return faults


def _walk(root: Path) -> tuple[list[Fault], set[str]]:
    """What is there: faults of links and of things that are no files, and the paths of all but folders."""
    allowed_targets = _link_targets(root)
    faults: list[Fault] = []
    found: set[str] = set()

    def unreadable(err: OSError) -> None:
        raise BadInput(f"cannot read {err.filename}: {err.strerror}", "Make it readable.") from None

    for directory, folders, names in os.walk(root, onerror=unreadable):
        for name in [*folders, *names]:
            entry = Path(directory) / name
            relative = entry.relative_to(root).as_posix()
            mode = entry.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            found.add(relative)
            if stat.S_ISLNK(mode):
                target = Path(os.path.realpath(entry))  # of a loop: some link of it
                # A folder of the cache would bring files that nothing here walks over.
                inside = any(target.is_relative_to(allowed) for allowed in allowed_targets)
                if inside and not target.exists():
                    faults.append(Fault("missing", relative, "missing (its part of the hub cache is gone)"))
                    continue
                if not inside or not target.is_file():
                    leads = f"a link that leads out of the bundle ({shown(str(entry.readlink()))})"
                    faults.append(Fault("hostile", relative, leads))
                    continue
                mode = target.stat().st_mode
            if not stat.S_ISREG(mode):
                faults.append(Fault("hostile", relative, "neither a file nor a directory"))
    return faults, found


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


def _byte_faults(root: Path, manifest: Manifest) -> list[Fault]:
    def look(entry: FileEntry) -> Fault | None:
        digest, reason = examine(root / entry.path, entry.path)
        if digest != entry.sha256:
            return Fault("changed", entry.path, "changed (same size, other bytes)")
        return Fault("hostile", entry.path, reason) if reason else None

    # Hashing releases the interpreter lock. The largest first, so that no core waits for one at the end.
    largest_first = sorted(manifest.files, key=lambda entry: -entry.size)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        found = [fault for fault in pool.map(look, largest_first) if fault]
    return sorted(found, key=lambda fault: fault.path)


def _check_signature(root: Path, manifest: Manifest, trusted: Path | Identity | None) -> str | None:
    file = root / SIGNATURE_NAME
    if not file.is_file():
        if trusted is not None:
            raise IntegrityFailure(f"{root} is not signed: it has no {SIGNATURE_NAME}", _REMEDY)
        return None
    signed = open_signature(file.read_bytes(), trusted)
    expected = {entry.path: entry.sha256 for entry in manifest.files}
    expected[MANIFEST_NAME] = manifest.digest.removeprefix("sha256:")
    differing = [n for n in {*expected, *signed.files} if expected.get(n) != signed.files.get(n)]
    _refuse(root, [f"{name}: not what was signed" for name in sorted(differing)])
    return signed.signer


def _origin_problems(manifest: Manifest, lock: Lock) -> list[str]:
    """Every file is, byte for byte, one that a locked stage made, or one of the few written at assembly."""
    origins = {path: entry.sha256 for path, _, entry in lock.files()}
    problems = []
    for entry in manifest.files:
        generated = entry.path in GENERATED or is_card(entry.path)
        if not generated and origins.get(entry.path) != entry.sha256:
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
    return problems
