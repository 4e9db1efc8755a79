"""The interleaved sweep on real processes: real `vllm bench serve`, servers that behave and that do not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loopback_engine
import numpy as np
import pytest
from safetensors.numpy import save_file

from packager.cli import run
from packager.nano import CHECKPOINT, language
from packager.release.sweep_variants import own_variant
from packager.serving import Server, ServeSpec, server
from validation.bench_client import BenchClient
from validation.endpoint import Target
from validation.sweep import Plan, ServedVariant, measure_sweep, running_variant
from validation.sweep_model import Failure, Limits, Sweep
from validation.tasks import items_from
from validation.throughput_cell import run_cell

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench() -> Iterator[BenchClient]:
    """vLLM's benchmark, imported once."""
    with BenchClient() as client:
        client.warm()
        yield client


class Bed:
    """Variants served by `loopback_engine`, and what was asked of them."""

    def __init__(self, folder: Path, bench: BenchClient) -> None:
        self.folder, self.bench = folder, bench
        self.options: dict[str, list[str]] = {}

    def variant(self, name: str, role: Any = "baseline", *options: str) -> ServedVariant:
        model = self.folder / name
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text("{}")
        self.options[name] = list(options)
        return own_variant(
            name,
            role,
            ServeSpec(model),
            subject=f"sha256:{name}",
            tokenizer=CHECKPOINT,
            log=self.folder / f"{name}.log",
            startup_timeout_s=20,
        )

    def sweep(self, *served: ServedVariant, **plan: Any) -> Sweep:
        grid = {"concurrency": (1, 2), "input_tokens": (40,), "output_tokens": (6,), "repeats": 2}
        return measure_sweep(
            served,
            items_from(language.heldout_items(6, 3)),
            Plan(**(grid | {"requests": 4} | plan)),
            cache=self.folder / "cache",
            bench=self.bench,
        )

    def starts(self) -> list[str]:
        lines = (self.folder / "starts.jsonl").read_text().splitlines()
        return [json.loads(line)["model"] for line in lines]

    def asked(self, name: str) -> list[dict[str, Any]]:
        """Requests of cells, without those of the warm-up."""
        lines = (self.folder / name / "asked.jsonl").read_text().splitlines()
        return [row for line in lines if (row := json.loads(line))["measured"]]


@pytest.fixture
def bed(tmp_path: Path, bench: BenchClient, monkeypatch: pytest.MonkeyPatch) -> Bed:
    found = Bed(tmp_path, bench)

    def command(spec: ServeSpec, *, host: str, port: int) -> list[str]:
        options = found.options[spec.model.name]
        return [sys.executable, loopback_engine.__file__, host, str(port), str(spec.model), *options]

    monkeypatch.setattr(server, "vllm_command", command)
    return found


def test_variants_take_turns_share_prompts_and_give_as_many_tokens(bed: Bed) -> None:
    one = bed.variant("moe", "candidate", "--draft", "--token-ms", "2")
    two = bed.variant("dense", "baseline", "--token-ms", "8")
    sweep = bed.sweep(one, two, limits=Limits(tpot_ms=5), repeats=3)
    assert bed.starts() == ["moe", "dense"]  # each once: they are up together
    mine, other = bed.asked("moe"), bed.asked("dense")
    assert len(mine) == 2 * 3 * 4
    assert [r["prompt"] for r in mine] != sorted(r["prompt"] for r in mine)
    by_prompt = {r["prompt"]: r["given"] for r in mine}
    assert len(by_prompt) == len(mine)  # no prompt twice
    assert {r["prompt"]: r["given"] for r in other} == by_prompt
    assert {min(6, r["given"]) for r in mine} != {6}  # some answers end by themselves
    cell, base = (sweep.at(name, 2, 40, 6) for name in ("moe", "dense"))
    assert cell is not None and base is not None and cell.goodput is not None and base.goodput is not None
    assert cell.goodput.median > 0 == base.goodput.high
    assert cell.acceptance_length is not None and cell.acceptance_length.median == pytest.approx(3)
    assert base.acceptance_length is None
    assert cell.prompt_tokens == pytest.approx(sum(len(r["prompt"].split()) + 4 for r in mine) / 24, rel=0.2)
    ratios = {(r.concurrency, r.baseline): r for r in sweep.ratios}
    assert set(ratios) == {(1, "dense"), (2, "dense")}
    for ratio in ratios.values():
        assert ratio.low is not None and ratio.high is not None
        assert ratio.low < ratio.ratio < ratio.high and ratio.ratio > 1 and ratio.repeats == 3
    assert sweep.prefix_caching == "off" and sweep.lengths == "matched"
    # Once more: nothing is asked, nothing is started, and the document is the same.
    assert bed.sweep(one, two, limits=Limits(tpot_ms=5), repeats=3) == sweep
    assert len(bed.starts()) == 2
    # Other limits are another reading of the same cells.
    assert bed.sweep(one, two, limits=Limits(tpot_ms=50), repeats=3).cells[1].goodput != base.goodput
    assert len(bed.starts()) == 2


