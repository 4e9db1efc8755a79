"""Throughput cells: kept, resumed, matched in length; and the whole measurement against real vLLM."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from validation.bench_client import BenchClient
from validation.endpoint import Message, Sampling, Target
from validation.errors import MeasurementError
from validation.identity import collect_outputs, compare_outputs
from validation.longcontext import measure_long
from validation.public_benchmarks.likelihood import continuation_scores
from validation.tasks import items_from, measure_accuracy
from validation.throughput import (
    ThroughputRun,
    compare_throughput,
    measure_decode_speed,
    measure_throughput,
)

# Stands in for vLLM's benchmark where only our side is tested: reads the data set and writes a result file
# with the fields of vLLM 0.32. It fails at a concurrency of 4 while the file `broken` exists.
STAND_IN = """
import json, pathlib
HERE = pathlib.Path(__file__).parent
def add_cli_args(parser):
    for name in ("backend base-url endpoint model served-model-name tokenizer dataset-name dataset-path "
                 "custom-output-len num-prompts max-concurrency num-warmups seed temperature "
                 "ready-check-timeout-sec percentile-metrics metric-percentiles result-dir result-filename").split():
        parser.add_argument("--" + name, required=True)
    for name in ("disable-shuffle disable-tqdm save-result save-detailed skip-chat-template "
                 "ignore-eos").split():
        parser.add_argument("--" + name, action="store_true")
def main(args):
    print("noise on standard output")
    level = int(args.max_concurrency)
    with (HERE / "calls").open("a") as log:
        log.write(f"{level} {args.ignore_eos}\\n")
    if level == 4 and (HERE / "broken").exists():
        raise RuntimeError("the server went away")
    rows = [json.loads(line) for line in open(args.dataset_path, encoding="utf-8")]
    # Without --ignore-eos answers end early, each at another length.
    longest = [r["output_tokens"] for r in rows]
    lens = longest if args.ignore_eos else [min(n, 5 + k) for k, n in enumerate(longest)]
    failed = 1 if (HERE / "failing").exists() else 0
    result = {"completed": len(rows) - failed, "failed": failed, "duration": 2.0, "output_lens": lens,
              "total_input_tokens": 7 * len(rows), "total_output_tokens": sum(lens),
              "output_throughput": sum(lens) / 2.0, "total_token_throughput": 99.0,
              "errors": ["", "Traceback: 500 Internal"]}
    for metric in ("ttft", "tpot", "itl"):
        result |= {f"{kind}_{metric}_ms": 1.0 for kind in ("mean", "median", "p99")}
    if (HERE / "drafting").exists():
        counts = {"num_drafts": 10, "draft_tokens": 30, "accepted_tokens": 16, "acceptance_length": 2.6}
        result |= {"spec_decode_" + name: value for name, value in counts.items()}
        result["spec_decode_per_position_acceptance_rates"] = [0.8, 0.5, 0.3]
    path = pathlib.Path(args.result_dir) / args.result_filename
    path.write_text(json.dumps(result))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package `vllm` that shadows the real one in the benchmark process."""
    folder = tmp_path / "stand_in"
    for package in ("vllm", "vllm/benchmarks", "vllm/utils"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "vllm/benchmarks/serve.py").write_text(STAND_IN)
    (folder / "vllm/utils/argparse_utils.py").write_text(
        "from argparse import ArgumentParser as FlexibleArgumentParser\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "vllm/benchmarks"


def sweep(tmp_path: Path, subject: str = "s", match: ThroughputRun | None = None) -> ThroughputRun:
    prompts = [[Message(role="user", content=f"question {k}")] for k in range(3)]
    return measure_throughput(
        Target("http://127.0.0.1:9", "model", subject, subject, tmp_path / "cache"),
        tokenizer=tmp_path,
        prompts=prompts,
        concurrency=(1, 4),
        output_tokens=20,
        match=match,
    )


def calls(stand_in: Path) -> list[str]:
    return (stand_in / "calls").read_text().splitlines()


def test_a_sweep_that_broke_goes_on_with_the_cell_that_is_missing(tmp_path: Path, stand_in: Path) -> None:
    (stand_in / "broken").touch()
    with pytest.raises(MeasurementError, match="RuntimeError: the server went away"):
        sweep(tmp_path)
    (stand_in / "broken").unlink()
    run = sweep(tmp_path)
    assert [c.concurrency for c in run.cells] == [1, 4]
    assert calls(stand_in) == ["1 False", "4 False", "4 False"]
    assert sweep(tmp_path) == run and len(calls(stand_in)) == 3
    # Other weights are measured anew.
    sweep(tmp_path, "t")
    assert len(calls(stand_in)) == 5


def test_a_matched_baseline_gives_each_answer_the_length_it_has_in_the_candidate(
    tmp_path: Path, stand_in: Path
) -> None:
    candidate = sweep(tmp_path, "moe")
    assert candidate.cells[0].output_lengths == (5, 6, 7)
    baseline = sweep(tmp_path, "dense", match=candidate)
    assert baseline.cells[0].output_lengths == (5, 6, 7)
    assert (baseline.lengths, baseline.matched_to) == ("matched", "moe")
    assert calls(stand_in)[-1] == "4 True"
    assert [(r.concurrency, r.ratio) for r in compare_throughput(baseline, candidate)] == [(1, 1.0), (4, 1.0)]


def test_acceptance_is_read_and_its_absence_is_not_zero(tmp_path: Path, stand_in: Path) -> None:
    assert sweep(tmp_path).cells[0].acceptance is None
    (stand_in / "drafting").touch()
    acceptance = sweep(tmp_path, "drafted").cells[0].acceptance
    assert acceptance is not None
    assert (acceptance.length, acceptance.per_position) == (2.6, (0.8, 0.5, 0.3))


def test_a_cell_with_failed_requests_is_an_error_and_is_not_kept(tmp_path: Path, stand_in: Path) -> None:
    (stand_in / "failing").touch()
    with pytest.raises(MeasurementError, match=r"1 of 3 requests failed at concurrency 1: .*500 Internal"):
        sweep(tmp_path)
    (stand_in / "failing").unlink()
    assert sweep(tmp_path).cells[0].failed == 0


def test_lengths_cannot_be_matched_to_other_prompts(tmp_path: Path, stand_in: Path) -> None:
    run = sweep(tmp_path)
    assert stand_in.exists()
    with pytest.raises(MeasurementError, match="other prompts"):
        sweep(tmp_path, match=run.model_copy(update={"prompts_digest": "sha256:0"}))


def test_an_interpreter_without_vllm_is_said_with_its_own_words(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    # -S: no site-packages, so no vLLM.
    bare.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S "$@"\n')
    bare.chmod(0o755)
    with BenchClient(python=str(bare)) as bench, pytest.raises(MeasurementError, match="No module named"):
        bench.run([], timeout_s=60)


def templated(messages: Sequence[Message]) -> str:
    """A conversation as the nano's chat template writes it, up to where the answer begins."""
    roles = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"}
    turns = "".join(f"<role>{roles[m.role]}</role>{m.content}<|role_end|>" for m in messages)
    return f"{turns}<role>ASSISTANT</role>"


