"""`packager validate --serve`: servers started for a measurement, one after another, and gone after it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from packager.artifact import read_manifest
from packager.cli import run
from packager.errors import RemoteFailure
from packager.nano import CHECKPOINT, language
from packager.recipe import QuantizeSpec
from packager.release.served import Served, servable
from packager.serving import ServeSpec, fp8_runs_here, server
from validation.endpoint import Endpoint, Message, Request, Sampling


def quantized(folder: Path) -> Path:
    """The nano in block FP8."""
    from packager.quantize import quantize

    spec = QuantizeSpec()
    quantize(CHECKPOINT, folder, spec, recipe_digest=spec.digest, progress=lambda _: None)
    return folder


def test_what_is_served_names_the_bytes_and_how_they_are_served(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    artifact = quantized(tmp_path / "fp8")
    found = servable(artifact, cache=tmp_path / "cache")
    expected = [read_manifest(artifact).digest, *([] if fp8_runs_here()[0] else ["dequantized"])]
    assert found.subject == ":".join(expected)
    assert found.spec(make=False).model == (artifact if fp8_runs_here()[0] else found.dequantized)
    assert not (tmp_path / "cache").exists()  # naming writes nothing
    assert servable(CHECKPOINT).subject.startswith("sha256:")
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps(language.heldout_items(1)[0]) + "\n")
    assert run(["validate", "accuracy", "--items", str(items), "--serve", str(tmp_path)]) == 3


def test_a_server_that_dies_under_a_measurement_is_said_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server program that dies at its third answer; the answers before are kept."""
    program = tmp_path / "program.py"
    program.write_text(_DIES)
    monkeypatch.setattr(
        server, "vllm_command", lambda _spec, *, host, port: [sys.executable, str(program), host, str(port)]
    )
    served = Served(
        "doomed", "s", CHECKPOINT, tmp_path / "log", lambda: ServeSpec(CHECKPOINT), lambda _: None
    )
    requests = [Request(id=f"q{k}", messages=(Message(role="user", content=str(k)),)) for k in range(9)]
    target = served.target(tmp_path / "answers")
    endpoint = Endpoint(target.url, "model", concurrency=1, attempts=2, backoff_s=0.05)
    with pytest.raises(RemoteFailure, match="OutOfMemoryError: no blocks left"), served.running():
        endpoint.complete(requests, Sampling(), subject="s", cache=target.cache)
    (path,) = target.cache.iterdir()
    assert len(path.read_bytes().splitlines()) == 1 + 2


_DIES = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

answered = 0

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({})

    def do_POST(self):
        global answered
        answered += 1
        if answered == 3:
            print("OutOfMemoryError: no blocks left", flush=True)
            os._exit(1)
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({"choices": [{"message": {"content": "ok"}, "finish_reason": "stop"}]})

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

HTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.mark.engine
@pytest.mark.slow
def test_two_checkpoints_are_served_in_turn_compared_and_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    artifact = quantized(tmp_path / "fp8")
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in language.heldout_items(3, 2)))
    line = ["validate", "fidelity", "--items", str(items), "--cache", str(tmp_path / "answers"), "--json"]
    line += ["--reference-serve", str(CHECKPOINT), "--reference-label", "BF16", "--label", "FP8"]
    line += ["--serve", str(artifact), "--max-tokens", "96", "--max-mean-kl", "0.00025", "--experts", "4"]
    assert run(line) == 0
    said = capsys.readouterr()
    assert said.err.index("serving BF16") < said.err.index("serving FP8")
    document = json.loads(said.out)
    fidelity = document["fidelity"]
    assert document["identity"]["n"] == 18 and fidelity["overall"]["tokens"] > 100
    assert 0 < fidelity["overall"]["kl_mean"] < 0.00025
    assert 0.85 < document["experts"]["jaccard"] < 1
    assert fidelity["candidate_subject"] == servable(artifact).subject
    assert [
        p for p in psutil.Process().children(recursive=True) if "api_server" in " ".join(p.cmdline())
    ] == []
    # All of it is kept: the same command starts no server.
    assert run(line) == 0
    again = capsys.readouterr()
    assert "serving" not in again.err and json.loads(again.out) == document