def only(sweep: Sweep, name: str) -> Failure:
    """The failure that all cells of a variant share."""
    found = [cell.failure for cell in sweep.cells if cell.variant == name]
    assert all(found) and not any(cell.variant == name and cell.output_tokens_per_s for cell in sweep.cells)
    first = found[0]
    assert first is not None
    return first


@pytest.mark.parametrize(
    ("fault", "kind", "says", "in_log"),
    [
        ("start", "will not start", "RuntimeError: the weights are of another shape", "another shape"),
        ("memory-start", "out of memory", "OutOfMemoryError: CUDA out of memory", "Tried to allocate"),
        ("memory", "out of memory", "MemoryError: cannot allocate 64.00 GiB", "64.00 GiB"),
        ("killed", "out of memory", "SIGKILL", ""),
        ("silent", "stalled", "no token came for 2 s", ""),
        ("stuck", "stalled", "no token for", ""),
        ("other", "other model", "serves 'another', not 'model'", ""),
        ("refuse", "requests failed", "4 of 4 requests failed", ""),
    ],
)
def test_a_server_that_fails_is_named_and_the_others_go_on(
    bed: Bed, fault: str, kind: str, says: str, in_log: str
) -> None:
    served = [
        bed.variant("moe", "candidate"),
        bed.variant("bad", "candidate without draft", "--fault", fault),
        bed.variant("dense", "baseline"),
    ]
    # Ending a benchmark that hangs costs its next start.
    plan: dict[str, Any] = {"stall_s": 2, "output_tokens": (12,), "repeats": 1}
    plan["concurrency"] = (1,) if fault == "stuck" else (1, 2)
    sweep = bed.sweep(*served, **plan)
    failure = only(sweep, "bad")
    assert (failure.kind, says in failure.message) == (kind, True), failure
    assert in_log in "\n".join(failure.log_tail)
    assert {(r.candidate, r.baseline, r.concurrency) for r in sweep.ratios} == {
        ("moe", "dense", concurrency) for concurrency in plan["concurrency"]
    }
    # Once that is mended, its cells alone are measured.
    before, starts = len(bed.asked("moe")), bed.starts()
    served[1] = bed.variant("bad", "candidate without draft")
    again = bed.sweep(*served, **plan)
    assert not again.failures and len(again.ratios) == 3 * len(plan["concurrency"])
    assert len(bed.asked("moe")) == before and bed.starts() == [*starts, "bad"]


def test_alternating_servers_are_never_up_together_and_the_first_variant_that_works_leads(bed: Bed) -> None:
    served = [bed.variant("moe", "candidate", "--fault", "start"), bed.variant("one"), bed.variant("two")]
    sweep = bed.sweep(*served, residency="alternate")
    assert bed.starts() == ["moe", "one", "two", "one", "two"]
    assert only(sweep, "moe").kind == "will not start"
    given = [{r["prompt"]: r["given"] for r in bed.asked(name)} for name in ("one", "two")]
    assert given[0] == given[1] and len(set(given[0].values())) > 1
    assert not sweep.ratios  # two baselines, no candidate


