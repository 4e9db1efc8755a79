"""Acceptance of a served draft, from vLLM's own counters."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from packager.errors import BadInput, RemoteFailure

DRAFTS = "vllm:spec_decode_num_drafts"
DRAFTED = "vllm:spec_decode_num_draft_tokens"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class AcceptanceReport:
    """What a draft achieved between two readings of the counters."""

    drafts: int
    """Verification steps that had a draft."""
    accepted: int
    """Draft tokens accepted."""
    per_position: tuple[float, ...]
    """Share of drafts accepted up to and including each position; empty if the counters lack positions."""

    @property
    def length(self) -> float:
        """Tokens a verification yields on average: the accepted ones and the target's own."""
        return 1.0 + self.accepted / self.drafts

    def as_dict(self) -> dict[str, Any]:
        """For JSON: length, per-position rates, drafts, accepted."""
        return {
            "length": self.length,
            "per_position": list(self.per_position),
            "drafts": self.drafts,
            "accepted": self.accepted,
        }


def _grown(before: Mapping[str, float], after: Mapping[str, float], name: str) -> int | None:
    for key in (name, name + "_total"):
        if key in after:
            return round(after[key] - before.get(key, 0.0))
    return None


def acceptance_from_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> AcceptanceReport:
    """The report of what happened between two readings.

    Readings map counter names (with or without `_total`) to sums; positions are `<counter>:<position>`.

    Raises:
        BadInput: the server has no draft, or drafted nothing in between.
    """
    drafts, accepted = _grown(before, after, DRAFTS), _grown(before, after, ACCEPTED)
    if drafts is None or accepted is None:
        raise BadInput(
            "the server has no speculative decoding counters", "Serve the target together with its draft."
        )
    if drafts <= 0:
        raise BadInput("nothing was drafted between the two readings", "Send prompts with longer responses.")
    rates: list[float] = []
    while (count := _grown(before, after, f"{PER_POSITION}:{len(rates)}")) is not None:
        rates.append(count / drafts)
    return AcceptanceReport(drafts, accepted, tuple(rates))


@dataclass(frozen=True)
class Answer:
    """One greedy answer."""

    text: str
    token_ids: tuple[int, ...]
    """Generated tokens, the end of the turn included; empty if the server does not give ids."""
    prompt_tokens: int
    output_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Answers:
    """Answers of one pass over some prompts, in their order, and how long the pass took."""

    answers: tuple[Answer, ...]
    seconds: float
    """Wall time from the first request to the last answer."""

    @property
    def output_tokens(self) -> int:
        """Tokens generated in all."""
        return sum(answer.output_tokens for answer in self.answers)


def ask(
    url: str,
    model: str,
    prompts: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    concurrency: int = 1,
    ignore_eos: bool = False,
) -> Answers:
    """Greedy chat completions of `prompts` (each with `messages`).

    Args:
        url: of the server, without `/v1`.
        ignore_eos: generate exactly `max_tokens`, whatever they are.

    Raises:
        RemoteFailure: the server did not answer one of them.
    """
    address = f"{url.rstrip('/')}/v1/chat/completions"

    def one(prompt: Mapping[str, Any]) -> Answer:
        body = {
            "model": model,
            "messages": prompt["messages"],
            "temperature": 0,
            "max_tokens": max_tokens,
            "return_token_ids": True,
        }
        if ignore_eos:
            body["ignore_eos"] = True
        request = urllib.request.Request(
            address, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                document = json.load(reply)
            choice, usage = document["choices"][0], document["usage"]
            return Answer(
                str(choice["message"]["content"] or ""),
                tuple(choice.get("token_ids") or ()),
                int(usage["prompt_tokens"]),
                int(usage["completion_tokens"]),
                str(choice.get("finish_reason")),
            )
        except urllib.error.HTTPError as err:
            said = " ".join(err.read().decode(errors="replace").split())[:300]
            raise RemoteFailure(
                f"{url} refused a prompt with HTTP {err.code}: {said}", "Look into the server's log."
            ) from err
        except (OSError, ValueError, KeyError, IndexError, TypeError) as err:
            raise RemoteFailure(
                f"{url} did not answer a prompt: {err}", "Look into the server's log."
            ) from err

    with ThreadPoolExecutor(concurrency) as pool:
        began = time.perf_counter()
        answers = tuple(pool.map(one, prompts))
        return Answers(answers, time.perf_counter() - began)


@dataclass(frozen=True)
class Evaluation:
    """Acceptance over all prompts, and by task and language."""

    total: AcceptanceReport
    by_task: dict[str, AcceptanceReport]
    """A task or language whose answers left nothing to draft is not in it."""
    by_language: dict[str, AcceptanceReport]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.total.as_dict(),
            "by_task": {name: report.as_dict() for name, report in self.by_task.items()},
            "by_language": {name: report.as_dict() for name, report in self.by_language.items()},
        }


def evaluate(
    url: str,
    model: str,
    metrics: Callable[[], Mapping[str, float]],
    prompts: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    concurrency: int = 1,
) -> Evaluation:
    """Send the prompts to a server that has the draft, group by group, reading its counters in between.

    `metrics` reads the counters (`packager.serving.Server.metrics`). Prompts carry `messages`, `task`,
    `language`.

    Raises:
        BadInput: no prompts, or the server drafts nothing.
        RemoteFailure: the server fails.
    """
    if not prompts:
        raise BadInput("no prompts to evaluate the draft on")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for prompt in prompts:
        groups.setdefault((str(prompt["task"]), str(prompt["language"])), []).append(prompt)
    readings = [dict(metrics())]
    names = sorted(groups)
    for name in names:
        ask(url, model, groups[name], max_tokens=max_tokens, concurrency=concurrency)
        readings.append(dict(metrics()))

    def over(chosen: list[int]) -> dict[str, float]:
        grown: dict[str, float] = {}
        for index in chosen:
            for key, value in readings[index + 1].items():
                grown[key] = grown.get(key, 0.0) + value - readings[index].get(key, 0.0)
        return grown

    def by(part: int) -> dict[str, AcceptanceReport]:
        found = {}
        for value in sorted({name[part] for name in names}):
            grown = over([i for i, name in enumerate(names) if name[part] == value])
            if _grown({}, grown, DRAFTS):
                found[value] = acceptance_from_metrics({}, grown)
        return found

    return Evaluation(acceptance_from_metrics({}, over(list(range(len(names))))), by(0), by(1))
