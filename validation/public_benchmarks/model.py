"""A served model as lm-eval sees models. Import only where a benchmark is about to run: lm-eval is heavy."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from validation.answers import AnswerFile
from validation.document import Document, digest_of
from validation.endpoint import Job, Progress, Target
from validation.errors import MeasurementError
from validation.public_benchmarks.likelihood import continuation_scores

DEFAULT_MAX_TOKENS = 256
"""What lm-eval's own clients generate at most where a task does not say."""


class Generated(Document):
    """A generated text."""

    text: str
    finish_reason: str
    completion_tokens: int
    seconds: float


class EndpointLM(LM):  # type: ignore[misc]
    """Likelihoods through completions; generation through chat, or through completions if `chat` is off.

    Every answer is kept in the target's cache when it comes, and never asked for again.

    Args:
        max_tokens: instead of what each task says.
    """

    def __init__(
        self,
        target: Target,
        *,
        chat: bool = True,
        max_tokens: int | None = None,
        concurrency: int = 8,
        timeout_s: float = 600.0,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._target, self._chat, self._max_tokens = target, chat, max_tokens
        self._concurrency, self._timeout_s, self._progress = concurrency, timeout_s, progress
        self.seconds = 0.0
        """Sum of the requests' own times."""
        self.generated: dict[str, Generated] = {}
        """By prompt: what was generated, thoughts included."""

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy) of each (context, continuation)."""
        found = continuation_scores(
            self._target,
            [request.args for request in requests],
            names=[_name(request) for request in requests],
            concurrency=self._concurrency,
            timeout_s=self._timeout_s,
            progress=self._progress,
        )
        self.seconds += sum(each.seconds for each in found)
        return [(each.nats, each.greedy) for each in found]

    def loglikelihood_rolling(self, _requests: Sequence[Any]) -> list[float]:
        """Not offered: it conditions on a token that a server's interface does not let a client choose."""
        raise MeasurementError(
            "tasks that score whole texts (perplexity) are not run here",
            "Compare perplexity with `packager validate fidelity`.",
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text up to the task's stop strings, without a reasoning model's thoughts.

        In chat the stops are applied here, after `</think>`: a server would apply them to the thoughts and
        end them early.
        """
        groups: dict[str, list[int]] = defaultdict(list)
        for at, request in enumerate(requests):
            groups[json.dumps(self._settings(request.args[1]), sort_keys=True)].append(at)
        texts = [""] * len(requests)
        for settings, members in groups.items():
            asked = [(requests[at].args[0], _name(requests[at])) for at in members]
            found = self._generate(asked, json.loads(settings))
            for at, generated in zip(members, found, strict=True):
                context, options = requests[at].args[:2]
                texts[at] = _cut(generated.text, _stops(options))
                self.seconds += generated.seconds
                self.generated[context] = generated
        return texts

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as JSON: the server has the template."""
        return json.dumps({"messages": chat_history, "continue": not add_generation_prompt})

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's cache of built prompts, which is not used."""
        return ""

    def _settings(self, options: dict[str, Any]) -> dict[str, Any]:
        limit = self._max_tokens or options.get("max_gen_toks") or options.get("max_tokens")
        settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": limit or DEFAULT_MAX_TOKENS, "seed": 0}
        if options.get("do_sample"):
            settings |= {k: options[k] for k in ("temperature", "top_p") if k in options}
        if not self._chat and _stops(options):
            settings["stop"] = _stops(options)
        return settings

    def _generate(self, asked: Sequence[tuple[str, str]], settings: dict[str, Any]) -> list[Generated]:
        target = self._target
        shared = settings | {"model": target.model}

        def job(context: str, name: str) -> Job[Generated]:
            if not self._chat:
                body = shared | {"prompt": context}
                return Job(digest_of(context), name, "/v1/completions", body, _text)
            conversation = json.loads(context)
            body = shared | {"messages": conversation["messages"]}
            if conversation["continue"]:
                body |= {"add_generation_prompt": False, "continue_final_message": True}
            return Job(digest_of(conversation), name, "/v1/chat/completions", body, _message)

        keyed = {"subject": target.subject, "model": target.model, "chat": self._chat, "sampling": settings}
        answers = AnswerFile(target.cache, settings=keyed, kind=Generated, name="generated")
        endpoint = target.endpoint(concurrency=self._concurrency, timeout_s=self._timeout_s)
        return endpoint.collect([job(*one) for one in asked], answers, progress=self._progress)


def _name(request: Any) -> str:
    return f"{request.task_name}:{request.doc_id}"


def _stops(options: dict[str, Any]) -> list[str]:
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _cut(text: str, stops: Sequence[str]) -> str:
    text = text.rpartition("</think>")[2].lstrip("\n") if "</think>" in text else text
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def _message(reply: dict[str, Any], seconds: float) -> Generated:
    return _generated(reply, reply["choices"][0]["message"].get("content") or "", seconds)


def _text(reply: dict[str, Any], seconds: float) -> Generated:
    return _generated(reply, reply["choices"][0]["text"], seconds)


def _generated(reply: dict[str, Any], text: str, seconds: float) -> Generated:
    return Generated(
        text=text,
        finish_reason=reply["choices"][0].get("finish_reason") or "unknown",
        completion_tokens=(reply.get("usage") or {}).get("completion_tokens", 0),
        seconds=seconds,
    )
