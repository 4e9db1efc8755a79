"""A variant of a sweep, and the way to start it; one that runs already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx

from validation.document import resolve_url
from validation.endpoint import Target
from validation.engines import TIMEOUT_S, identify, models_served
from validation.sweep_model import Failure, Role, ServingFailed, Variant


@dataclass(frozen=True)
class Serving:
    """A variant that answers now."""

    target: Target
    check_alive: Callable[[], None] = lambda: None
    """Raises ServingFailed if the server's process has ended; called every second during a cell."""
    log_tail: Callable[[], tuple[str, ...]] = lambda: ()
    """Last lines of its log; none of a server that is not ours."""


@dataclass(frozen=True)
class ServedVariant:
    """A variant and the way to start it."""

    variant: Variant
    tokenizer: Path
    """Folder with the tokenizer and the chat template that its prompts are made with."""
    serve: Callable[[], AbstractContextManager[Serving]]
    """Called when the first cell that is not in the cache has to be measured, and again after a failure.
    Entering raises ServingFailed; leaving stops the server."""


def running_variant(
    name: str, role: Role, target: Target, tokenizer: Path, *, devices: int = 1
) -> ServedVariant:
    """A server that runs already, vLLM or SGLang by its own word; asked at once which of them it is."""
    url = resolve_url(target.url)
    engine = identify(url)
    variant = Variant(
        name=name,
        role=role,
        subject=target.subject,
        engine=engine.name,
        engine_version=engine.version,
        devices=devices,
    )

    @contextlib.contextmanager
    def serve() -> Iterator[Serving]:
        try:
            httpx.get(f"{url}/v1/models", timeout=TIMEOUT_S, trust_env=False)
        except httpx.TransportError as err:
            said = f"nothing answers at {url}: {type(err).__name__}: {err}"
            raise ServingFailed(Failure(kind="will not start", message=said)) from None
        yield Serving(target)

    return ServedVariant(variant, tokenizer, serve)


def require_model(serving: Serving) -> None:
    """Raise ServingFailed if the server lists models, and the one to be measured is not among them."""
    url, wanted = resolve_url(serving.target.url), serving.target.model
    listed = models_served(url)
    if listed is not None and wanted not in listed:
        said = f"{url} serves {', '.join(map(repr, listed))}, not {wanted!r}"
        raise ServingFailed(Failure(kind="other model", message=said, log_tail=serving.log_tail()))
