"""One call of a judge for each criterion: asked, read strictly, asked again if unreadable, kept on disk.

The protocol is HealthBench's (`healthbench_eval.py` of openai/simple-evals, MIT): its grader prompt word for
word, its system turn, its sampling, one criterion a call, and a reply that is one JSON object in which
`criteria_met` is true or false. It differs in what it does with a judge that fails: upstream asks for ever,
here a criterion is asked about `rounds` times at most, each time with another seed, and then counts as not
graded. A judge that has gone silent is given up on, so that a run ends.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from validation.answers import AnswerFile
from validation.connections import Connections
from validation.document import Document, Url, resolve_url
from validation.endpoint import Endpoint, Job, Message, Progress, Request, Sampling
from validation.errors import MeasurementError, ServerUnreachable

SYSTEM = "You are a helpful assistant."
"""Upstream's grader has this system turn."""
SAMPLING = Sampling(temperature=0.5, seed=0, max_tokens=2048, top_logprobs=None)
"""Upstream's grader is sampled so; the seed is ours, to make a run repeatable where the server heeds it."""


class JudgeRecord(Document):
    """Who judged, and how it was asked."""

    name: str
    model: str
    subject: str
    """Digest of what is served, or the name it goes by; judgements are kept under it."""
    prompt_digest: str
    """SHA-256 of the grader prompt."""
    sampling: Sampling
    rounds: int
    attempts: int
    timeout_s: float


class Reply(Document):
    """What a judge said, as it is kept."""

    text: str
    finish_reason: str
    seconds: float
    """Wall time of the successful attempt."""


class Judgement(Document):
    """What a judge said of one criterion."""

    met: bool | None
    """None: not graded."""
    explanation: str = ""
    rounds: int
    """How often it was asked about, unreadable replies included."""
    fault: str = ""
    """Why it is not graded."""


@dataclass(frozen=True)
class Question:
    """A finished conversation and one criterion."""

    conversation: Sequence[Message]
    """Its last turn is the answer that is judged."""
    criterion: str
    """As the judge is shown it."""

    @property
    def request(self) -> Request:
        """The question as the grader's prompt."""
        prompt = grader_prompt(self.conversation, self.criterion)
        messages = (Message(role="system", content=SYSTEM), Message(role="user", content=prompt))
        return Request(id="criterion", messages=messages)


@dataclass(frozen=True)
class Judge:
    """An OpenAI-compatible server that grades, and how patient we are with it."""

    url: Url
    model: str
    subject: str
    """Keys the judgements on disk: another judge, other judgements."""
    cache: Path
    name: str = ""
    """What tables call it; empty: the model's name."""
    concurrency: int = 8
    timeout_s: float = 120.0
    """Seconds from a request to the end of its answer."""
    attempts: int = 3
    """Tries of one request that gets no answer at all (see `Endpoint`)."""
    rounds: int = 3
    """How often a criterion is asked about while the replies are no judgements; each with another seed."""
    give_up_after: int = 16
    """Requests in a row without an answer, or rejected, after which nothing more is asked."""
    backoff_s: float = 0.5
    """Wait before the second attempt; doubles each time, 30 s at most."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as a bearer token; never recorded."""
    sampling: Sampling = SAMPLING

    def __post_init__(self) -> None:
        if min(self.concurrency, self.attempts, self.rounds, self.give_up_after) < 1:
            raise MeasurementError("concurrency, attempts, rounds and give_up_after must be 1 or more")

    @property
    def record(self) -> JudgeRecord:
        """What a result says about the judge."""
        return JudgeRecord(
            name=self.name or self.model,
            model=self.model,
            subject=self.subject,
            prompt_digest="sha256:" + hashlib.sha256(_template().encode()).hexdigest(),
            sampling=self.sampling,
            rounds=self.rounds,
            attempts=self.attempts,
            timeout_s=self.timeout_s,
        )

    def grade(self, questions: Sequence[Question], progress: Progress | None = None) -> list[Judgement]:
        """A judgement for each question, in order; what was judged before is read from disk.

        A reply that is no judgement is kept too, so that no round is ever asked twice. What had no answer is
        not kept: a later run asks again.

        Raises:
            MeasurementError: the judge rejects all that it is asked, or its folder is unreadable or in use.
            AnswersNotKept: the disk is full.
        """
        requests = {request.key: request for request in (question.request for question in questions)}
        with ExitStack() as stack:
            files = [stack.enter_context(self._replies(k)) for k in range(self.rounds)]
            missing = [request for key, request in requests.items() if not _read(key, files).settled]
            unanswered: dict[str, str] = {}
            if missing:
                unanswered = _Asking(self, files, progress, len(requests)).ask(missing)
            return [_read(q.request.key, files).judgement(unanswered) for q in questions]

    def job(self, request: Request, number: int) -> Job[Reply]:
        """What is sent in a round."""
        return Job(
            key=request.key,
            id=request.id,
            path="/v1/chat/completions",
            body=self._sampling(number).payload()
            | {"model": self.model, "messages": [turn.model_dump() for turn in request.messages]},
            parse=_reply,
        )

    def _replies(self, number: int) -> AnswerFile[Reply]:
        sampling = self._sampling(number).model_dump(mode="json")
        settings = {"judge": self.subject, "model": self.model, "sampling": sampling}
        return AnswerFile(self.cache, settings=settings, kind=Reply, name="judgements")

    def _sampling(self, number: int) -> Sampling:
        return self.sampling.model_copy(update={"seed": (self.sampling.seed or 0) + number})