@pytest.mark.engine
def test_a_real_server_is_measured_from_accuracy_to_throughput(tmp_path: Path) -> None:
    """The shipped nano model on vLLM: every figure a report needs, from one server."""
    from packager import nano
    from packager.nano.language import heldout_items, long_items
    from packager.serving import Server, ServeSpec

    model = Path(nano.__file__).parent / "checkpoint"
    if not (model / "model.safetensors").is_file():
        pytest.skip("the nano model's weights are not here")
    items = items_from(heldout_items(4, 3))
    cache = tmp_path / "cache"
    with Server(ServeSpec(model=model), log=tmp_path / "server.log") as server:
        target = Target(server.url, "model", "nano", "nano", cache)
        run = measure_accuracy(target, items)
        # How much it gets right is a claim about the nano, made elsewhere.
        assert run.overall.n == len(items)
        assert all(r.prompt_tokens > 0 and r.completion_tokens > 0 for r in run.results)
        one, eight = (
            collect_outputs(
                replace(target, subject=f"at {c}", label=str(c)),
                items,
                concurrency=c,
                sampling=Sampling(max_tokens=64),
            )
            for c in (1, 8)
        )
        result = compare_outputs(one, eight)
        # Another batch size, other sums: what differs at all starts at a near tie.
        assert result.identical_fraction >= 0.9 or result.all_near_ties
        assert result.noise is not None and result.noise.tokens > 100
        assert all(t.token.startswith("token_id:") for o in one.outputs for t in o.tokens)

        # Completions score a text as chat said it: the cut between prompt and answer is the right one.
        pairs = [(templated(item.messages), said.text) for item, said in zip(items, one.outputs, strict=True)]
        scored = continuation_scores(target, pairs)
        for said, found in zip(one.outputs, scored, strict=True):
            assert found.nats == pytest.approx(sum(t.logprob for t in said.tokens), abs=0.5), said
        assert sum(found.greedy for found in scored) >= 0.8 * len(scored)

        records = items_from([*long_items(1, 3), *long_items(2, 3)])
        long = measure_long(target, records, trained_length=512)
        # Twice the trained length does not fit: the server refuses, and that counts as not found.
        assert [s.refused for s in long.by_multiple] == [0, 3]

        system = [Message(role="system", content="Be brief."), *items[0].messages]
        with BenchClient() as bench:
            common: dict[str, Any] = {"tokenizer": model, "output_tokens": 48, "bench": bench}
            natural = measure_throughput(target, prompts=items[:8], concurrency=(1, 4), **common)
            matched = measure_throughput(
                replace(target, subject="again", label="again"),
                prompts=items[:8],
                concurrency=(1,),
                match=natural,
                **common,
            )
            turns = measure_throughput(
                replace(target, subject="turns", label="turns"),
                prompts=[system],
                concurrency=(1,),
                **common,
            )
        speed = measure_decode_speed(target, items[:4], repeats=2)
    assert [c.completed for c in natural.cells] == [8, 8]
    # vLLM's count of tokens is ours: the chat template of the benchmark is the server's.
    asked = {r.id: r.prompt_tokens for r in run.results}
    assert natural.cells[0].input_tokens == sum(asked[i.id] for i in items[:8])
    alone = tuple(min(48, len(o.tokens)) for o in one.outputs[:8])
    assert natural.cells[0].output_lengths == alone
    assert matched.cells[0].output_lengths == natural.cells[0].output_lengths
    assert natural.cells[0].acceptance is None
    assert turns.cells[0].input_tokens > 0 and turns.cells[0].output_tokens > 0
    assert speed.low <= speed.tokens_per_s <= speed.high
    kept = sorted(p.name for p in cache.glob("throughput-*.json") if ".raw" not in p.name)
    assert len(kept) == 4
    assert json.loads((cache / kept[0]).read_text())["completed"] in (1, 8)
