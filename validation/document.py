"""What everything that reaches JSON shares: frozen models, unknown keys refused, a canonical digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict

Url = str | Callable[[], str]
"""Base URL of a server without `/v1`, or a function that starts the server and returns its URL.

A function is called only when something has to be asked, so a run answered from its cache starts nothing.
"""


class Document(BaseModel):
    """Base of every recorded model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def content_digest(self) -> str:
        """`sha256:<hex>` of the model's canonical JSON; equal content gives equal digests."""
        return digest_of(self.model_dump(mode="json"))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no escapes beyond the necessary: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(value: Any) -> str:
    """`sha256:<hex>` of a JSON-able value."""
    return "sha256:" + hashlib.sha256(canonical_json(value).encode()).hexdigest()


def resolve_url(url: Url) -> str:
    """The base URL without a trailing slash, starting the server if `url` is a function."""
    return (url if isinstance(url, str) else url()).rstrip("/")
