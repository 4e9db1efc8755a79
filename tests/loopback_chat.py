"""An OpenAI-compatible chat server on loopback that answers by a rule and can misbehave on purpose."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Token = tuple[str, float, list[tuple[str, float]]]
"""A token, its log-probability, and the listed alternatives."""


class LoopbackChat:
    """Context manager. `answer` maps the last message to text, or to a list of tokens.

    `faults` is consulted for each request with (message, how often it was asked before) and may return an
    HTTP status (int), "disconnect", "rubbish", "drip" (an answer that never ends), seconds to wait (float),
    or ("wait", seconds): 429 with that Retry-After; None means no fault.

    `max_model_len` is listed with the model, and bounds the words of a conversation; `pace_s` lies between
    two streamed tokens. With `accepted`, /metrics counts a draft an answer, with so many tokens accepted.

    `score` gives, for the words of a text, what is listed at each: word to log-probability, the word itself
    among them. The text of a conversation is all that was said in it.
    """

    def __init__(
        self,
        answer: Callable[[str], str | list[Token]],
        faults: Callable[[str, int], int | float | str | tuple[str, object] | None] = lambda *_: None,
        *,
        model: str = "model",
        max_characters: int | None = None,
        score: Callable[[list[str]], list[dict[str, float]]] | None = None,
        max_model_len: int | None = None,
        pace_s: float = 0.001,
        accepted: int | None = None,
        api_key: str | None = None,
    ) -> None:
        self.max_model_len, self.pace_s, self.accepted, self.api_key = (
            max_model_len,
            pace_s,
            accepted,
            api_key,
        )
        self.answer, self.faults, self.model, self.max_characters = answer, faults, model, max_characters
        self.score = score
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.busy = self.most_busy = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path == "/metrics" and owner.accepted is not None:
                    self._send(200, owner._counters())
                elif self._may():
                    self._send(200, {"data": [{"id": owner.model, "max_model_len": owner.max_model_len}]})

            def _may(self) -> bool:
                known = owner.api_key is None or self.headers["Authorization"] == f"Bearer {owner.api_key}"
                if not known:
                    self._send(401, {"error": "Unauthorized"})
                return known

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self._may():
                    return
                with owner._lock:
                    owner.busy += 1
                    owner.most_busy = max(owner.most_busy, owner.busy)
                try:
                    owner._serve(self, body)
                finally:
                    with owner._lock:
                        owner.busy -= 1

            def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, header in (headers or {}).items():
                    self.send_header(name, header)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """A client that hung up is part of the tests, not worth a traceback."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackChat:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: Any, body: dict[str, Any]) -> None:
        message = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        with self._lock:
            before = self.asked[message]
            self.asked[message] += 1
            self.bodies.append(body)
        fault = self.faults(message, before)
        if isinstance(fault, float):
            time.sleep(fault)
        elif isinstance(fault, int):
            handler._send(fault, {"error": {"message": "on purpose"}})
            return
        elif fault == "disconnect":
            handler.close_connection = True
            handler.connection.close()
            return
        elif isinstance(fault, tuple):
            handler._send(429, {"error": {"message": "later"}}, {"Retry-After": str(fault[1])})
            return
        elif fault == "drip":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
            while True:  # until the client hangs up
                handler.wfile.write(b" ")
                time.sleep(0.05)
        elif fault == "rubbish":
            handler._send(200, b"<html>not json</html>")
            return
        if body["model"] != self.model:
            handler._send(404, {"error": {"message": "no such model"}})
            return
        if self.max_characters is not None and len(message) > self.max_characters:
            handler._send(400, {"error": {"message": "longer than the model's maximum context length"}})
            return
        words = len(" ".join(m["content"] for m in body.get("messages", ())).split())
        if self.max_model_len is not None and words >= self.max_model_len:
            said = f"This model's maximum context length is {self.max_model_len} tokens"
            handler._send(400, {"error": {"message": said}})
            return
        if self.score is not None and ("prompt_logprobs" in body or body.get("echo")):
            turns = [m["content"] for m in body.get("messages", ())] or [body["prompt"]]
            handler._send(200, self._scored(" ".join(turns).split(), body))
            return
        said = self.answer(message)
        tokens = [(w, -0.01, [(w, -0.01)]) for w in said.split(" ")] if isinstance(said, str) else said
        text = said if isinstance(said, str) else "".join(t for t, _, _ in tokens)
        if body.get("stream"):
            texts = [t for t, _, _ in tokens]
            if isinstance(said, str):
                texts = [texts[0], *(f" {t}" for t in texts[1:])]
            self._stream(handler, texts, words)
            return
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if body.get("logprobs"):
            choice["logprobs"] = {
                "content": [
                    {"token": t, "logprob": p, "top_logprobs": [{"token": a, "logprob": q} for a, q in top]}
                    for t, p, top in tokens
                ]
            }
        usage = {
            "prompt_tokens": len(" ".join(m["content"] for m in body["messages"]).split()),
            "completion_tokens": len(tokens),
        }
        handler._send(200, {"choices": [choice], "usage": usage})

    def _scored(self, words: list[str], body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM 0.32 lays it out: in chat completions at the top, in completions in the choice."""
        assert self.score is not None
        listed = self.score(words)
        if body.get("echo"):
            logprobs = {
                "tokens": [f"token_id:{w}" for w in words],
                "token_logprobs": [None, *(at[w] for w, at in zip(words[1:], listed[1:], strict=True))],
                "top_logprobs": [None, *({f"token_id:{w}": p for w, p in at.items()} for at in listed[1:])],
            }
            return {"choices": [{"text": "", "logprobs": logprobs, "finish_reason": "length"}]}
        entries = [
            None,
            *({w: {"logprob": p, "rank": 1, "decoded_token": w} for w, p in at.items()} for at in listed[1:]),
        ]
        found = {"prompt_logprobs": entries, "prompt_token_ids": words}
        choice = {"text": "", "finish_reason": "length"}
        if "messages" in body:
            return {**found, "choices": [{**choice, "message": {"role": "assistant", "content": ""}}]}
        return {"choices": [choice | found]}

    def _counters(self) -> bytes:
        lines = []
        for name, count in (("drafts", 1), ("accepted_tokens", self.accepted or 0)):
            total = f"vllm:spec_decode_num_{name}_total"
            lines += [f"# TYPE {total} counter", f"{total} {count * sum(self.asked.values())}.0"]
        return "\n".join(lines).encode()

    def _stream(self, handler: Any, texts: list[str], prompt_tokens: int) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        pieces: list[dict[str, Any]] = [{"choices": [{"delta": {"content": t}}]} for t in texts]
        pieces.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(texts)}
        pieces.append({"choices": [], "usage": usage})
        for piece in pieces:
            handler.wfile.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
            handler.wfile.flush()
            time.sleep(self.pace_s)
        handler.wfile.write(b"data: [DONE]\n\n")
        handler.close_connection = True
