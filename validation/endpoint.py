"""A client for OpenAI-compatible servers: bounded concurrency, bounded retries, every answer kept on disk.

Answers are kept by (subject, model, sampling), see `AnswerFile`. One that is there is never asked for again,
whichever measurement asks, so a run that was killed goes on where it stopped, and accuracy and identity
share answers.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, Field

from validation.answers import AnswerFile
from validation.connections import ConnectionFailed, Connections, Reply
from validation.document import Document, Url, digest_of, resolve_url
from validation.errors import AnswersNotKept, MeasurementError, ServerUnreachable

Answer = TypeVar("Answer", bound=BaseModel)
Progress = Callable[[int, int], None]
"""Called with (answered, all) after each answer."""
REFUSED = "refused"
"""`finish_reason` of a prompt that the server would not take because it is too long."""
LONGEST_WAIT_S = 120.0
"""Most that a server's Retry-After is heeded."""
TIMEOUT_S = 120.0
TIMEOUT_S_A_TOKEN = 0.25
"""A long answer in a full batch takes long: four tokens a second are waited for."""


class Message(Document):
    """One chat turn."""

    role: str
    content: str


class Sampling(Document):
    """The exact sampling settings of a run; greedy unless changed."""

    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = 0
    max_tokens: int = Field(default=256, gt=0)
    top_logprobs: int | None = Field(default=5, ge=0)
    """Alternatives kept with each token; None: no log-probabilities are asked for."""
    tokens_as_ids: bool = True
    """Name tokens by id (`token_id:17`) where the engine can: text does not tell byte tokens apart."""

    def payload(self) -> dict[str, Any]:
        """The request fields these settings stand for."""
        body: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if self.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
            if self.tokens_as_ids:
                body["return_tokens_as_token_ids"] = True
        return body


class TokenOutput(Document):
    """One generated token, its log-probability (nats) and the likeliest alternatives, itself among them."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


class Request(Document):
    """One conversation to be answered."""

    id: str
    messages: tuple[Message, ...]

    @property
    def key(self) -> str:
        """Digest of the conversation alone: equal conversations are asked once."""
        return digest_of([m.model_dump() for m in self.messages])


class Completion(Document):
    """A server's answer to one request."""

    id: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[TokenOutput, ...] | None
    seconds: float
    """Wall time of the successful attempt."""


@dataclass(frozen=True)
class Job(Generic[Answer]):
    """One thing to ask: where it goes, what is sent, and how the answer is read."""

    key: str
    """Digest of what is asked."""
    id: str
    """What messages call it."""
    path: str
    body: dict[str, Any]
    parse: Callable[[dict[str, Any], float], Answer]
    """From the reply's JSON and the seconds it took; ValueError, KeyError, IndexError or TypeError if the
    reply is not such an answer, which is then asked for again."""
    too_long: Callable[[float], Answer] | None = None
    """Makes the answer of a prompt that is too long for the server; None: that is an error."""


