"""What SOURCE names on a command line that reads a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from packager.checkpoint.folder import Folder


def opened(source: str) -> Folder:
    """The files behind SOURCE, a folder or `hf://org/name@revision`; stderr says which commit a name means.

    Raises:
        UsageProblem, BadInput, RemoteFailure: as `open_folder`.
    """
    from packager.checkpoint.source import open_folder

    folder = open_folder(source)
    if folder.path is None and folder.name != source:
        click.echo(f"{source} is {folder.name}", err=True)
    return folder
