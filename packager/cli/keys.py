"""`packager keys`: the key pair that signs bundles."""

from __future__ import annotations

import json
from pathlib import Path

import click

from packager.cli import options, passphrase
from packager.errors import UsageProblem


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
@passphrase.options
@options.as_json
def generate(
    out: Path, ask: bool, passphrase_env: str | None, passphrase_file: Path | None, as_json: bool
) -> None:
    """Write an ECDSA P-256 key pair.

    The passphrase is asked for with --passphrase, or comes from where the other two options say, or from
    PACKAGER_KEY_PASSPHRASE. Without any the private key is stored unencrypted (mode 0600).
    """
    from packager.bundle import signature

    if ask and (passphrase_env or passphrase_file):
        raise UsageProblem("--passphrase asks: it excludes the other two options", "Leave one out.")
    secret = None if ask else passphrase.given(passphrase_env, passphrase_file)
    if ask:
        secret = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    public = signature.generate_keys(out, passphrase=secret)
    mark = signature.fingerprint(public)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "private_key": str(out),
                    "public_key": str(public),
                    "fingerprint": mark,
                    "encrypted": bool(secret),
                }
            )
        )
    else:
        kept = "encrypted" if secret else "not encrypted: keep it where only you can read it"
        click.echo(f"private key  {out}  ({kept})\npublic key   {public}\nfingerprint  {mark}")
