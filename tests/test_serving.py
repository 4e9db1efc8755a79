"""Serving: the command builder, the server's life cycle, and `packager serve` through the real engine."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from serve_files import CONTEXTS, SERVE_FILE, speculative, write_bundle

import packager.nano
from packager.cli.chat import command as chat
from packager.cli.serve import command as serve
from packager.context import extend
from packager.errors import BadInput, RemoteFailure, UsageProblem
from packager.recipe import ContextSpec, SpeculationRange
from packager.serving import Server, ServeSpec, cpu, fp8_runs_here, vllm_command
from packager.serving import server as server_module
from packager.serving.serve_file import is_fp8
from packager.serving.server import free_port, log_cause, parse_counters

NANO = Path(packager.nano.__file__).parent / "checkpoint"
PACKAGER = (sys.executable, "-m", "packager")

# --- commands -----------------------------------------------------------------------------------------------


def test_one_function_makes_the_published_and_the_local_command() -> None:
    spec = ServeSpec(
        Path("m"), draft=Path("m/draft"), num_speculative_tokens=4, max_model_len=2048, tensor_parallel=2
    )
    published = vllm_command(spec, target="cuda")
    local = vllm_command(spec, target="cpu", python="python")
    assert published[:3] == ["vllm", "serve", "m"]
    assert local[:5] == ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    shared = published[3:]
    assert local[5 : 5 + len(shared)] == shared
    assert json.loads(shared[shared.index("--speculative-config") + 1]) == {
        "method": "eagle3",
        "model": "m/draft",
        "num_speculative_tokens": 4,
    }


def _range(tokens: int, up_to: int | None = None) -> SpeculationRange:
    return SpeculationRange(max_concurrency=up_to, num_speculative_tokens=tokens)


def test_draft_tokens_by_batch_are_the_engines_own_schedule() -> None:
    spec = ServeSpec(
        Path("m"),
        draft=Path("d"),
        speculation=(_range(5, 8), _range(3, 64), _range(0)),
        speculation_max_context=32768,
    )
    assert speculative(spec) == {
        "method": "eagle3",
        "model": "d",
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": [[1, 8, 5], [9, 64, 3], [65, 65, 0]],
        "max_model_len": 32768,
    }


def test_one_draft_length_for_all_batches_needs_no_schedule() -> None:
    found = speculative(ServeSpec(Path("m"), draft=Path("d"), speculation=(_range(2),)))
    assert found == {"method": "eagle3", "model": "d", "num_speculative_tokens": 2}


@pytest.mark.parametrize(("served", "told"), [(32768, None), (16384, None), (131072, 32768), (None, 32768)])
def test_a_limit_of_speculation_beyond_the_length_served_is_left_out(
    served: int | None, told: int | None
) -> None:
    spec = ServeSpec(Path("m"), draft=Path("d"), speculation_max_context=32768, max_model_len=served)
    assert speculative(spec).get("max_model_len") == told


def test_a_draft_that_never_pays_is_not_served() -> None:
    spec = ServeSpec(Path("m"), draft=Path("d"), speculation=(_range(0),))
    assert "--speculative-config" not in vllm_command(spec, target="cuda")


@pytest.mark.slow
def test_vllm_reads_the_schedule_as_it_is_meant() -> None:
    """Its own function expands it to a table by batch size; the last range is carried on."""
    dynamic = pytest.importorskip("vllm.v1.spec_decode.dynamic.utils")
    spec = ServeSpec(Path("m"), draft=Path("d"), speculation=(_range(5, 2), _range(3, 4), _range(0)))
    ranges = speculative(spec)["num_speculative_tokens_per_batch_size"]
    assert dynamic.build_dynamic_sd_schedule_lookup(ranges, 8, 5)[1:] == [5, 5, 3, 3, 0, 0, 0, 0]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_no_command_trusts_remote_code(target: cpu.Device) -> None:
    spec = ServeSpec(Path("m"), hf_overrides={"max_position_embeddings": 9}, extra_args=("--seed", "1"))
    arguments = vllm_command(spec, target=target)
    assert not any("trust" in argument for argument in arguments)
    assert arguments[-2:] == ["--seed", "1"]


# --- what this machine can do -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "flags", "runs", "reason"),
    [
        ("cpu", {"avx512_bf16"}, False, "no AMX (amx_tile)"),
        ("cpu", {"amx_tile"}, True, "has AMX (amx_tile)"),
        ("cuda", set(), True, "GPU"),
    ],
)
def test_fp8_runs_where_there_is_a_kernel(
    monkeypatch: pytest.MonkeyPatch, device: str, flags: set[str], runs: bool, reason: str
) -> None:
    monkeypatch.setattr(cpu, "device", lambda: device)
    monkeypatch.setattr(cpu, "_processor_flags", lambda: frozenset(flags))
    answer = fp8_runs_here()
    assert answer[0] is runs
    assert reason in answer[1]


def test_the_answer_agrees_with_torch() -> None:
    import torch

    if cpu.device() == "cpu":
        assert fp8_runs_here()[0] == torch.cpu._is_amx_tile_supported()


def test_the_users_environment_wins_and_blanks_in_paths_are_kept_from_tools_that_split_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in cpu.cpu_environment()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert int(cpu.cpu_environment()["OMP_NUM_THREADS"]) >= 1
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "TORCH_COMPILE_DISABLE" not in cpu.cpu_environment()
    # Neither ld.so nor torch's call of the compiler stands a blank in its paths.
    library = tmp_path / "an installation" / "lib" / "libiomp5.so"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr("sys.prefix", str(library.parents[1]))
    assert cpu.cpu_environment()["TORCH_COMPILE_DISABLE"] == "1"
    assert "LD_PRELOAD" not in cpu.cpu_environment()


# --- reading what the engine says ---------------------------------------------------------------------------


def test_counters_are_summed_over_labels_and_kept_by_position() -> None:
    text = textwrap.dedent("""\
        # HELP vllm:spec_decode_num_drafts_total Number of drafts.
        # TYPE vllm:spec_decode_num_drafts_total counter
        vllm:spec_decode_num_drafts_total{engine="0",model_name="a"} 10.0
        vllm:spec_decode_num_drafts_total{engine="1",model_name="a"} 5.0
        # TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
        vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 8.0
        vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 4.0
        # TYPE vllm:num_requests_running gauge
        vllm:num_requests_running{engine="0"} 3.0
        """)
    assert parse_counters(text) == {
        "vllm:spec_decode_num_drafts": 15.0,
        "vllm:spec_decode_num_accepted_tokens_per_pos": 12.0,
        "vllm:spec_decode_num_accepted_tokens_per_pos:0": 8.0,
        "vllm:spec_decode_num_accepted_tokens_per_pos:1": 4.0,
    }


def test_the_cause_of_death_is_found_above_its_aftermath() -> None:
    log = textwrap.dedent("""\
        (EngineCore pid=1) ERROR 11-22 17:35:57 [core.py:1510] Traceback (most recent call last):
        (EngineCore pid=1) ERROR 11-22 17:35:57 [core.py:1510] ValueError: Failed to find a kernel. Reasons:
        (EngineCore pid=1) ERROR 11-22 17:35:57 [core.py:1510] CPUFp8Kernel requires AMX tile support.
        (APIServer pid=2)     raise RuntimeError(
        (APIServer pid=2) RuntimeError: Engine core initialization failed. See root cause above.
        """)
    cause = "ValueError: Failed to find a kernel. Reasons: CPUFp8Kernel requires AMX tile support."
    assert log_cause(log) == cause
    assert log_cause("INFO all is well\n") is None


# --- life cycle, with a small program in the engine's place -------------------------------------------------

ENGINE = """
import http.server, subprocess, sys, time
port, mode = int(sys.argv[1]), sys.argv[2]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if mode == "dies":
    raise ValueError("this model cannot be loaded")
if mode == "hangs":
    time.sleep(600)
if mode == "stubborn":
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"# TYPE a_total counter\\na_total 2.0\\n")
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`program(mode)` makes servers start the small program; afterwards nothing of it may be alive."""
    log = tmp_path / "engine.log"

    def use(mode: str, **settings: Any) -> Server:
        monkeypatch.setattr(
            server_module,
            "vllm_command",
            lambda spec, *, host, port: [sys.executable, "-c", ENGINE, str(port), mode],  # noqa: ARG005
        )
        return Server(ServeSpec(NANO), log, **settings)

    yield use
    assert not alive(log)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def alive(log: Path) -> list[int]:
    """Children named in a log that still run a moment later; one that only waits to be reaped does not."""
    pids = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("child")]
    for _ in range(50):
        running = [pid for pid in pids if _runs(pid)]
        if not running:
            break
        time.sleep(0.1)
    return running


def test_a_server_is_healthy_inside_and_gone_outside(program: Any) -> None:
    with program("serves") as server:
        assert server.metrics() == {"a": 2.0}
        assert server.startup_s > 0
    with pytest.raises(RemoteFailure):
        server.metrics()


@pytest.mark.slow
def test_a_program_that_ignores_signals_is_killed_with_its_children(program: Any) -> None:
    with program("stubborn"):
        pass


@pytest.mark.slow
def test_death_at_start_says_why(program: Any) -> None:
    with pytest.raises(RemoteFailure) as caught:
        program("dies").start()
    assert "exit code 1" in caught.value.message
    assert "ValueError: this model cannot be loaded" in caught.value.message.splitlines()[0]
    assert "engine.log" in caught.value.remedy


@pytest.mark.slow
def test_too_slow_a_start_is_given_up(program: Any) -> None:
    with pytest.raises(RemoteFailure, match="not healthy after 1 s"):
        program("hangs", startup_timeout_s=1).start()


@pytest.mark.slow
def test_death_in_service_is_noticed(program: Any) -> None:
    with program("serves") as server:
        for process in psutil.Process(server._process.pid).children():
            process.kill()
        server.wait()
        with pytest.raises(RemoteFailure, match="died with exit code"):
            server.metrics()


def test_an_address_of_ip_version_6_is_written_in_brackets(tmp_path: Path) -> None:
    server = Server(ServeSpec(NANO), tmp_path / "log", host="::", port=8000)
    assert server.url == "http://[::1]:8000"


def test_a_port_in_use_is_refused_before_anything_starts(program: Any, tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_text("")
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(UsageProblem, match=f"cannot listen on 127.0.0.1:{port}"):
            program("serves", port=port).start()
    assert (tmp_path / "engine.log").read_text() == ""


@pytest.mark.slow
def test_a_killed_owner_leaves_no_server_behind(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""\
                import sys, time
                from pathlib import Path
                from packager.serving import Server, ServeSpec, server
                server.vllm_command = lambda spec, *, host, port: [
                    sys.executable, "-c", {ENGINE!r}, str(port), "serves"]
                Server(ServeSpec(Path({str(NANO)!r})), Path({str(log)!r})).start()
                print("up", flush=True)
                time.sleep(600)
                """),
        ],
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"up\n"
    owner.kill()
    owner.communicate()
    assert "child" in log.read_text()
    assert not alive(log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "signals", "code", "says"),
    [
        ("serves", [signal.SIGHUP], 0, "stopping"),
        ("serves", [signal.SIGTERM], 0, "stopping"),
        ("stubborn", [signal.SIGINT, signal.SIGINT], 130, "killed"),
        ("hangs", [signal.SIGINT], 130, "stopped before it served"),
        ("serves", [], 6, "error: the engine ended with exit code 143"),
    ],
)
def test_the_verb_ends_as_it_is_told(
    mode: str, signals: list[signal.Signals], code: int, says: str, tmp_path: Path
) -> None:
    """By each signal; a second interrupt does not wait for an engine that takes its time to stop."""
    log = tmp_path / "engine.log"
    script = textwrap.dedent(f"""\
        import sys
        from packager.cli import run
        from packager.serving import server
        server.vllm_command = lambda spec, *, host, port: [
            sys.executable, "-c", {ENGINE!r}, str(port), {mode!r}]
        sys.exit(run(["serve", {str(NANO)!r}, "--port", "{free_port()}", "--log", {str(log)!r}, "--json",
                      "--host", "0.0.0.0"]))
        """)
    owner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    if mode == "hangs":
        while not log.exists() or "child" not in log.read_text():
            time.sleep(0.05)
    else:
        assert json.loads(owner.stdout.readline())["kind"] == "server"
    for signum in signals:
        owner.send_signal(signum)
        time.sleep(1.0)
    if not signals:  # the engine dies later
        [child] = [
            p for p in psutil.Process(owner.pid).children(recursive=True) if ENGINE in p.cmdline()[2:3]
        ]
        child.terminate()
    _, errors = owner.communicate(timeout=60)
    assert owner.returncode == code, errors
    assert says in errors
    assert "warning: whoever reaches 0.0.0.0" in errors
    assert not alive(log)


