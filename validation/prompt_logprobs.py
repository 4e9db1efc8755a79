"""Texts scored by a server: what it thinks of each token of a text that it is given, kept like answers.

Nothing is generated, so two servers judge exactly the same contexts, and a difference is of the models alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from validation.answers import AnswerFile
from validation.document import Document, digest_of
from validation.endpoint import Job, Message, Progress, Target
from validation.errors import MeasurementError

_DIGITS = 6  # of a log-probability: engines compute them in FP32


class Passage(Document):
    """A text to be scored: plain, or a conversation that the server puts into its own template."""

    id: str
    language: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    context_tokens: int = Field(default=1, ge=1)
    """Tokens at the beginning that are given and not judged: a question, before its answer."""

    @model_validator(mode="after")
    def _one_form(self) -> Passage:
        if (self.text is None) == (not self.messages):
            raise ValueError(f"passage {self.id!r} needs either a text or messages")
        return self


class Scoring(Document):
    """How texts are scored."""

    top: int = Field(default=20, ge=1)
    """Likeliest tokens listed at each position, the text's own beside them. vLLM allows 20 unless it is
    started with `--max-logprobs`."""
    form: Literal["prompt_logprobs", "echo"] = "prompt_logprobs"
    """`prompt_logprobs`: vLLM's field, for conversations and plain texts. `echo`: the older interface of
    completions (`echo` with `logprobs`), for plain texts alone."""
    repetition: int = Field(default=0, ge=0)
    """Counts scorings of the same texts by the same server, to see how far it agrees with itself."""


class Position(Document):
    """One token of a text after those before it."""

    token: str
    """Its id where the server tells ids, else its text."""
    logprob: float
    """Nats."""
    top: tuple[tuple[str, float], ...]
    """The likeliest tokens with their log-probabilities, the likeliest first."""


class ScoredPassage(Document):
    """A text as one server scored it."""

    id: str
    context: tuple[str, ...]
    """The tokens that are given; the first at least, which nothing precedes."""
    positions: tuple[Position, ...]
    """The tokens after them."""

    @property
    def tokens(self) -> list[str]:
        """All tokens of the text."""
        return [*self.context, *(position.token for position in self.positions)]


class ScoredRun(Document):
    """Texts as one served model scored them."""

    label: str
    subject: str
    passages_digest: str
    languages: tuple[str, ...]
    """Of each passage."""
    scoring: Scoring
    concurrency: int
    passages: tuple[ScoredPassage, ...]


def score_passages(
    target: Target,
    passages: Sequence[Passage],
    *,
    scoring: Scoring | None = None,
    concurrency: int = 8,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> ScoredRun:
    """Score every passage; what is in the target's cache is not asked for again.

    Raises:
        MeasurementError: no passages, or the server returns no log-probabilities of prompts.
        ServerUnreachable, AnswersNotKept: see `Endpoint.collect`.
    """
    scoring = scoring or Scoring()
    if not passages:
        raise MeasurementError("no texts to score")
    settings = {
        "subject": target.subject,
        "model": target.model,
        "scoring": scoring.model_dump(mode="json"),
    }
    answers = AnswerFile(target.cache, settings=settings, kind=ScoredPassage, name="scores")
    jobs = [_job(passage, target, scoring) for passage in passages]
    endpoint = target.endpoint(concurrency=concurrency, timeout_s=timeout_s)
    found = endpoint.collect(jobs, answers, progress=progress)
    return ScoredRun(
        label=target.label,
        subject=target.subject,
        passages_digest=digest_of([p.model_dump(mode="json") for p in passages]),
        languages=tuple(p.language for p in passages),
        scoring=scoring,
        concurrency=concurrency,
        passages=tuple(s.model_copy(update={"id": p.id}) for s, p in zip(found, passages, strict=True)),
    )


class Asked(Protocol):
    """A question, such as an item."""

    @property
    def id(self) -> str: ...
    @property
    def language(self) -> str: ...
    @property
    def messages(self) -> tuple[Message, ...]: ...


class Answered(Protocol):
    """An answer to it, such as a completion or an item's result."""

    @property
    def text(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...


def answers_as_passages(questions: Sequence[Asked], answers: Sequence[Answered]) -> list[Passage]:
    """Questions with the answers they got, of which the answers alone are judged.

    The template must put an answer behind the question as it does when it is asked for, as chat templates do.
    Answers of no text are left out.
    """
    return [
        Passage(
            id=question.id,
            language=question.language,
            messages=(*question.messages, Message(role="assistant", content=answer.text)),
            context_tokens=answer.prompt_tokens,
        )
        for question, answer in zip(questions, answers, strict=True)
        if answer.text
    ]


def _job(passage: Passage, target: Target, scoring: Scoring) -> Job[ScoredPassage]:
    body: dict[str, Any] = {"model": target.model, "temperature": 0.0}
    if scoring.form == "echo":
        if passage.text is None:
            raise MeasurementError(
                f"{passage.id!r} is a conversation; `echo` scores plain texts alone",
                "Give plain texts, or score by prompt_logprobs.",
            )
        body |= {"echo": True, "logprobs": scoring.top, "max_tokens": 0, "return_tokens_as_token_ids": True}
    else:
        body |= {"prompt_logprobs": scoring.top, "max_tokens": 1, "return_token_ids": True}
    if passage.text is not None:
        path, body = "/v1/completions", body | {"prompt": passage.text}
    else:
        messages = [m.model_dump() for m in passage.messages]
        path = "/v1/chat/completions"
        body |= {"messages": messages, "add_generation_prompt": False}

    def parse(reply: dict[str, Any], _: float) -> ScoredPassage:
        read = _from_echo if scoring.form == "echo" else _from_prompt_logprobs
        tokens, rows = read(reply, target.label)
        given = passage.context_tokens
        if len(tokens) <= given:
            raise MeasurementError(
                f"{passage.id!r} has {len(tokens)} tokens, of which {given} are given: nothing to score"
            )
        found = ScoredPassage(
            id=passage.id,
            context=tuple(tokens[:given]),
            positions=tuple(
                _position(token, row) for token, row in zip(tokens[given:], rows[given:], strict=True)
            ),
        )
        if not all(
            math.isfinite(p) for at in found.positions for p in (at.logprob, *(lp for _, lp in at.top))
        ):
            raise ValueError("a log-probability that is not finite")
        return found

    content = passage.model_dump(mode="json", exclude={"id", "language"})
    return Job(key=digest_of(content), id=passage.id, path=path, body=body, parse=parse)


_Rows = tuple[list[str], list[dict[str, float]]]
"""The tokens of a text, and of each the log-probabilities that were listed; of the first none."""


def _from_prompt_logprobs(reply: dict[str, Any], label: str) -> _Rows:
    """vLLM 0.32: at the top of a chat completion, in the choice of a completion; null at the first token."""
    where = reply if reply.get("prompt_logprobs") else reply["choices"][0]
    entries, ids = where.get("prompt_logprobs"), where.get("prompt_token_ids")
    if not entries:
        raise MeasurementError(
            f"the server of {label} returns no log-probabilities of the prompt",
            "Compare answers alone, score by `echo` if it has that, or serve with vLLM.",
        )
    # Without ids, the text's own token is the first of each entry (vLLM's `gather_logprobs`).
    own = [str(i) for i in ids] if ids else ["", *(next(iter(entry)) for entry in entries[1:])]
    if len(own) != len(entries):
        raise ValueError(f"{len(own)} tokens, {len(entries)} entries")
    return own, [{name: one["logprob"] for name, one in (entry or {}).items()} for entry in entries]


def _from_echo(reply: dict[str, Any], label: str) -> _Rows:
    found = reply["choices"][0].get("logprobs")
    if not found or not found.get("top_logprobs"):
        raise MeasurementError(f"the server of {label} returns no log-probabilities of the prompt")
    tokens = [_plain(token) for token in found["tokens"]]
    rows = []
    for token, logprob, top in zip(tokens, found["token_logprobs"], found["top_logprobs"], strict=True):
        own = {} if logprob is None else {token: logprob}
        rows.append({_plain(name): p for name, p in (top or {}).items()} | own)
    return tokens, rows


def _plain(token: str) -> str:
    return token.removeprefix("token_id:")


def _position(token: str, listed: Mapping[str, float]) -> Position:
    ranked = sorted(listed.items(), key=lambda one: (-one[1], one[0]))
    return Position(
        token=token,
        logprob=round(listed[token], _DIGITS),
        top=tuple((name, round(p, _DIGITS)) for name, p in ranked),
    )
