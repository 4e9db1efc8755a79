"""A loopback server with the completions interface too: token counts and prompt log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from loopback_chat import LoopbackChat

_TOKEN = re.compile(r"\s?[A-Za-z]+|\s?\d|\s|[^\s]")


def tokenize(text: str) -> list[str]:
    """Words with the blank before them, digits, and single other characters."""
    return _TOKEN.findall(text)


class LoopbackModel(LoopbackChat):
    """`likelihood` gives nats of a token after a text; whatever is likelier there is at -0.1. None: it
    has none.

    `answer` also continues plain prompts that ask for more than one token.
    """

    def __init__(
        self,
        answer: Callable[[str], str],
        likelihood: Callable[[str, str], float] | None = lambda *_: -1.0,
        **more: Any,
    ) -> None:
        super().__init__(answer, **more)
        self.likelihood = likelihood

    def _serve(self, handler: Any, body: dict[str, Any]) -> None:
        if "prompt" not in body:
            super()._serve(handler, body)
            return
        prompt = body["prompt"]
        with self._lock:
            before = self.asked[prompt]
            self.asked[prompt] += 1
            self.bodies.append(body)
        if isinstance(fault := self.faults(prompt, before), int):
            handler._send(fault, {"error": {"message": "on purpose"}})
            return
        tokens = tokenize(prompt)
        said = str(self.answer(prompt)) if body["max_tokens"] > 1 else " so"
        for stop in body.get("stop", ()):
            said = said.partition(stop)[0]
        choice: dict[str, Any] = {"text": said, "finish_reason": "stop"}
        if body.get("echo") and self.likelihood is not None:
            own = [self.likelihood("".join(tokens[:k]), token) for k, token in enumerate(tokens)]
            choice["text"] = prompt + said
            choice["logprobs"] = {
                "token_logprobs": [None, *own[1:], -0.5],
                "top_logprobs": [
                    None,
                    *({t: p, "other": max(p, -0.1)} for t, p in zip(tokens[1:], own[1:], strict=True)),
                    {"so": -0.5},
                ],
            }
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(tokenize(said))}
        handler._send(200, {"choices": [choice], "usage": usage})
