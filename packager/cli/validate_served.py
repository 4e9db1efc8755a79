"""What `packager validate` measures: a running server by its URL, or a folder that it serves itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from validation.endpoint import Target

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def where(prefix: str = "") -> tuple[str, ...]:
    """Names of the parameters that `served_options` with this prefix gives."""
    stem = prefix.replace("-", "_")
    return tuple(stem + name for name in ("url", "serve", "model", "subject", "context", "draft"))


def served_options(prefix: str = "") -> list[Decorator]:
    """The options that say what is measured; `prefix` for a second server, such as `reference-`."""
    folder = click.Path(exists=True, file_okay=False, path_type=Path)
    return [
        click.option(f"--{prefix}url", help="Base URL of a running server, without /v1."),
        click.option(
            f"--{prefix}serve",
            type=folder,
            help="Serve this checkpoint, stage folder or bundle for as long as the measurement takes.",
        ),
        click.option(
            f"--{prefix}model", default="model", show_default=True, help="Name a running server serves under."
        ),
        click.option(
            f"--{prefix}subject",
            help="Digest of what a running server serves (see `packager inspect`); binds the evidence. With "
            f"--{prefix}serve it is taken from the folder.",
        ),
        click.option(f"--{prefix}context", help="With --serve: as `packager serve --context`."),
        click.option(
            f"--{prefix}draft/--{prefix}no-draft",
            default=True,
            help="With --serve: decode with a bundle's draft.",
        ),
    ]


@contextlib.contextmanager
def serving(options: dict[str, Any], *, label: str, cache: Path, prefix: str = "") -> Iterator[Target]:
    """What to measure. A server of our own starts at the first question and is stopped at the end.

    Args:
        options: as `served_options` with the same prefix gives them.
        cache: folder of the answers; the server's log lies there too.

    Raises:
        UsageError: neither or both of --url and --serve, or no --subject with --url.
        BadInput, UsageProblem, RemoteFailure: the folder cannot be served, or its server died.
    """
    from validation.endpoint import Target

    url, folder, model, subject, context, draft = (options[name] for name in where(prefix))
    if (url is None) == (folder is None):
        raise click.UsageError(f"give either --{prefix}url or --{prefix}serve")
    if url is not None:
        if subject is None:
            raise click.UsageError(f"--{prefix}url needs --{prefix}subject: the digest of what is served")
        if context is not None:
            raise click.UsageError(f"--{prefix}context goes with --{prefix}serve")
        yield Target(url, model, subject, label, cache)
        return
    if subject is not None:
        raise click.UsageError(f"with --{prefix}serve the subject is taken from the folder")
    from packager.release.served import Served, servable

    def say(line: str) -> None:
        click.echo(line, err=True)

    found = servable(folder, with_draft=draft, context=context)
    served = Served(
        label=label,
        subject=found.subject,
        tokenizer=found.stored.model,
        log=cache / f"serve-{prefix or 'candidate'}.log".replace("-.", "."),
        spec=lambda: found.spec(say),
        say=say,
        name=found.stored.served_name,
    )
    with served.running():
        yield served.target(cache)
