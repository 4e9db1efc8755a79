"""`packager verify`: is this what was sealed, signed and measured?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("what", metavar="PATH|hf://REPO@REVISION")
@click.option("--key", type=click.Path(path_type=Path), help="The publisher's public key (`.pub`).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(what: str, key: Path | None, as_json: bool) -> None:
    """Check a bundle, or any sealed artifact, byte by byte.

    PATH is a bundle, a download of one (hub cache or --local-dir), or a stage's folder. hf://REPO@REVISION
    is downloaded into the hub cache first. Without --key the signature's file list is compared, but who made
    it is not proved.
    """
    path = _located(what)
    found = _verified(path, key)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:<10} {value}")


def _located(what: str) -> Path:
    if not what.startswith("hf://"):
        return Path(what)
    from packager.publish.hub import download

    repo_id, _, revision = what.removeprefix("hf://").partition("@")
    return download(repo_id, revision or None)


def _verified(path: Path, key: Path | None) -> dict[str, Any]:
    from packager.artifact import check, read_manifest
    from packager.bundle.lock import LOCK_NAME
    from packager.bundle.verify import STAGE, verify_bundle

    manifest = read_manifest(path)
    if manifest.stage != STAGE and not (path / LOCK_NAME).exists():
        check(path)
        size = sum(entry.size for entry in manifest.files)
        return {"path": str(path), "kind": manifest.stage, "digest": manifest.digest,
                "files": len(manifest.files), "bytes": size, "verdict": "as sealed"}  # fmt: skip
    bundle = verify_bundle(path, key, progress=lambda line: click.echo(line, err=True))
    if bundle.signer is None:
        signature = "none"
    else:
        proof = "valid" if bundle.authenticated else "not checked (no --key)"
        signature = f"{proof}, key {bundle.signer}"
    gates = bundle.lock.gates
    return {
        "path": str(path),
        "kind": "bundle",
        "digest": bundle.digest,
        "files": bundle.files,
        "bytes": bundle.bytes,
        "signature": signature,
        "source": f"{bundle.lock.source.name} {bundle.lock.source.revision or bundle.lock.source.digest}",
        "gates": gates.outcome + (f" (override: {gates.override})" if gates.override else ""),
        "verdict": "as sealed",
    }
