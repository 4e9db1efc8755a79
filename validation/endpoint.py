"""A client for OpenAI-compatible servers: bounded concurrency, bounded retries, every answer kept on disk.

Answers go to one JSONL file per (subject, model, sampling): the first line records those settings, each
further line one answer under the digest of its messages. An answer that is there is never asked for again,
whichever measurement asks, so a run that was killed goes on where it stopped, and accuracy and identity
share answers.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
from pydantic import Field, ValidationError

from validation.document import Document, Url, canonical_json, digest_of, resolve_url
from validation.errors import MeasurementError, ServerUnreachable

Progress = Callable[[int, int], None]
"""Called with (answered, all) after each answer."""
REFUSED = "refused"
"""`finish_reason` of a prompt that the server would not take because it is too long."""


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


class Endpoint:
    """One served model behind an OpenAI-compatible HTTP interface.

    Args:
        url: base URL without `/v1`, or a function giving it (called at the first question).
        model: the name the server serves the model under.
        concurrency: requests in flight at most.
        timeout_s: seconds until an attempt without an answer counts as failed.
        attempts: tries per request. Connection errors, time-outs, 429 and 5xx are tried again.
        backoff_s: wait before the second try; doubles each time, 30 s at most.
    """

    def __init__(
        self,
        url: Url,
        model: str,
        *,
        concurrency: int = 8,
        timeout_s: float = 120.0,
        attempts: int = 4,
        backoff_s: float = 0.5,
    ) -> None:
        if concurrency < 1 or attempts < 1:
            raise MeasurementError("concurrency and attempts must be 1 or more")
        self.url = url
        self.model = model
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.attempts = attempts
        self.backoff_s = backoff_s

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

        Raises:
            ServerUnreachable: a request failed `attempts` times; what was answered is kept.
            MeasurementError: the server rejects a request, or the cache is unreadable or in use.
        """
        unique = {r.key: r for r in requests}
        with AnswerFile(cache, subject=subject, model=self.model, sampling=sampling) as answers:
            missing = [r for key, r in unique.items() if key not in answers.found]
            if missing:
                self._ask(missing, sampling, answers, refusals, progress, len(unique))
            completions = [answers.found[r.key].model_copy(update={"id": r.id}) for r in requests]
        if not refusals and any(c.finish_reason == REFUSED for c in completions):
            names = ", ".join(c.id for c in completions if c.finish_reason == REFUSED)
            raise MeasurementError(
                f"prompts too long for the server: {names}", "Serve with a larger context length."
            )
        return completions

    def _ask(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        answers: AnswerFile,
        refusals: bool,
        progress: Progress | None,
        total: int,
    ) -> None:
        stop = threading.Event()
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        base = resolve_url(self.url)
        # A proxy from the environment must not get between the client and a loopback server.
        with (
            httpx.Client(base_url=base, timeout=self.timeout_s, limits=limits, trust_env=False) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):

            def one(request: Request) -> None:
                completion = self._attempt(client, request, sampling, refusals, stop)
                if completion is not None:
                    answers.add(request.key, completion)
                    if progress is not None:
                        progress(len(answers.found), total)

            futures = [pool.submit(one, r) for r in requests]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
            failures = [f.exception() for f in done if f.exception() is not None]
            if failures:
                stop.set()
                pool.shutdown(cancel_futures=True)
                failure = failures[0]
                assert failure is not None
                raise failure

    def _attempt(
        self,
        client: httpx.Client,
        request: Request,
        sampling: Sampling,
        refusals: bool,
        stop: threading.Event,
    ) -> Completion | None:
        """One request with retries; None when another request's failure ended the run."""
        body = sampling.payload() | {
            "model": self.model,
            "messages": [m.model_dump() for m in request.messages],
        }
        reason = ""
        for attempt in range(self.attempts):
            if attempt and stop.wait(min(30.0, self.backoff_s * 2 ** (attempt - 1))):
                return None
            if stop.is_set():
                return None
            began = time.perf_counter()
            try:
                response = client.post("/v1/chat/completions", json=body)
            except httpx.TransportError as err:
                reason = f"{type(err).__name__}: {err}".rstrip(": ")
                continue
            seconds = time.perf_counter() - began
            if response.status_code == 429 or response.status_code >= 500:
                reason = f"HTTP {response.status_code}: {_said(response)}"
                continue
            if response.status_code != 200:
                if refusals and _too_long(response):
                    return Completion(
                        id=request.id, text="", finish_reason=REFUSED, prompt_tokens=0, completion_tokens=0,
                        tokens=None, seconds=seconds,
                    )  # fmt: skip
                raise self._rejection(client, response, request)
            try:
                return _parse(request.id, response.json(), seconds)
            except (ValueError, KeyError, IndexError, TypeError) as err:
                reason = f"an answer that is not a chat completion ({type(err).__name__}: {err})"
        raise ServerUnreachable(
            f"{client.base_url} gave no answer to {request.id!r} in {self.attempts} attempts; last: {reason}",
            "See the server's log; run the same command again to go on from the answers kept.",
        )

    def _rejection(
        self, client: httpx.Client, response: httpx.Response, request: Request
    ) -> MeasurementError:
        if response.status_code == 404:
            try:
                listing = client.get("/v1/models").json()
                names = ", ".join(repr(m["id"]) for m in listing["data"])
            except (httpx.HTTPError, ValueError, KeyError, TypeError):
                names = "(it does not say)"
            return MeasurementError(
                f"{client.base_url} does not serve {self.model!r}; it serves {names}",
                "Give the served model name.",
            )
        return MeasurementError(
            f"{client.base_url} rejects {request.id!r} with HTTP {response.status_code}: {_said(response)}"
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

    def ask(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        concurrency: int = 8,
        timeout_s: float = 120.0,
        refusals: bool = False,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """The answers in the order of `requests`; see `Endpoint` and `Endpoint.complete`."""
        endpoint = Endpoint(self.url, self.model, concurrency=concurrency, timeout_s=timeout_s)
        return endpoint.complete(
            requests, sampling, subject=self.subject, cache=self.cache, refusals=refusals, progress=progress
        )


class AnswerFile:
    """The answers of one (subject, model, sampling), appended one line at a time and never rewritten.

    A line cut off by a kill is dropped when the file is opened again. One process at a time holds the file.
    """

    def __init__(self, directory: Path, *, subject: str, model: str, sampling: Sampling) -> None:
        self.settings = {"subject": subject, "model": model, "sampling": sampling.model_dump(mode="json")}
        self.path = directory / f"answers-{digest_of(self.settings).removeprefix('sha256:')[:20]}.jsonl"
        self.found: dict[str, Completion] = {}
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise MeasurementError(
                    f"{self.path} is in use by another process", "Wait for the other measurement to end."
                ) from None
            self._load(file)
        except BaseException:
            file.close()
            raise
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def add(self, key: str, completion: Completion) -> None:
        """Append one answer; from here on a killed process does not lose it."""
        record = {"key": key, "completion": completion.model_dump(mode="json")}
        with self._lock:
            assert self._file is not None
            self._append(self._file, record)
            self.found[key] = completion

    def _load(self, file: IO[bytes]) -> None:
        file.seek(0)
        content = file.read()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            file.truncate(len(content) - len(torn))
        lines = whole.split(b"\n") if whole else []
        try:
            if lines and json.loads(lines[0]) != {"settings": self.settings}:
                raise ValueError("the first line does not name these settings")
            for line in lines[1:]:
                record = json.loads(line)
                self.found[record["key"]] = Completion.model_validate(record["completion"])
        except (ValueError, KeyError, TypeError, ValidationError) as err:
            raise MeasurementError(
                f"{self.path} is damaged: {err}", "Remove the file; its questions are then asked again."
            ) from None
        if not lines:
            self._append(file, {"settings": self.settings})

    @staticmethod
    def _append(file: IO[bytes], record: dict[str, Any]) -> None:
        file.write(canonical_json(record).encode() + b"\n")
        file.flush()


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


def _said(response: httpx.Response) -> str:
    return " ".join(response.text.split())[:300]


def _too_long(response: httpx.Response) -> bool:
    said = response.text.lower()
    return response.status_code in (400, 413, 422) and any(
        phrase in said for phrase in ("context length", "max_model_len", "model length", "too long")
    )
