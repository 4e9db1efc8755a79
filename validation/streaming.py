"""One chat answer, streamed: its text as it comes, its tokens, and when the first and the last came."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from validation.document import Document
from validation.endpoint import says_too_long
from validation.errors import MeasurementError, ServerUnreachable

if TYPE_CHECKING:
    import httpx


class PromptTooLong(MeasurementError):
    """The conversation does not fit the server's context."""


class Streamed(Document):
    """An answer and its times, as a client saw them."""

    text: str
    reasoning: str
    """What a reasoning parser of the server told apart from the text; empty: nothing."""
    finish_reason: str | None
    """None: the server ended the stream without one."""
    prompt_tokens: int
    completion_tokens: int
    first_s: float
    """Seconds to the first piece of text; to the end, if there was none."""
    rest_s: float
    """Seconds from the first piece to the last."""

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None: there was one at most."""
        return (self.completion_tokens - 1) / self.rest_s if self.rest_s > 0 else None


def stream_chat(
    client: httpx.Client,
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> Streamed:
    """Ask for one answer and read it as it comes; leaving this by an exception ends the request.

    Args:
        client: its base URL is the server's, without /v1.
        max_tokens: most tokens of the answer; None: to the end of the context.
        on_text: called with each piece of the answer's text.

    Raises:
        PromptTooLong: the server says that the conversation does not fit its context.
        ServerUnreachable: it broke off. MeasurementError: it refuses, or sends what is no such stream.
    """
    import httpx

    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    text: list[str] = []
    reasoning: list[str] = []
    usage: dict[str, int] = {}
    first, last, reason = None, 0.0, None
    began = time.perf_counter()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise _refusal(client, response.status_code, response.read())
            for line in response.iter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                piece = _read(client, line.removeprefix("data:"))
                if piece.text or piece.reasoning:
                    last = time.perf_counter()
                    first = last if first is None else first
                text.append(piece.text)
                reasoning.append(piece.reasoning)
                reason, usage = piece.finish_reason or reason, piece.usage or usage
                if piece.text and on_text is not None:
                    on_text(piece.text)
    except httpx.TransportError as err:
        raise ServerUnreachable(
            f"{client.base_url} broke off a streamed answer: {type(err).__name__}: {err}",
            "See the server's log.",
        ) from None
    return Streamed(
        text="".join(text),
        reasoning="".join(reasoning),
        finish_reason=reason,
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        first_s=(first or time.perf_counter()) - began,
        rest_s=last - first if first is not None else 0.0,
    )


class _Piece(NamedTuple):
    text: str
    reasoning: str
    finish_reason: str | None
    usage: dict[str, int]


def _read(client: httpx.Client, line: str) -> _Piece:
    """One event of the stream; only one choice was asked for."""
    try:
        event = json.loads(line)
        error = event.get("error")
        choice = (event.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        piece = _Piece(
            delta.get("content") or "",
            delta.get("reasoning") or delta.get("reasoning_content") or "",
            choice.get("finish_reason"),
            event.get("usage") or {},
        )
    except (ValueError, LookupError, TypeError, AttributeError) as err:
        raise MeasurementError(
            f"{client.base_url} does not stream chat answers ({type(err).__name__}: {err})",
            "Give the address of an OpenAI-compatible server.",
        ) from None
    if error:  # after the headers said that all was well
        raise _refusal(client, 400, json.dumps(error).encode())
    return piece


def _refusal(client: httpx.Client, status: int, body: bytes) -> MeasurementError:
    said = " ".join(body.decode(errors="replace").split())[:300]
    if says_too_long(status, body):
        return PromptTooLong(f"{client.base_url}: the conversation is too long: {said}", "Start anew.")
    if status in (401, 403):
        return MeasurementError(
            f"{client.base_url} answers HTTP {status}: {said}", "Give the key: --api-key-env NAME."
        )
    return MeasurementError(f"{client.base_url} answers HTTP {status}: {said}")
