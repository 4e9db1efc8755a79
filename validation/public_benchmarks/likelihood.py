"""How likely a model finds given continuations, from prompt log-probabilities of the completions interface.

No tokenizer is needed here: the server says how many tokens the context alone has, and the tokens after
those, of context and continuation together, are the continuation's. That is lm-eval's own cut
(`TemplateLM._encode_pair`), blanks at the end of a context going to the continuation included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from validation.answers import AnswerFile
from validation.document import Document, digest_of
from validation.endpoint import Job, Progress, Target
from validation.errors import MeasurementError


class PromptTokens(Document):
    """A prompt as the server cut it, from a token on."""

    prompt_tokens: int
    logprobs: tuple[float, ...]
    """Nats, of the tokens from `start` on; empty if only counted."""
    best: tuple[float, ...]
    """Of the likeliest token at each of those places."""
    seconds: float


class Likelihood(NamedTuple):
    """Of one continuation after its context."""

    nats: float
    greedy: bool
    """Whether greedy decoding gives the continuation."""
    seconds: float
    """Of the request."""


def continuation_scores(
    target: Target,
    pairs: Sequence[tuple[str, str]],
    *,
    names: Sequence[str] | None = None,
    concurrency: int = 8,
    timeout_s: float = 120.0,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Args:
        pairs: (context, continuation); neither is empty.
        names: what messages call each pair.

    Raises:
        MeasurementError, ServerUnreachable: see `Endpoint.collect`; also a server that gives no
            log-probabilities of the prompt, and a context or continuation without tokens.
    """
    moved = [_blanks_to_continuation(context, continuation) for context, continuation in pairs]
    if any(not context or not continuation for context, continuation in moved):
        raise MeasurementError("a likelihood needs a context and a continuation", "Leave the task out.")
    endpoint = target.endpoint(concurrency=concurrency, timeout_s=timeout_s)
    settings = {"subject": target.subject, "model": target.model, "measure": "prompt likelihood"}
    answers = AnswerFile(target.cache, settings=settings, kind=PromptTokens, name="likelihood")
    called = list(names) if names is not None else [context[-40:] for context, _ in moved]
    counts = [
        _job(target.model, context, None, name) for (context, _), name in zip(moved, called, strict=True)
    ]
    counted = endpoint.collect(counts, answers, progress=progress)
    jobs = [
        _job(target.model, context + rest, found.prompt_tokens, name)
        for (context, rest), found, name in zip(moved, counted, called, strict=True)
    ]
    scored = endpoint.collect(jobs, answers, progress=progress)
    return [
        Likelihood(
            math.fsum(found.logprobs),
            all(own >= best for own, best in zip(found.logprobs, found.best, strict=True)),
            found.seconds,
        )
        for found in scored
    ]


def _blanks_to_continuation(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _job(model: str, prompt: str, start: int | None, name: str) -> Job[PromptTokens]:
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "seed": 0}
    if start is not None:
        body |= {"echo": True, "logprobs": 1}

    def parse(reply: dict[str, Any], seconds: float) -> PromptTokens:
        count = int(reply["usage"]["prompt_tokens"])
        if start is None:
            return PromptTokens(prompt_tokens=count, logprobs=(), best=(), seconds=seconds)
        found = reply["choices"][0].get("logprobs")
        if not found or len(found.get("token_logprobs") or ()) < count:
            raise MeasurementError(
                f"the server of {model!r} gives no log-probabilities of the prompt (echo with logprobs)",
                "Serve with an engine that does, such as vLLM, or ask with --style reasoning.",
            )
        own = tuple(float(p) for p in found["token_logprobs"][start:count])
        tops = [list(top.values()) for top in found["top_logprobs"][start:count]]
        if not own or not all(math.isfinite(p) for p in own):
            raise ValueError("no finite log-probability of the continuation")
        best = tuple(max(p, *top) for p, top in zip(own, tops, strict=True))
        return PromptTokens(prompt_tokens=count, logprobs=own, best=best, seconds=seconds)

    return Job(
        key=digest_of({"prompt": prompt, "start": start}),
        id=name,
        path="/v1/completions",
        body=body,
        parse=parse,
    )
