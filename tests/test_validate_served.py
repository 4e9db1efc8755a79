"""`packager validate --serve`: servers started for a measurement, one after another, and gone after it."""

from __future__ import annotations

import json
import shutil
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
    _serve_with(monkeypatch, tmp_path, dies_at=3)
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


def test_reference_and_candidate_are_served_in_turn_never_together_and_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve_with(monkeypatch, tmp_path)
    folders = [shutil.copytree(CHECKPOINT, tmp_path / name) for name in ("one", "two")]
    (folders[1] / "generation_config.json").write_text("{}")  # another checkpoint by its digest
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in language.heldout_items(1)))
    line = ["validate", "fidelity", "--items", str(items), "--cache", str(tmp_path / "answers"), "--json"]
    line += ["--reference-serve", str(folders[0]), "--serve", str(folders[1]), "--top-logprobs", "0"]
    assert run(line) == 0
    said = capsys.readouterr()
    assert said.err.index("serving reference") < said.err.index("serving candidate")
    identity = json.loads(said.out)["identity"]
    # Each answers with its folder's name, and says whether another server was there when it started.
    assert {d["reference_text"] for d in identity["differences"]} == {"one alone"}
    assert {d["candidate_text"] for d in identity["differences"]} == {"two alone"}
    assert list(tmp_path.glob("*.running")) == []


def _serve_with(monkeypatch: pytest.MonkeyPatch, folder: Path, *, dies_at: int = 0) -> None:
    program = folder / "program.py"
    program.write_text(_PROGRAM)

    def command(spec: ServeSpec, *, host: str, port: int) -> list[str]:
        return [sys.executable, str(program), host, str(port), str(spec.model), str(dies_at)]

    monkeypatch.setattr(server, "vllm_command", command)


_PROGRAM = """
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

host, port, model, dies_at = sys.argv[1:]
here = Path(__file__).parent
alone = "together" if list(here.glob("*.running")) else "alone"
mark = here / f"{Path(model).name}.running"
mark.touch()
answered = 0

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({})

    def do_POST(self):
        global answered
        answered += 1
        if answered == int(dies_at):
            print("OutOfMemoryError: no blocks left", flush=True)
            os._exit(1)
        self.rfile.read(int(self.headers["Content-Length"]))
        text = f"{Path(model).name} {alone}"
        tokens = [{"token": text, "logprob": -0.1, "top_logprobs": [{"token": text, "logprob": -0.1}]}]
        self.reply({"choices": [{"message": {"content": text}, "finish_reason": "stop",
                                 "logprobs": {"content": tokens}}]})

    def reply(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

try:
    HTTPServer((host, int(port)), Handler).serve_forever()
except KeyboardInterrupt:
    pass
mark.unlink()
"""


@pytest.mark.engine
@pytest.mark.slow
def test_a_folder_is_served_scored_in_two_batches_and_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    artifact = quantized(tmp_path / "fp8")
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in language.heldout_items(2, 2)))
    line = ["validate", "fidelity", "--items", str(items), "--cache", str(tmp_path / "answers"), "--json"]
    # Against itself: one server answers, and scores its answers twice; for the candidate all is there.
    line += ["--reference-serve", str(artifact), "--serve", str(artifact), "--max-tokens", "64"]
    assert run(line) == 0
    said = capsys.readouterr()
    assert said.err.count("serving reference") == 1 and "serving candidate" not in said.err
    document = json.loads(said.out)
    fidelity = document["fidelity"]
    assert document["identity"]["n"] == document["identity"]["identical"] == 12
    assert fidelity["overall"]["tokens"] > 60 and fidelity["overall"]["kl_max"] == 0.0
    assert 0 <= fidelity["noise"]["kl_mean"] < 0.00025 and fidelity["noise"]["top1_agreement"] > 0.99
    assert fidelity["overall"]["perplexity_reference"] < 1.2
    assert fidelity["candidate_subject"] == servable(artifact).subject
    assert [
        p for p in psutil.Process().children(recursive=True) if "api_server" in " ".join(p.cmdline())
    ] == []
