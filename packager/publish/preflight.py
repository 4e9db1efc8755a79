"""Everything about a bundle that can be known before the first request: whole, licensed, signed, measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packager.artifact import read_manifest
from packager.bundle.lock import GateState
from packager.bundle.verify import VerifiedBundle, verify_bundle
from packager.errors import BadInput, GateFailed, UsageProblem
from packager.publish.findings import Finding, refuse


@dataclass(frozen=True)
class Limits:
    """What a hub takes. The figures of Hugging Face: huggingface.co/docs/hub/storage-limits."""

    name: str = "the hub"
    file_bytes: int = 500_000_000_000
    advised_file_bytes: int = 200_000_000_000
    files_a_folder: int = 10_000
    advised_files: int = 100_000


def examine_bundle(
    bundle: Path,
    public_key: Path | None,
    progress: Callable[[str], None],
    *,
    limits: Limits | None = None,
) -> tuple[VerifiedBundle, list[Finding]]:
    """Verify a bundle, then look at all that could keep it from being published.

    Args:
        limits: what the target takes; None: it has no limits (a directory).

    Raises:
        BadInput, IntegrityFailure: as `verify_bundle`. Of bytes that are not those that were released nothing
            more is asked.
    """
    verified = verify_bundle(bundle, public_key, progress=progress)
    findings = _gate_findings(bundle, verified.lock.gates)
    if verified.lock.license is None:
        findings.append(
            Finding(
                f"{bundle} has no licence",
                "Decide it in the recipe (bundle.license) and bundle again.",
                UsageProblem,
            )
        )
    if verified.signer is None:
        findings.append(
            Finding(
                f"{bundle} is not signed",
                "Bundle again with --key (see `packager keys generate`).",
                UsageProblem,
            )
        )
    elif not verified.authenticated:
        findings.append(
            Finding("the signature was not checked with your public key", "Give it with --key to be sure")
        )
    if limits is not None:
        sizes = {entry.path: entry.size for entry in read_manifest(bundle).files}
        findings += _limit_findings(sizes, limits)
    return verified, findings


def preflight(
    bundle: Path,
    public_key: Path | None,
    progress: Callable[[str], None],
    *,
    limits: Limits | None = None,
) -> VerifiedBundle:
    """`examine_bundle`, its warnings told, its errors raised: for targets that have nothing more to ask.

    Raises:
        BadInput, IntegrityFailure: as `verify_bundle`; a file or folder beyond the limits.
        GateFailed: a gate failed or was not measured, and no override is recorded in the bundle.
        UsageProblem: no licence, or not signed.
    """
    verified, findings = examine_bundle(bundle, public_key, progress, limits=limits)
    refuse(findings, str(bundle))
    return verified


def _gate_findings(bundle: Path, gates: GateState) -> list[Finding]:
    if not gates.publishable:
        reasons = [f"failed: {name}" for name in gates.failed]
        reasons += [f"not measured: {name}" for name in gates.not_measured]
        return [
            Finding(
                f"the evidence in {bundle} does not allow publishing ({gates.outcome})"
                + "".join(f"\n  {reason}" for reason in reasons),
                "Improve the model or measure what is missing; or bundle again with "
                "--override-gates REASON, which the card will show.",
                GateFailed,
            )
        ]
    if gates.outcome != "pass":
        return [Finding(f"gates are overridden ({gates.outcome}): {gates.override}; the card says so")]
    return []


def _limit_findings(sizes: dict[str, int], limits: Limits) -> list[Finding]:
    found = []
    for path, size in sorted(sizes.items()):
        if size > limits.file_bytes:
            found.append(
                Finding(
                    f"{path} has {size / 1e9:.0f} GB; {limits.name} takes {limits.file_bytes / 1e9:.0f} GB",
                    "Quantize again with smaller shards (--shard-bytes).",
                    BadInput,
                )
            )
        elif size > limits.advised_file_bytes:
            advised = limits.advised_file_bytes / 1e9
            found.append(Finding(f"{path} has {size / 1e9:.0f} GB; {advised:.0f} GB at most is advised"))
    folders = Counter(str(PurePosixPath(path).parent) for path in sizes)
    for folder, count in folders.items():
        if count > limits.files_a_folder:
            found.append(
                Finding(
                    f"folder {folder} has {count} files; {limits.name} takes {limits.files_a_folder}",
                    "Quantize again with larger shards (--shard-bytes).",
                    BadInput,
                )
            )
    if len(sizes) > limits.advised_files:
        found.append(Finding(f"{len(sizes)} files; {limits.advised_files} at most are advised"))
    return found
