"""A program that answers like an engine's HTTP server, vLLM's or SGLang's, and can go wrong on purpose.

`python loopback_engine.py HOST PORT MODEL [--engine sglang] [--fault …] [--token-ms N]`: completions are
streamed token by token, words of the prompt repeated; the answer ends by itself after 2 to 9 tokens, by the
prompt's length, unless `ignore_eos` is set. Every request and answer length is noted in MODEL/asked.jsonl.
Standard library only: it starts in a tenth of a second.

Faults: `start` (an error at once), `memory-start`, `memory` (dies in the third completion), `silent` (takes
completions and never answers), `stuck` (stops in the middle of the third completion), `other` (lists another
model), `refuse` (HTTP 500 for every completion that the benchmark asks for), `killed` (SIGKILL in the third).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DRAFTED, ACCEPTED = 3, 2
"""Draft tokens a step, and how many of them are right."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--fault", default="")
    parser.add_argument("--token-ms", type=float, default=0.0)
    parser.add_argument("--draft", action="store_true")
    parser.add_argument("--keeps-average", action="store_true", help="/flush_cache forgets no acceptance")
    return parser.parse_args()


class Engine:
    """What is counted, for all requests together."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.lock = threading.Lock()
        self.completions = 0
        self.generated = 0
        self.steps = 0
        """Verification steps since the average of acceptance began."""
        self.all_steps = 0

    def metrics(self) -> str:
        args = self.args
        lines = [f'{args.engine}:generation_tokens_total{{model_name="m"}} {float(self.generated)}']
        if args.draft and args.engine == "sglang":
            lines.append(f'sglang:spec_accept_length{{model_name="m"}} {ACCEPTED + 1 - 0.25}')
        if args.draft and args.engine == "vllm":
            counts = {
                "num_drafts": self.all_steps,
                "num_draft_tokens": DRAFTED * self.all_steps,
                "num_accepted_tokens": ACCEPTED * self.all_steps,
            }
            lines += [f"vllm:spec_decode_{name}_total {float(value)}" for name, value in counts.items()]
        return "\n".join(lines) + "\n"

    def server_info(self) -> dict[str, Any]:
        state: dict[str, Any] = {"last_gen_throughput": 1.0}
        if self.steps:
            state["avg_spec_accept_length"] = float(ACCEPTED + 1)
        return {"model_path": "/models/m", "internal_states": [state], "version": "0.5.23"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    engine: Engine

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        args = self.engine.args
        if self.path == "/v1/models":
            name = "another" if args.fault == "other" else "model"
            self.reply({"data": [{"id": name}]})
        elif self.path == "/metrics":
            self.reply(self.engine.metrics())
        elif self.path == "/version" and args.engine == "vllm":
            self.reply({"version": "0.32.0"})
        elif self.path == "/get_server_info" and args.engine == "sglang":
            self.reply(self.engine.server_info())
        elif self.path == "/health":
            self.reply({})
        else:
            self.reply({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        if self.path == "/flush_cache":
            if not self.engine.args.keeps_average:
                self.engine.steps = 0
            self.reply("Cache flushed.")
        elif self.path == "/v1/completions":
            self.complete(body)
        else:
            self.reply({"detail": "Not Found"}, 404)

    def complete(self, body: dict[str, Any]) -> None:
        engine, args = self.engine, self.engine.args
        with engine.lock:
            engine.completions += 1
            number = engine.completions
        if args.fault == "silent":
            time.sleep(3600)
        if number == 3 and args.fault == "memory":
            print("MemoryError: cannot allocate 64.00 GiB for the KV cache", flush=True)
            os._exit(1)
        if number == 3 and args.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        measured = "stream_options" in body
        if args.fault == "refuse" and measured:
            self.reply({"error": {"message": "no such luck"}}, 500)
            return
        words = body["prompt"].split() or ["so"]
        natural = 2 + len(body["prompt"]) % 8
        count = body["max_tokens"] if body.get("ignore_eos") else min(body["max_tokens"], natural)
        with engine.lock, (args.model / "asked.jsonl").open("a") as file:
            row = {"prompt": body["prompt"], "given": count, "measured": measured}
            file.write(json.dumps(row) + "\n")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for k in range(count):
            if number == 3 and k == 1 and args.fault == "stuck":
                time.sleep(3600)
            time.sleep(args.token_ms / 1000)
            with engine.lock:
                engine.generated += 1
                engine.steps += args.draft
                engine.all_steps += args.draft
            self.event({"choices": [{"index": 0, "text": f" {words[k % len(words)]}"}]})
        usage = {"prompt_tokens": len(words) + 4, "completion_tokens": count}
        self.event({"choices": [], "usage": usage})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def event(self, value: dict[str, Any]) -> None:
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def reply(self, value: Any, status: int = 200) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hung up."""


def main() -> None:
    args = parse()
    # Whether others were up when this one came.
    with (args.model.parent / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"model": args.model.name, "pid": os.getpid()}) + "\n")
    if args.fault == "start":
        print("RuntimeError: the weights are of another shape", flush=True)
        sys.exit(1)
    if args.fault == "memory-start":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", flush=True)
        sys.exit(1)
    Handler.engine = Engine(args)
    Quiet((args.host, args.port), Handler).serve_forever(0.05)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