class Endpoint:
    """One served model behind an OpenAI-compatible HTTP interface.

    Args:
        url: base URL without `/v1`, or a function giving it (called at the first question).
        model: the name the server serves the model under.
        concurrency: requests in flight at most.
        timeout_s: seconds until an attempt without a whole answer counts as failed; None: `TIMEOUT_S`, and
            `TIMEOUT_S_A_TOKEN` for each token that may be generated.
        attempts: tries per request. Connection errors, time-outs, 429 and 5xx are tried again.
        backoff_s: wait before the second try; doubles each time, 30 s at most. If the server names a time to
            wait (Retry-After), no request is sent before it is over, `LONGEST_WAIT_S` at most.
        api_key: sent as a bearer token; never recorded.
    """

    def __init__(
        self,
        url: Url,
        model: str,
        *,
        concurrency: int = 8,
        timeout_s: float | None = None,
        attempts: int = 4,
        backoff_s: float = 0.5,
        api_key: str | None = None,
    ) -> None:
        if concurrency < 1 or attempts < 1:
            raise MeasurementError("concurrency and attempts must be 1 or more")
        self.url = url
        self.model = model
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.attempts = attempts
        self.backoff_s = backoff_s
        self.api_key = api_key
        self._not_before = 0.0

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        subject: str,
        cache: Path,
        refusals: bool = False,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Answers in the order of `requests`; those on disk are read, the others asked for and written.

        Args:
            subject: digest of what is served. It keys the cache: other weights, other answers.
            cache: directory of the answer files, made if missing.
            refusals: take a prompt that is too long for the server as an answer (`finish_reason` "refused").

        Raises: see `collect`; MeasurementError also for a prompt that is too long.
        """
        settings = {"subject": subject, "model": self.model, "sampling": sampling.model_dump(mode="json")}
        shared = sampling.payload() | {"model": self.model}

        def job(request: Request) -> Job[Completion]:
            return Job(
                key=request.key,
                id=request.id,
                path="/v1/chat/completions",
                body=shared | {"messages": [m.model_dump() for m in request.messages]},
                parse=lambda body, seconds: _parse(request.id, body, seconds),
                too_long=(lambda seconds: _refusal(request.id, seconds)) if refusals else None,
            )

        answers = AnswerFile(cache, settings=settings, kind=Completion)
        jobs = [job(r) for r in requests]
        found = self.collect(jobs, answers, tokens=sampling.max_tokens, progress=progress)
        completions = [c.model_copy(update={"id": r.id}) for c, r in zip(found, requests, strict=True)]
        if not refusals and any(c.finish_reason == REFUSED for c in completions):
            names = ", ".join(c.id for c in completions if c.finish_reason == REFUSED)
            raise MeasurementError(
                f"prompts too long for the server: {names}", "Serve with a larger context length."
            )
        return completions

    def collect(
        self,
        jobs: Sequence[Job[Answer]],
        answers: AnswerFile[Answer],
        *,
        tokens: int = 0,
        progress: Progress | None = None,
    ) -> list[Answer]:
        """An answer for each job, from the file or from the server; equal jobs are asked once.

        Args:
            tokens: most that an answer may have, for the time that it may take.

        Raises:
            ServerUnreachable: a request failed `attempts` times; what was answered is kept.
            AnswersNotKept: the disk is full; what was answered before is kept.
            MeasurementError: the server rejects a request, or the file is unreadable or in use.
        """
        unique = {job.key: job for job in jobs}
        with answers:
            missing = [job for key, job in unique.items() if key not in answers.found]
            if missing:
                timeout_s = (
                    TIMEOUT_S + TIMEOUT_S_A_TOKEN * tokens if self.timeout_s is None else self.timeout_s
                )
                self._ask(missing, answers, timeout_s, progress, len(unique))
            return [answers.found[job.key] for job in jobs]

    def _ask(
        self,
        jobs: Iterable[Job[Answer]],
        answers: AnswerFile[Answer],
        timeout_s: float,
        progress: Progress | None,
        total: int,
    ) -> None:
        stop, left, lock = threading.Event(), iter(jobs), threading.Lock()
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else None

        def work(connections: Connections) -> None:
            while not stop.is_set():
                with lock:
                    job = next(left, None)
                if job is None:
                    return
                try:
                    answer = self.attempt(connections, job, stop)
                    if answer is None:
                        return
                    answers.add(job.key, answer)
                except BaseException as err:
                    stop.set()
                    if isinstance(err, AnswersNotKept):
                        connections.break_off()
                    raise
                if progress is not None:
                    progress(len(answers.found), total)

        with (
            Connections(resolve_url(self.url), timeout_s=timeout_s, headers=headers) as connections,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            workers = [pool.submit(work, connections) for _ in range(self.concurrency)]
            try:
                # After a failure nothing new is asked, but what is on its way is still kept.
                wait(workers)
            except BaseException:
                stop.set()
                connections.break_off()
                raise
        for worker in workers:
            worker.result()

    def attempt(self, connections: Connections, job: Job[Answer], stop: threading.Event) -> Answer | None:
        """One request with retries; None when another request's failure ended the run.

        Raises:
            ServerUnreachable: it failed `attempts` times.
            MeasurementError: the server rejects it.
        """
        body = json.dumps(job.body).encode()
        reason = ""
        for attempt in range(self.attempts):
            backoff = min(30.0, self.backoff_s * 2 ** (attempt - 1)) if attempt else 0.0
            pause = max(backoff, self._not_before - time.monotonic())
            if stop.wait(pause) if pause > 0 else stop.is_set():
                return None
            began = time.perf_counter()
            try:
                reply = connections.post(job.path, body)
            except ConnectionFailed as err:
                reason = str(err)
                continue
            seconds = time.perf_counter() - began
            if reply.status == 429 or reply.status >= 500:
                reason = f"HTTP {reply.status}: {reply.text}"
                if reply.retry_after_s is not None:
                    self._not_before = time.monotonic() + min(reply.retry_after_s, LONGEST_WAIT_S)
                continue
            if reply.status != 200:
                if job.too_long is not None and says_too_long(reply.status, reply.body):
                    return job.too_long(seconds)
                raise self._rejection(connections, reply, job)
            try:
                return job.parse(json.loads(reply.body), seconds)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as err:
                reason = f"an answer that is not of the form asked for ({type(err).__name__}: {err})"
        raise ServerUnreachable(
            f"{connections.base_url} gave no answer to {job.id!r} in {self.attempts} attempts; "
            f"last: {reason}",
            "See the server's log; run the same command again to go on from the answers kept.",
        )

    def _rejection(self, connections: Connections, reply: Reply, job: Job[Answer]) -> MeasurementError:
        if reply.status == 404:
            try:
                listing = json.loads(connections.get("/v1/models").body)
                served = [m["id"] for m in listing["data"]]
            except (ConnectionFailed, ValueError, KeyError, TypeError):
                served = []
            if self.model not in served:
                names = ", ".join(map(repr, served)) or "(it does not say)"
                return MeasurementError(
                    f"{connections.base_url} does not serve {self.model!r}; it serves {names}",
                    "Give the served model name.",
                )
        return MeasurementError(
            f"{connections.base_url} rejects {job.id!r} with HTTP {reply.status}: {reply.text}"
        )


@dataclass(frozen=True)
class Target:
    """What is measured, and where its answers are kept."""

    url: Url
    model: str
    """Name it is served under."""
    subject: str
    """Digest of what is served. It keys the cache: other weights, other answers."""
    label: str
    """What tables call it."""
    cache: Path
    """Folder of the answers, made if missing."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; never recorded."""

    def endpoint(self, *, concurrency: int = 8, timeout_s: float | None = None) -> Endpoint:
        """The client for it."""
        return Endpoint(
            self.url, self.model, concurrency=concurrency, timeout_s=timeout_s, api_key=self.api_key
        )

    def ask(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        concurrency: int = 8,
        timeout_s: float | None = None,
        refusals: bool = False,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """The answers in the order of `requests`; see `Endpoint` and `Endpoint.complete`."""
        return self.endpoint(concurrency=concurrency, timeout_s=timeout_s).complete(
            requests, sampling, subject=self.subject, cache=self.cache, refusals=refusals, progress=progress
        )


def _parse(identity: str, body: dict[str, Any], seconds: float) -> Completion:
    choice = body["choices"][0]
    usage = body.get("usage") or {}
    logprobs = choice.get("logprobs")
    tokens: tuple[TokenOutput, ...] | None = None
    if logprobs and logprobs.get("content") is not None:
        tokens = tuple(
            TokenOutput(
                token=entry["token"],
                logprob=entry["logprob"],
                top=tuple((t["token"], t["logprob"]) for t in entry.get("top_logprobs") or ()),
            )
            for entry in logprobs["content"]
        )
        if not all(math.isfinite(p) for t in tokens for p in (t.logprob, *(lp for _, lp in t.top))):
            raise ValueError("a log-probability that is not finite")
    return Completion(
        id=identity,
        text=choice["message"].get("content") or "",
        finish_reason=choice.get("finish_reason") or "unknown",
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", len(tokens) if tokens else 0),
        tokens=tokens,
        seconds=seconds,
    )


def _refusal(identity: str, seconds: float) -> Completion:
    return Completion(
        id=identity, text="", finish_reason=REFUSED, prompt_tokens=0, completion_tokens=0, tokens=None,
        seconds=seconds,
    )  # fmt: skip


def says_too_long(status: int, body: bytes) -> bool:
    """Whether a server's reply means that the prompt is longer than its context."""
    said = body.decode(errors="replace").lower()
    return status in (400, 413, 422) and any(
        phrase in said for phrase in ("context length", "max_model_len", "model length", "too long")
    )
