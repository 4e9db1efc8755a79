"""`packager verify`: is this what was sealed, signed and measured, and does it follow from its source?"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from packager.cli import options
from packager.cli.output import progress
from packager.errors import IntegrityFailure, UsageProblem

if TYPE_CHECKING:
    from packager.bundle.keyless import Identity
    from packager.proof.recompute import Proof

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./+-]+)?", re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_DEFAULT_SAMPLE = 100
_LISTED = 20


@click.command()
@click.argument("what", metavar="PATH|hf://…|ms://…|oci://…|ORG/NAME")
@click.option("--key", type=click.Path(path_type=Path), help="The publisher's public key (`.pub`).")
@click.option("--identity", metavar="NAME", help="Who must have signed it without a key (Sigstore).")
@click.option("--identity-provider", metavar="URL", help="The OpenID issuer that vouches for NAME.")
@click.option("--trust-config", type=click.Path(path_type=Path),
              help="Sigstore's client trust configuration.  [default: the public instance's]")  # fmt: skip
@click.option(
    "--against", metavar="SOURCE", help="Recompute the quantized weights of PATH from this checkpoint."
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    help=f"Weights to recompute, spread over roles and layers.  [default: {_DEFAULT_SAMPLE}]",
)
@click.option("--all", "everything", is_flag=True, help="Recompute all of them.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option(
    "--scale-rounding",
    type=click.Choice(["power-of-two", "float32"]),
    help="How the scales were rounded, where no manifest says it.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads; each takes a few MB.  [default: one a core]"
)
@options.as_json
def command(
    what: str,
    key: Path | None,
    identity: str | None,
    identity_provider: str | None,
    trust_config: Path | None,
    against: str | None,
    sample: int | None,
    everything: bool,
    seed: int,
    scale_rounding: Literal["power-of-two", "float32"] | None,
    workers: int | None,
    as_json: bool,
) -> None:
    """Check a bundle, or any sealed artifact, byte by byte.

    PATH is a bundle, a download of one (hub cache or --local-dir), or a stage's folder. hf://ORG/NAME@REVISION
    is downloaded into the hub cache first, ms://ORG/NAME@REVISION and oci://HOST/NAME:TAG into our own;
    ORG/NAME, or ORG/NAME@REVISION, is what the hub cache holds, without a network. Without --key or
    --identity the signature's file list is compared, but who made it is not proved.

    With --against, PATH is any FP8, INT4 or INT8 checkpoint and SOURCE the one it was made from. A second
    implementation, in NumPy, recomputes scales and codes of a sample, or of all weights, and compares every
    other tensor byte by byte; hashes and signatures are not looked at. Either may be hf://REPO@REVISION: what
    is looked at is then read by byte ranges, and nothing is stored.
    """
    if against is None:
        if sample is not None or everything or scale_rounding is not None:
            raise click.UsageError("--sample, --all and --scale-rounding need --against SOURCE")
        signer = _signer(key, identity, identity_provider, trust_config)
        _print_sealed(_verified(_located(what), signer), as_json)
        return
    if key is not None or identity is not None:
        raise click.UsageError("--key and --identity are for a seal; with --against, values are compared")
    if sample is not None and everything:
        raise click.UsageError("--sample and --all exclude each other")
    from packager.cli.source import opened
    from packager.proof.recompute import verify_against

    made, source = opened(what), opened(against)
    proof = verify_against(
        made,
        source,
        sample=None if everything else sample or _DEFAULT_SAMPLE,
        seed=seed,
        rounding=scale_rounding,
        workers=workers or os.cpu_count() or 1,
        progress=progress,
    )
    if as_json:
        _print_proof_document(made.name, source.name, proof)
    else:
        _print_proof(proof)
    if not proof.sound:
        first = proof.problems[0] if proof.problems else str(proof.mismatches[0])
        faults = len(proof.problems) + len(proof.mismatches)
        raise IntegrityFailure(
            f"{made.name} does not follow from {source.name}: {faults} fault(s), the first: {first}",
            "Quantize the source again; if the fault comes back, report it with the lines above.",
        )


def _located(what: str) -> Path:
    if what.startswith(("ms://", "oci://")):
        from packager.publish.fetch import fetch
        from packager.release.served import cache_directory

        return fetch(what, cache_directory(), progress=progress)
    if what.startswith("hf://"):
        from packager.checkpoint.hub_name import HubName
        from packager.publish.hub import download

        name = HubName.parse(what)
        assert name is not None
        return download(name.repo, name.revision if "@" in what else None)
    if Path(what).exists() or not _REPOSITORY.fullmatch(what):
        return Path(what)
    from packager.publish.hub_cache import cached_snapshot

    return cached_snapshot(what)


def _signer(
    key: Path | None, identity: str | None, provider: str | None, trust_config: Path | None
) -> Path | Identity | None:
    if identity is None and provider is None and trust_config is None:
        return key
    if key is not None:
        raise click.UsageError("--key and --identity exclude each other")
    if identity is None or provider is None:
        raise click.UsageError("--identity and --identity-provider go together")
    from packager.bundle.keyless import Identity

    return Identity(identity, provider, trust_config)


def _verified(path: Path, signer: Path | Identity | None) -> dict[str, Any]:
    from packager.artifact import check, read_manifest
    from packager.bundle.lock import LOCK_NAME
    from packager.bundle.verify import STAGE, verify_bundle

    manifest = read_manifest(path)
    if manifest.stage != STAGE and not (path / LOCK_NAME).exists():
        if signer is not None:
            raise UsageProblem(
                f"{path} is the folder of a stage ({manifest.stage}), which is never signed",
                "Leave --key or --identity out, or give the bundle.",
            )
        check(path)
        size = sum(entry.size for entry in manifest.files)
        return {"path": str(path), "kind": manifest.stage, "digest": manifest.digest,
                "files": len(manifest.files), "bytes": size, "verdict": "as sealed"}  # fmt: skip
    if isinstance(signer, Path):
        bundle = verify_bundle(path, signer, progress=progress)
    else:
        bundle = verify_bundle(path, identity=signer, progress=progress)
    if bundle.signer is None:
        signature = "none"
    else:
        proof = "valid" if bundle.authenticated else "not checked (neither --key nor --identity)"
        signature = f"{proof}, {'key' if _FINGERPRINT.fullmatch(bundle.signer) else 'by'} {bundle.signer}"
    gates = bundle.lock.gates
    return {
        "path": str(path),
        "kind": "bundle",
        "digest": bundle.digest,
        "files": bundle.files,
        "bytes": bundle.bytes,
        "signature": signature,
        "structure": bundle.structure,
        "source": f"{bundle.lock.source.name} {bundle.lock.source.revision or bundle.lock.source.digest}",
        "gates": gates.outcome + (f" (override: {gates.override})" if gates.override else ""),
        "verdict": "as sealed",
    }


def _print_sealed(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:<10} {value}")


def _print_proof_document(path: str, against: str, proof: Proof) -> None:
    document = asdict(proof)
    for row in (document, *document["roles"].values()):
        for internal in ("signal", "noise"):
            row.pop(internal, None)
        if math.isinf(row["worst_relative_error"]):  # of a NaN code; JSON has no infinity
            row["worst_relative_error"] = None
    totals = {"tensors": proof.tensors, "checked": proof.checked, "elements": proof.elements}
    click.echo(
        json.dumps(
            {"path": path, "against": against, "sound": proof.sound, **totals, **document},
            ensure_ascii=False,
            allow_nan=False,
        )
    )


def _print_proof(proof: Proof) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if proof.roles:
        table = Table(box=None, pad_edge=False)
        table.add_column("weights", no_wrap=True)
        for title in ("tensors", "checked", "elements", "SNR dB", "largest relative error"):
            table.add_column(title, justify="right")
        for name, role in proof.roles.items():
            ratio = worst = "–"
            if role.checked:
                ratio = "exact" if role.noise == 0 else f"{role.snr_db:.2f}" if role.snr_db else "not finite"
                worst = f"{100 * role.worst_relative_error:.2f} %"
            table.add_row(name, str(role.tensors), str(role.checked), f"{role.elements:,}", ratio, worst)
        console.print(table)
    for line in [*proof.problems, *map(str, proof.mismatches)][:_LISTED]:
        console.print(escape(line), soft_wrap=True)
    faults = len(proof.problems) + len(proof.mismatches)
    if faults > _LISTED:
        console.print(f"… and {faults - _LISTED} more")
    rule = f"{proof.scheme}, {proof.rounding} scales (by {proof.rounding_from})" if proof.rounding else "–"
    click.echo(f"scheme     {rule}")
    click.echo(f"recomputed {proof.elements:,} elements of {proof.checked} of {proof.tensors} weights")
    click.echo(f"kept       {proof.kept} other tensors have the bytes of the source")
    if proof.left_out:
        click.echo(f"left out   {proof.left_out} tensors of multi-token prediction layers")
    click.echo(f"verdict    {'follows from its source' if proof.sound else f'{faults} faults'}")