def test_an_sglang_server_that_runs_already_is_measured_by_its_own_words(bed: Bed) -> None:
    served = [bed.variant("forgets", "other", "--engine", "sglang", "--draft")]
    served += [bed.variant("keeps", "other", "--engine", "sglang", "--draft", "--keeps-average")]
    served += [bed.variant("plain", "other", "--engine", "sglang")]
    servers = [one.serve() for one in served]
    try:
        running = []
        for one, server_ in zip(served, servers, strict=True):
            target: Target = server_.__enter__().target
            running.append(running_variant(one.variant.name, "other", target, CHECKPOINT))
        assert {(r.variant.engine, r.variant.engine_version) for r in running} == {("sglang", "0.5.23")}
        sweep = bed.sweep(*running, repeats=1)
        gone = running_variant(
            "gone", "other", Target("http://127.0.0.1:9", "model", "s", "s", bed.folder), CHECKPOINT
        )
        failed = only(bed.sweep(gone), "gone")
    finally:
        for server_ in servers:
            server_.__exit__(None, None, None)
    lengths = {c.variant: c.acceptance_length and c.acceptance_length.median for c in sweep.cells}
    # Its average since the flush; the gauge where the average cannot be told from what was before.
    assert lengths == {"forgets": 3.0, "keeps": 2.75, "plain": None}
    assert [v.acceptance for v in sweep.variants] == ["measured", "measured", None]
    assert sweep.prefix_caching == "as served"
    assert (gone.variant.engine, failed.kind) == ("unknown", "will not start")
    assert "nothing answers at http://127.0.0.1:9" in failed.message


def test_goodput_is_counted_as_the_benchmark_counts_it(bed: Bed) -> None:
    variant = bed.variant("moe", "candidate", "--token-ms", "4")
    limits = Limits(ttft_ms=40, tpot_ms=8)
    said: list[float] = []

    class Asking:
        def run(self, arguments: list[str], **more: Any) -> None:
            bed.bench.run([*arguments, "--goodput", "ttft:40", "tpot:8"], **more)
            result = json.loads((bed.folder / "cell.raw.json").read_bytes())
            said.append(result["request_goodput"] * result["duration"])

    with variant.serve() as serving:
        cell = run_cell(
            serving.target,
            CHECKPOINT,
            [[{"role": "user", "content": f"question {k} {'x' * k}"}] for k in range(24)],
            [6] * 24,
            exact=False,
            concurrency=8,
            warmups=0,
            seed=0,
            files=bed.folder / "cell.json",
            bench=Asking(),  # type: ignore[arg-type]
            timeout_s=60,
        )
    good = limits.good(cell)
    assert good == pytest.approx(said[0]) and good is not None
    assert cell.e2el_ms is not None and cell.e2el_ms.p95 is not None
    assert cell.e2el_ms.median <= cell.e2el_ms.p95 <= cell.e2el_ms.p99 <= max(cell.request_e2el_ms)


