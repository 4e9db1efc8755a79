"""Where the passphrase of a signing key comes from: environment, file, or whoever sits at the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from packager.errors import BadInput, UsageProblem

PASSPHRASE_VARIABLE = "PACKAGER_KEY_PASSPHRASE"
_Command = TypeVar("_Command", bound=Callable[..., Any])


def options(command: _Command) -> _Command:
    """Decorator: `--passphrase-env` and `--passphrase-file`. Never the passphrase itself: `ps` shows it."""
    variable = click.option(
        "--passphrase-env",
        metavar="NAME",
        help=f"Environment variable with the key's passphrase.  [default: {PASSPHRASE_VARIABLE}, if set]",
    )
    file = click.option(
        "--passphrase-file",
        type=click.Path(path_type=Path),
        help="File whose first line is the key's passphrase.",
    )
    return variable(file(command))


def given(variable: str | None, file: Path | None) -> str | None:
    """The passphrase that options or environment name; None: none does.

    Raises:
        UsageProblem: both options, or a variable or file that has none. BadInput: the file cannot be read.
    """
    if variable is not None and file is not None:
        raise UsageProblem("--passphrase-env and --passphrase-file exclude each other", "Leave one out.")
    if file is not None:
        try:
            text, where = file.read_text(encoding="utf-8").split("\n")[0].rstrip("\r"), str(file)
        except (OSError, UnicodeDecodeError) as err:
            raise BadInput(f"cannot read the passphrase in {file}: {err}", "Give a text file.") from None
    elif variable is not None:
        text, where = os.environ.get(variable, ""), f"the environment variable {variable}"
    else:
        return os.environ.get(PASSPHRASE_VARIABLE) or None
    if not text:
        raise UsageProblem(f"{where} holds no passphrase", "Set it, or leave the option out.")
    return text


def for_key(private_key: Path, variable: str | None, file: Path | None) -> str | None:
    """The passphrase to open a key with: as `given`, else asked for if the key is encrypted."""
    from packager.bundle.signature import is_encrypted

    text = given(variable, file)
    if text is None and is_encrypted(private_key) and sys.stdin.isatty():
        text = str(click.prompt(f"Passphrase of {private_key}", hide_input=True, err=True))
    return text
