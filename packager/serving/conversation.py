"""A conversation with a served model: turns kept within the server's context, the speed of each answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from packager.errors import RemoteFailure
from packager.serving.server import parse_counters

if TYPE_CHECKING:
    import httpx

    from validation.streaming import Streamed

ROOM_TOKENS = 512
"""What is kept free for question and answer, or a quarter of a short context."""
DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"


@dataclass(frozen=True)
class Served:
    """What a server says it serves."""

    model: str
    max_model_len: int | None
    """Tokens; None: it does not say."""


@dataclass(frozen=True)
class Answer:
    """One answer."""

    question: str
    streamed: Streamed
    acceptance_length: float | None
    """Tokens of a verification step while it was made, others' requests included; None: no draft."""
    dropped: int
    """Exchanges left out of the conversation before it was asked, because they would not fit."""

    @property
    def total_tokens(self) -> int:
        """Of the conversation up to here."""
        return self.streamed.prompt_tokens + self.streamed.completion_tokens


@dataclass
class _Exchange:
    question: str
    answer: str
    tokens: int | None
    """That it added; None: not known, it was stopped."""


def served_by(client: httpx.Client, model: str | None = None) -> Served:
    """The model of that name, or the first, that a server lists.

    Raises:
        RemoteFailure: it does not answer, wants a key, or does not serve that model.
    """
    import httpx

    try:
        reply = client.get("/v1/models")
    except httpx.HTTPError as err:
        raise RemoteFailure(
            f"no server answers at {client.base_url} ({type(err).__name__})",
            "Start one (`packager serve BUNDLE`), or give its address without /v1.",
        ) from None
    if reply.status_code in (401, 403):
        raise RemoteFailure(f"{client.base_url} wants an API key", "Name its variable: --api-key-env NAME.")
    try:
        listed = {str(one["id"]): one.get("max_model_len") for one in reply.raise_for_status().json()["data"]}
        name = model or next(iter(listed))
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise RemoteFailure(
            f"{client.base_url} lists no models (HTTP {reply.status_code})",
            "Give the address of an OpenAI-compatible server, without /v1.",
        ) from None
    if name not in listed:
        raise RemoteFailure(
            f"{client.base_url} does not serve {name!r}", f"It serves {', '.join(map(repr, listed))}."
        )
    length = listed[name]
    return Served(name, length if isinstance(length, int) else None)


@dataclass
class Conversation:
    """Turns with one model. What does not fit the context any more is forgotten, the oldest first."""

    client: httpx.Client
    served: Served
    system: str | None = None
    max_tokens: int | None = None
    """Most tokens of an answer; None: to the end of the context."""
    temperature: float = 0.0
    _turns: list[_Exchange] = field(default_factory=list, init=False)

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self._turns.clear()

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Ask within the conversation so far. An answer that an exception breaks off stays as far as it came.

        Raises:
            PromptTooLong: the question does not fit even alone. MeasurementError, ServerUnreachable: see
                `validation.streaming.stream_chat`.
        """
        from validation.streaming import PromptTooLong, stream_chat

        dropped = self._make_room()
        came: list[str] = []

        def hear(text: str) -> None:
            came.append(text)
            if on_text is not None:
                on_text(text)

        before = self._counters()
        while True:
            try:
                streamed = stream_chat(
                    self.client,
                    self.served.model,
                    self._messages(question),
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                    on_text=hear,
                )
                break
            except PromptTooLong:
                if not self._turns:
                    raise
                del self._turns[0]
                dropped += 1
            except BaseException:
                if came:
                    self._turns.append(_Exchange(question, "".join(came), None))
                raise
        answer = Answer(question, streamed, _acceptance(before, self._counters()), dropped)
        known = sum(turn.tokens or 0 for turn in self._turns)
        self._turns.append(_Exchange(question, streamed.text, max(0, answer.total_tokens - known)))
        return answer

    def _messages(self, question: str) -> list[dict[str, str]]:
        said = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self._turns:
            said.append({"role": "user", "content": turn.question})
            said.append({"role": "assistant", "content": turn.answer})
        return [*said, {"role": "user", "content": question}]

    def _make_room(self) -> int:
        """Forget the oldest turns until there is room for another; how many were forgotten."""
        limit = self.served.max_model_len
        if limit is None:
            return 0
        room = min(self.max_tokens or ROOM_TOKENS, limit // 4)
        dropped = 0
        while self._turns and sum(turn.tokens or 0 for turn in self._turns) + room > limit:
            del self._turns[0]
            dropped += 1
        return dropped

    def _counters(self) -> dict[str, float]:
        """The server's counters; none where it has no such page."""
        import httpx

        try:
            reply = self.client.get("/metrics")
            return parse_counters(reply.text) if reply.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return {}


def _acceptance(before: dict[str, float], after: dict[str, float]) -> float | None:
    drafts = after.get(DRAFTS, 0.0) - before.get(DRAFTS, 0.0)
    return 1 + (after.get(ACCEPTED, 0.0) - before.get(ACCEPTED, 0.0)) / drafts if drafts > 0 else None


def document(answer: Answer) -> dict[str, object]:
    """An answer as plain values, for JSON."""
    streamed = answer.streamed
    speed = streamed.tokens_per_s
    return {
        "question": answer.question,
        "answer": streamed.text,
        **({"reasoning": streamed.reasoning} if streamed.reasoning else {}),
        "finish_reason": streamed.finish_reason,
        "prompt_tokens": streamed.prompt_tokens,
        "completion_tokens": streamed.completion_tokens,
        "tokens_per_s": None if speed is None else round(speed, 2),
        "ttft_ms": round(1000 * streamed.first_s, 2),
        "acceptance_length": None if answer.acceptance_length is None else round(answer.acceptance_length, 3),
        "dropped_exchanges": answer.dropped,
    }