@cache
def _template() -> str:
    return (Path(__file__).parent / "grader_template.txt").read_text(encoding="utf-8")


def grader_prompt(conversation: Sequence[Message], criterion: str) -> str:
    """The published grader prompt about a conversation, whose last turn is judged, and one criterion."""
    turns = "\n\n".join(f"{turn.role}: {turn.content}" for turn in conversation)
    parts = {"<<conversation>>": turns, "<<rubric_item>>": criterion}
    # In one pass: what a conversation quotes is not replaced again.
    return re.sub("|".join(parts), lambda found: parts[found.group()], _template())


def read_reply(text: str) -> tuple[bool, str]:
    """(criteria_met, explanation) of a judge's reply.

    One JSON object, bare or in a json code fence, as upstream reads it. `criteria_met` must be true or
    false: no text, no number, and not both.

    Raises:
        ValueError: it is anything else.
    """
    bare = re.sub(r"^```json\s*|\s*```$", "", text.strip())
    try:
        reply = json.loads(bare, object_pairs_hook=_no_key_twice)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(reply, dict):
        raise ValueError("not a JSON object")
    met = reply.get("criteria_met")
    if not isinstance(met, bool):
        raise ValueError("criteria_met is not true or false")
    explanation = reply.get("explanation", "")
    return met, explanation if isinstance(explanation, str) else json.dumps(explanation, ensure_ascii=False)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


@dataclass(frozen=True)
class _Replies:
    """What is on disk about one question."""

    key: str
    met: bool | None
    explanation: str
    asked: int
    rounds: int
    fault: str

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to ask."""
        return self.met is not None or self.asked == self.rounds

    def judgement(self, unanswered: dict[str, str]) -> Judgement:
        fault = "" if self.met is not None else unanswered.get(self.key, self.fault)
        return Judgement(met=self.met, explanation=self.explanation, rounds=self.asked, fault=fault)


def _read(key: str, files: Sequence[AnswerFile[Reply]]) -> _Replies:
    """The first readable reply about a question; rounds are asked in order, so there is no gap."""
    asked, fault = 0, ""
    for file in files:
        reply = file.found.get(key)
        if reply is None:
            break
        asked += 1
        try:
            met, explanation = read_reply(reply.text)
        except ValueError as err:
            fault = f"unreadable reply, {asked} of {len(files)}: {err}"
        else:
            return _Replies(key, met, explanation, asked, len(files), "")
    return _Replies(key, None, "", asked, len(files), fault)


class _Asking:
    """One run over the questions that have no judgement yet."""

    def __init__(
        self, judge: Judge, files: Sequence[AnswerFile[Reply]], progress: Progress | None, total: int
    ) -> None:
        self.judge, self.files, self.progress, self.total = judge, files, progress, total
        self.endpoint = Endpoint(
            judge.url,
            judge.model,
            timeout_s=judge.timeout_s,
            attempts=judge.attempts,
            backoff_s=judge.backoff_s,
        )
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done = self._answered = self._unanswered_in_a_row = 0
        self._rejection: MeasurementError | None = None

    def ask(self, requests: Sequence[Request]) -> dict[str, str]:
        """Ask about each; returns why those were not answered that were not, by key."""
        judge = self.judge
        self._done = self.total - len(requests)
        headers = {"Authorization": f"Bearer {judge.api_key}"} if judge.api_key else None
        with (
            Connections(resolve_url(judge.url), timeout_s=judge.timeout_s, headers=headers) as connections,
            ThreadPoolExecutor(judge.concurrency) as pool,
        ):
            try:
                faults = list(pool.map(lambda request: self._one(connections, request), requests))
            except BaseException:
                self._stop.set()
                connections.break_off()
                raise
        if self._rejection is not None and not self._answered:
            raise self._rejection
        return {request.key: fault for request, fault in zip(requests, faults, strict=True) if fault}

    def _one(self, connections: Connections, request: Request) -> str:
        """Ask until there is a judgement or no round is left; returns why it has no answer, or nothing."""
        while not (found := _read(request.key, self.files)).settled:
            try:
                reply = self.endpoint.attempt(connections, self.judge.job(request, found.asked), self._stop)
            except MeasurementError as err:
                self._heard(err)
                return err.message
            if reply is None:
                return f"the judge was given up on: no answer {self.judge.give_up_after} times in a row"
            self._heard(None)
            self.files[found.asked].add(request.key, reply)
        with self._lock:
            self._done += 1
            if self.progress is not None:
                self.progress(self._done, self.total)
        return ""

    def _heard(self, failure: MeasurementError | None) -> None:
        with self._lock:
            if failure is None:
                self._answered += 1
                self._unanswered_in_a_row = 0
                return
            if not isinstance(failure, ServerUnreachable):
                self._rejection = failure
            self._unanswered_in_a_row += 1
            if self._unanswered_in_a_row >= self.judge.give_up_after:
                self._stop.set()


def _reply(body: dict[str, Any], seconds: float) -> Reply:
    choice = body["choices"][0]
    text = choice["message"].get("content") or ""
    return Reply(text=text, finish_reason=choice.get("finish_reason") or "unknown", seconds=seconds)
