"""Throughput of several served models, measured in turn over concurrency x input length x output length.

Whoever has something to measure brings it as a `ServedVariant`: a description, its tokenizer, and a way to
start it. The sweep knows no engine and no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from validation.endpoint import Target
from validation.errors import ServerUnreachable
from validation.sweep_model import Failure, Variant


class ServingFailed(ServerUnreachable):
    """A variant cannot be served, or not any more."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.message}")
        self.failure = failure


@dataclass(frozen=True)
class Serving:
    """A variant that answers now."""

    target: Target
    check_alive: Callable[[], None] = lambda: None
    """Raises ServingFailed if the server's process has ended; called now and then during a cell."""
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