def test_the_command_writes_everything_and_exits_6_if_a_variant_failed(
    bed: Bed, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [bed.variant(name).variant.name for name in ("moe", "dense")]
    for name in folders:
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(CHECKPOINT / file, bed.folder / name / file)
        save_file({"w": np.zeros(2, np.float32)}, bed.folder / name / "model.safetensors")
    items = bed.folder / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in language.heldout_items(2)))
    out = bed.folder / "sweep.json"
    line = ["validate", "throughput", "--items", str(items), "--cache", str(bed.folder / "cache")]
    line += ["--serve", str(bed.folder / "moe"), "--baseline-serve", str(bed.folder / "dense")]
    line += ["--input-tokens", "40", "--output-tokens", "6", "--concurrency", "1", "--requests", "2"]
    line += ["--repeats", "1", "--out", str(out), "--residency", "together"]
    bed.options["dense"] = ["--fault", "memory-start"]
    assert run(line) == 6
    said = capsys.readouterr()
    assert "1 of 2 cells were not measured\nbaseline, 1 cell: out of memory: the engine died" in said.err
    assert "  | torch.OutOfMemoryError: CUDA out of memory" in said.err and "Traceback" not in said.err
    assert "candidate (vllm" in said.out and "40 in, 6 out, 1 at once: out of memory" in said.out
    first = Sweep.model_validate_json(out.read_bytes())
    assert [c.measured for c in first.cells] == [True, False] and not first.ratios
    assert str(bed.folder) not in " ".join(first.variants[0].command)
    bed.options["dense"] = []
    page = bed.folder / "page"
    assert run([*line, "--json", "--report", str(page)]) == 0
    again = json.loads(capsys.readouterr().out)["sweep"]
    assert again["hardware"]["key"] == "here" and again["hardware"]["card"]["bandwidth_tb_s"] > 0
    assert "Throughput over interactivity" in (page / "report.html").read_text(encoding="utf-8")
    assert {path.name.split("-")[0] for path in page.glob("*.svg")} == {"interactivity", "ratio"}
    assert Sweep.model_validate(again).cells[0] == first.cells[0] and len(again["ratios"]) == 1
    assert run([*line, "--plot"]) == 0
    assert "Throughput over interactivity" in capsys.readouterr().out
    assert bed.starts() == ["moe", "dense", "dense"]


@pytest.mark.engine
def test_a_sweep_that_was_killed_goes_on_without_repeating_a_cell(tmp_path: Path) -> None:
    """The nano on a real server, as candidate and as baseline, through the command itself."""
    items = tmp_path / "items.jsonl"
    items.write_text("".join(json.dumps(row) + "\n" for row in language.heldout_items(4)))
    cache, out = tmp_path / "cache", tmp_path / "sweep.json"
    cells = 2 * 2 * 2

    def finished() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in cache.glob("sweep-*.json") if p.name.count(".") == 1}

    with Server(ServeSpec(CHECKPOINT), tmp_path / "server.log") as real:
        line = [sys.executable, "-m", "packager", "validate", "throughput", "--items", str(items)]
        line += ["--url", real.url, "--subject", "a", "--tokenizer", str(CHECKPOINT)]
        line += [
            "--baseline-url",
            real.url,
            "--baseline-subject",
            "b",
            "--baseline-tokenizer",
            str(CHECKPOINT),
        ]
        line += ["--input-tokens", "48", "--output-tokens", "24", "--concurrency", "1,2", "--repeats", "2"]
        line += ["--requests", "6", "--cache", str(cache), "--out", str(out)]
        root = Path(__file__).parents[1]
        with subprocess.Popen(line, cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as killed:
            while len(finished()) < 3 and killed.poll() is None:
                time.sleep(0.01)
            killed.kill()
        kept = finished()
        assert 3 <= len(kept) < cells and not out.exists()
        resumed = subprocess.run(line, cwd=root, capture_output=True, text=True, check=True)
    assert resumed.stderr.count("repeat ") == cells - len(kept)
    assert {name: at for name, at in finished().items() if name in kept} == kept
    sweep = Sweep.model_validate_json(out.read_bytes())
    assert len(finished()) == cells and not sweep.failures
    assert {(v.engine, v.engine_version) for v in sweep.variants} == {("vllm", metadata_version())}
    assert [(r.concurrency, r.repeats) for r in sweep.ratios] == [(1, 2), (2, 2)]
    one, other = sweep.cells[:2]
    for mine, its in zip(one.repeats, other.repeats, strict=True):
        assert mine.output_lengths == its.output_lengths and mine.input_tokens == its.input_tokens


def metadata_version() -> str:
    """Of the vLLM that is installed, as its server says it."""
    from vllm import __version__

    return str(__version__)