@pytest.mark.parametrize("role", ["model", "draft"])
def test_what_is_no_checkpoint_is_refused(role: str, tmp_path: Path) -> None:
    spec = ServeSpec(NANO, draft=tmp_path) if role == "draft" else ServeSpec(tmp_path)
    with pytest.raises(BadInput, match=f"the {role} .* has no config.json"):
        Server(spec, tmp_path / "log").start()


def test_print_command_starts_nothing() -> None:
    done = CliRunner().invoke(serve, [str(NANO), "--port", "9999", "--print-command"])
    assert done.exit_code == 0, done.output
    arguments = shlex.split(done.stdout)
    assert arguments[arguments.index("--port") + 1] == "9999"


def test_serving_nothing_is_bad_input(tmp_path: Path) -> None:
    assert isinstance(CliRunner().invoke(serve, [str(tmp_path)]).exception, BadInput)
    assert isinstance(CliRunner().invoke(serve, [str(tmp_path / "none")]).exception, BadInput)


# --- the real engine ----------------------------------------------------------------------------------------


def ask(url: str, model: str, question: str) -> dict[str, Any]:
    """One greedy chat completion with log-probabilities."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 24,
        "logprobs": True,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer: dict[str, Any] = json.load(reply)
        return answer


def logprobs(answer: dict[str, Any]) -> list[tuple[str, float]]:
    """Token and log-probability of each token of an answer."""
    return [(token["token"], token["logprob"]) for token in answer["choices"][0]["logprobs"]["content"]]


@contextmanager
def served(directory: Path, cache: Path, *options: str) -> Iterator[dict[str, Any]]:
    """What `packager serve` announces, while it serves; then a clean end, and nothing left behind."""
    command = [
        *PACKAGER,
        "serve",
        str(directory),
        "--port",
        str(free_port()),
        "--json",
        "--cache",
        str(cache),
    ]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        family = psutil.Process(process.pid).children(recursive=True)
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.rstrip().endswith("stopping")
    native = fp8_runs_here()[0]
    assert not native or "AMX" not in errors
    _, left = psutil.wait_procs(family, timeout=10)
    assert not left


@pytest.mark.engine
@pytest.mark.slow
def test_an_fp8_bundle_is_served_at_both_lengths_until_interrupted(tmp_path: Path) -> None:
    """As trained it answers like the checkpoint that was never extended; extended it reads on behind that.

    FP8 weights, native or dequantized as the processor asks, and dequantized once for both.
    """
    from packager.quantize import quantize
    from packager.recipe import QuantizeSpec

    plain, bundle, cache = tmp_path / "fp8", tmp_path / "bundle", tmp_path / "cache"
    quantize(NANO, plain, QuantizeSpec(), recipe_digest="sha256:test", progress=lambda _: None)
    extend(plain, bundle, ContextSpec(length=2048), recipe_digest="sha256:test")
    (bundle / "manifest.json").unlink()  # as a bundle, whose own seal covers more than a checkpoint
    write_bundle(bundle, draft=None, contexts=CONTEXTS, default_context="extended")
    (bundle / "README.md").write_text("# A card\n")
    assert is_fp8(bundle)
    native = fp8_runs_here()[0]
    question = "Weight 57 kg. Order: amoxicillin 25 mg/kg. What is the dose?"

    with served(bundle, cache, "--context", "native") as found:
        assert found["profile"] in SERVE_FILE["profiles"]
        assert found["weights_served"] == ("native" if native else "dequantized")
        assert (found["context"], found["max_model_len"]) == ("native", 512)
        assert (cache / "dequantized").exists() is not native
        trained = logprobs(ask(found["url"], "nano", question))
        with pytest.raises(urllib.error.HTTPError):
            ask(found["url"], "nano", "dose " * 600)
    with served(bundle, cache) as found:
        assert (found["context"], found["max_model_len"]) == ("extended", 2048)
        extended = logprobs(ask(found["url"], "nano", question))
        talk = CliRunner().invoke(chat, ["--url", found["url"], "--once", question, "--json"])
        [answer] = json.loads(talk.stdout)["answers"]
        assert answer["answer"].startswith("".join(token for token, _ in extended[:-1]))
        assert answer["prompt_tokens"] + answer["completion_tokens"] < 2048
        assert json.loads(talk.stdout)["max_model_len"] == 2048
        assert ask(found["url"], "nano", "dose " * 600)["usage"]["prompt_tokens"] > 600
    assert native or len(list((cache / "dequantized").iterdir())) == 1
    with served(plain, cache) as found:
        assert logprobs(ask(found["url"], found["model"], question)) == trained
    assert len(trained) > 10
    assert extended != trained, "YaRN changes short contexts too"


@pytest.mark.engine
def test_an_engine_that_dies_at_start_gives_one_clear_message(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in NANO.iterdir():
        if file.name != "config.json":
            os.link(file, broken / file.name)
    config = json.loads((NANO / "config.json").read_text())
    config["head_dim"] *= 2  # the weights no longer fit
    (broken / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [*PACKAGER, "serve", str(broken), "--port", str(free_port()), "--cache", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 6, done.stderr
    assert "error: the engine died with exit code" in done.stderr
    assert "Error: " in done.stderr.split("error: the engine died")[1].splitlines()[0]
    assert "what to do: The whole log is" in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr.split("\n  | ")[0]
