"""`packager bundle`: sealed stages of a workspace become one signed directory."""

from __future__ import annotations

import json
from pathlib import Path

import click

from packager.cli import options, passphrase
from packager.cli.output import progress


@click.command()
@click.argument("workspace", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--recipe", "recipe_path", required=True, type=click.Path(path_type=Path), help="The release recipe."
)
@click.option(
    "--key", type=click.Path(path_type=Path), help="Private key to sign with (`packager keys generate`)."
)
@click.option(
    "--keyless",
    is_flag=True,
    help="Sign by the identity of this CI job through Sigstore; needs the extra `sigstore`.",
)
@click.option(
    "--trust-config",
    type=click.Path(path_type=Path),
    help="Sigstore's client trust configuration.  [default: the public instance's]",
)
@click.option(
    "--override-gates",
    "override",
    metavar="REASON",
    help="Allow publishing although gates are not passed; the card shows the reason.",
)
@passphrase.options
@options.as_json
def command(
    workspace: Path,
    out: Path,
    recipe_path: Path,
    key: Path | None,
    keyless: bool,
    trust_config: Path | None,
    override: str | None,
    passphrase_env: str | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Assemble, document, lock and sign the stages in WORKSPACE as the bundle OUT.

    WORKSPACE holds the sealed folders fp8, context, draft and evidence. Weights are linked, not copied. The
    passphrase of an encrypted key is asked for on a terminal if neither option nor environment gives it.
    """
    from packager.bundle.assemble import assemble
    from packager.recipe import load_recipe
    from packager.release.workspace import at_hand

    if key and keyless:
        raise click.UsageError("--key and --keyless exclude each other")
    recipe = load_recipe(recipe_path)
    signer = None
    if keyless:
        from packager.bundle.keyless import KeylessSigner

        signer = KeylessSigner.of_this_job(trust_config)
    draft = workspace / "draft"
    manifest = assemble(
        out,
        recipe=recipe,
        recipe_digest=recipe.digest,
        fp8=workspace / "fp8",
        context=workspace / "context",
        draft=draft if draft.exists() else None,
        evidence=workspace / "evidence",
        source=at_hand(recipe.source),
        signing_key=key,
        passphrase=passphrase.for_key(key, passphrase_env, passphrase_file) if key else None,
        keyless=signer,
        override=override,
        progress=progress,
    )
    size = sum(entry.size for entry in manifest.files)
    if as_json:
        click.echo(
            json.dumps(
                {"bundle": str(out), "digest": manifest.digest, "files": len(manifest.files), "bytes": size,
                 "signed": bool(key or keyless), "gates": manifest.metrics["gates"], "override": override}
            )
        )  # fmt: skip
    else:
        signed = "signed" if key or keyless else "NOT signed: publishing needs --key or --keyless"
        click.echo(f"{out}: {len(manifest.files)} files, {size / 1e9:.3f} GB, {signed}")
        click.echo(f"digest {manifest.digest}\ngates  {manifest.metrics['gates']}")
