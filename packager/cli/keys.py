"""`packager keys`: the key pair that signs bundles."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from packager.cli import options

PASSPHRASE_VARIABLE = "PACKAGER_KEY_PASSPHRASE"


@click.group(name="keys")
def command() -> None:
    """Make the key pair that signs bundles."""


@command.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("bundle-key.pem"),
    show_default=True,
    help="The private key; the public one gets the same name with the suffix .pub.",
)
@click.option("--passphrase", "ask", is_flag=True, help="Ask for a passphrase to encrypt the key.")
@options.as_json
def generate(out: Path, ask: bool, as_json: bool) -> None:
    """Write an ECDSA P-256 key pair.

    The passphrase is taken from PACKAGER_KEY_PASSPHRASE, or asked for with --passphrase; without either the
    private key is stored unencrypted (mode 0600).
    """
    from packager.bundle import signature

    passphrase = os.environ.get(PASSPHRASE_VARIABLE)
    if ask and not passphrase:
        passphrase = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    public = signature.generate_keys(out, passphrase=passphrase)
    mark = signature.fingerprint(public)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "private_key": str(out),
                    "public_key": str(public),
                    "fingerprint": mark,
                    "encrypted": bool(passphrase),
                }
            )
        )
    else:
        kept = "encrypted" if passphrase else "not encrypted: keep it where only you can read it"
        click.echo(f"private key  {out}  ({kept})\npublic key   {public}\nfingerprint  {mark}")
