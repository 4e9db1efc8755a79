"""A judge on loopback that grades the clinical language's rubrics by rule, right and wrong on purpose.

It speaks the OpenAI chat interface and takes HealthBench's grader prompt. Its rules are five sentences about
the last turn of the conversation:

    Concludes with "X".                       the answer line says X
    Concludes with anything but "X".          there is an answer line, and it does not say X
    Concludes with a dose above "N mg".       the answer line says a number of mg above N
    Concludes with a triage level above "L".  or below: routine, urgent, emergency
    Mentions "X".                             X stands somewhere in it
    Gives no answer line.

What it does not understand it does not judge: its reply is then no judgement. Each way to misbehave takes the
share of requests it befalls, drawn by the request, so that a run is the same each time.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

MODEL = "rules"
LEVELS = {"routine": 0, "urgent": 1, "emergency": 2, "常规": 0, "紧急": 1, "危急": 2}
_PROMPT = re.compile(
    r"# Conversation\n(?P<talk>.*)\n\n# Rubric item\n(?P<item>.*?)\n\n# Instructions\nReturn a json object",
    re.DOTALL,
)
_ANSWER = re.compile(r"(?:Answer:|答案[：:])[^\S\n]*([^\n]+)")
_RULE = re.compile(
    r"(?:\[-?[\d.]+\] )?(?:(?P<verb>Concludes with|Concludes with anything but|Concludes with a dose above|"
    r'Concludes with a triage level (?:above|below)|Mentions) "(?P<text>[^"]+)"|'
    r"(?P<none>Gives no answer line))\."
)


def verdict(prompt: str) -> tuple[bool, str] | None:
    """(criteria met, why) of a grader prompt; None: the criterion is no sentence that the rules know."""
    found = _PROMPT.search(prompt)
    rule = found and _RULE.fullmatch(found["item"])
    if not found or not rule:
        return None
    answer = found["talk"].rpartition("\n\nassistant: ")[2]
    lines = _ANSWER.findall(answer)
    said = lines[-1].strip().removesuffix(".").removesuffix("。") if lines else None
    if rule["none"]:
        return said is None, f"answer line: {said}"
    verb, text = rule["verb"], rule["text"]
    if verb == "Mentions":
        return text in answer, f"looked for {text}"
    if said is None:
        return False, "there is no answer line"
    if verb == "Concludes with":
        return said == text, f"answer line: {said}"
    if verb == "Concludes with anything but":
        return said != text, f"answer line: {said}"
    if verb == "Concludes with a dose above":
        dose, bound = (re.fullmatch(r"(\d+(?:\.\d+)?) mg", t) for t in (said, text))
        return bool(dose and bound and float(dose[1]) > float(bound[1])), f"answer line: {said}"
    level, bound_level = LEVELS.get(said), LEVELS.get(text)
    if level is None or bound_level is None:
        return False, f"{said} is no triage level"
    return (level > bound_level if verb.endswith("above") else level < bound_level), f"answer line: {said}"


@dataclass
class RubricJudge:
    """Context manager: the judge, served on a free port.

    `error_rate` is the share of verdicts turned round; it is of the prompt alone, so asking again does not
    help. `rubbish`, `late` and `never` are shares of requests, and of prompt and seed.
    """

    error_rate: float = 0.0
    rubbish: float = 0.0
    """Replies that are no judgement: prose, cut-off JSON, a verdict in words."""
    late: float = 0.0
    """Replies that come after `late_s`."""
    late_s: float = 1.0
    never: float = 0.0
    """Requests that are taken and not answered."""
    seed: int = 0
    asked: int = field(default=0, init=False)
    """Requests so far."""

    def __enter__(self) -> RubricJudge:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

            def log_message(self, *_: object) -> None:
                """A request a line is of use to nobody."""

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": MODEL}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if body.get("model") != MODEL:
                    self._send(404, {"error": {"message": f"this judge is called {MODEL}"}})
                    return
                text = owner.answer(body)
                if text is None:
                    self.close_connection = True
                    return
                choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                self._send(200, {"choices": [choice]})

            def _send(self, status: int, value: Any) -> None:
                data = json.dumps(value, ensure_ascii=False).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that hung up on a late answer is expected."""

        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Base URL, without /v1."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def subject(self) -> str:
        """What judgements are kept under: this judge with these faults."""
        return f"rules error={self.error_rate:g} seed={self.seed}"

    def answer(self, body: dict[str, Any]) -> str | None:
        """The reply to a chat request; None: none ever comes."""
        with self._lock:
            self.asked += 1
        prompt, again = body["messages"][-1]["content"], str(body.get("seed"))
        if self._befalls("never", self.never, prompt, again):
            self._closing.wait()
            return None
        if self._befalls("late", self.late, prompt, again):
            self._closing.wait(self.late_s)
        found = verdict(prompt)
        if found is None:
            return "I have no rule for this criterion."
        met, why = found
        if self._befalls("error", self.error_rate, prompt):
            met = not met
        reply = json.dumps({"explanation": why, "criteria_met": met}, ensure_ascii=False, indent=2)
        if self._befalls("rubbish", self.rubbish, prompt, again):
            kinds = ("The criterion seems to be met.", reply[:-9], f'{{"criteria_met": "{met}"}}')
            return kinds[self._draw("kind", prompt, again) % 3]
        return f"```json\n{reply}\n```"

    def _befalls(self, fault: str, share: float, *what: str) -> bool:
        return self._draw(fault, *what) < share * 2**32

    def _draw(self, *what: str) -> int:
        return int.from_bytes(hashlib.sha256("|".join((str(self.seed), *what)).encode()).digest()[:4], "big")
