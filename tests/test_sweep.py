"""What a sweep concludes, what its prompts are made of, and power: without a server."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest

from packager.cli import throughput_sweep
from packager.errors import UsageProblem
from packager.nano import CHECKPOINT, language
from validation.environment import collect_environment
from validation.errors import MeasurementError
from validation.power import PowerMeter
from validation.sweep_model import (
    Failure,
    Limits,
    Sweep,
    Variant,
    all_ratios,
    conclude_cell,
    paired_ratio,
    ran_out_of_memory,
)
from validation.sweep_prompts import PromptMaker
from validation.tasks import items_from
from validation.throughput import Cell, Spread

CANDIDATE = Variant(name="moe", role="candidate", subject="a", devices=2)
PLAIN = Variant(name="moe without draft", role="candidate without draft", subject="b")
BASE = Variant(name="dense", role="baseline", subject="c")


def cell(speed: float, ttft: tuple[float, ...] = (10, 10), e2el: tuple[float, ...] = (60, 110)) -> Cell:
    """Two answers of 1 and 11 tokens."""
    times = Spread(median=20, mean=20, p90=21, p95=22, p99=25)
    return Cell(
        concurrency=4,
        requests=2,
        completed=2,
        failed=0,
        input_tokens=200,
        output_tokens=12,
        duration_s=0.5,
        output_tokens_per_s=speed,
        total_tokens_per_s=speed,
        ttft_ms=times,
        tpot_ms=times,
        itl_ms=times,
        e2el_ms=times,
        acceptance=None,
        output_lengths=(1, 11),
        request_ttft_ms=ttft,
        request_e2el_ms=e2el,
    )


def test_a_ratio_is_of_pairs_and_its_interval_is_students_on_their_logarithms() -> None:
    # Ten times slower in the second repeat, both of them: that drift is not in the ratio's interval.
    one = conclude_cell(CANDIDATE, 4, 100, 32, [cell(300), cell(33), cell(290)])
    other = conclude_cell(BASE, 4, 100, 32, [cell(100), cell(10), cell(100)])
    ratio = paired_ratio(one, other)
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    logs = [math.log(3), math.log(3.3), math.log(2.9)]
    mean = sum(logs) / 3
    half = 4.302653 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2) / math.sqrt(3)
    assert ratio.ratio == pytest.approx(math.exp(mean))
    assert (ratio.low, ratio.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)), rel=1e-5)
    alone = paired_ratio(
        conclude_cell(CANDIDATE, 4, 100, 32, [cell(300)]), conclude_cell(BASE, 4, 100, 32, [cell(100)])
    )
    assert alone is not None and (alone.low, alone.high, alone.repeats) == (None, None, 1)
    assert (one.per_device and one.per_device.median) == 145 and (one.per_user and one.per_user.median) == 50
    assert (one.prompt_tokens, one.answer_tokens) == (100, 6)


def test_nothing_is_concluded_from_a_cell_that_failed() -> None:
    failure = Failure(kind="stalled", message="no token for 9 s")
    broken = conclude_cell(CANDIDATE, 4, 100, 32, [cell(300), cell(33)], failure=failure)
    plain, base = (conclude_cell(v, 4, 100, 32, [cell(50), cell(60)]) for v in (PLAIN, BASE))
    assert broken.output_tokens_per_s is None and broken.repeats and not broken.measured
    pairs = [(r.candidate, r.baseline) for r in all_ratios((CANDIDATE, PLAIN, BASE), (broken, plain, base))]
    assert pairs == [("moe without draft", "dense")]
    whole = conclude_cell(CANDIDATE, 4, 100, 32, [cell(300), cell(33)])
    pairs = [(r.candidate, r.baseline) for r in all_ratios((CANDIDATE, PLAIN, BASE), (whole, plain, base))]
    assert pairs == [("moe", "dense"), ("moe", "moe without draft"), ("moe without draft", "dense")]


def test_a_request_is_good_if_it_keeps_every_limit() -> None:
    # TPOT: none of a single token, 10 ms of the other.
    assert [Limits(tpot_ms=t).good(cell(1)) for t in (9.9, 10)] == [1, 2]
    assert Limits(ttft_ms=9).good(cell(1)) == 0
    assert Limits(tpot_ms=10, e2el_ms=100).good(cell(1)) == 1
    assert Limits().good(cell(1)) is None and Limits(tpot_ms=1).good(cell(1, (), ())) is None
    found = conclude_cell(BASE, 4, 100, 32, [cell(1)], Limits(tpot_ms=9.9)).goodput
    assert found is not None and found.median == 2.0  # one in half a second
    assert throughput_sweep.limits_of("ttft:500, tpot:20") == Limits(ttft_ms=500, tpot_ms=20)
    for wrong in ("ttft", "itl:4", "tpot:0", "tpot:1,tpot:2"):
        with pytest.raises(UsageProblem, match="--goodput"):
            throughput_sweep.limits_of(wrong)


def test_prompts_are_whole_questions_of_about_the_wanted_length(tmp_path: Path) -> None:
    items = items_from(language.heldout_items(6, 3))
    maker = PromptMaker(items, CHECKPOINT)
    texts = [item.messages[-1].content for item in items]
    assert maker.texts == texts
    short = maker.prompts(24, 8, 1, 0)
    assert set(short) <= set(texts) and len(set(short)) == 8  # enough of them are that long by themselves
    long = maker.prompts(200, 8, 1, 0)
    assert all(195 <= maker.count(text) <= 205 for text in long)
    assert all(any(text.endswith(question) for question in texts) for text in long)
    assert long == PromptMaker(items, CHECKPOINT).prompts(200, 8, 1, 0)
    assert not set(long) & set(maker.prompts(200, 8, 1, 1))  # another repeat, other prompts
    tiny = maker.prompts(5, 4, 1, 0)
    assert all(3 <= maker.count(text) <= 7 for text in tiny)
    with pytest.raises(MeasurementError, match=r"tokenizer\.json"):
        PromptMaker(items, tmp_path)


def test_power_is_what_the_driver_says_and_nothing_is_not_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PowerMeter(powercap=tmp_path, nvidia_smi="no-such-program") as meter:
        pass
    assert meter.power is None
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (tmp_path / "intel-rapl:0:0").mkdir()  # the cores within: part of the package
    for name, value in (("name", "package-0"), ("energy_uj", "900000"), ("max_energy_range_uj", "1000000")):
        (zone / name).write_text(value)
    with PowerMeter(powercap=tmp_path, nvidia_smi="no-such-program") as meter:
        (zone / "energy_uj").write_text("400000")  # the counter wrapped around: half a joule
    assert meter.power is not None and meter.power.of == "1 processor, RAPL"
    assert meter.power.watts > 0.1
    program = tmp_path / "nvidia-smi"
    says = "0, 300.5\n1, 99.5\n2, [N/A]"
    program.write_text(f"#!{sys.executable}\nimport time\nprint({says!r}, flush=True)\ntime.sleep(60)\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    meter = PowerMeter(powercap=tmp_path)
    with meter:
        deadline = time.monotonic() + 10
        while len(meter._samples) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)  # the samples come from another process
    assert meter.power is not None
    assert (meter.power.watts, meter.power.of) == (400.0, "2 GPUs, nvidia-smi")


def test_logs_that_speak_of_memory_are_told_from_others() -> None:
    for line in (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: [enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: Free memory on device (9/79 GiB) is less than desired GPU memory utilization (0.9)",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ):
        assert ran_out_of_memory(line), line
    assert not ran_out_of_memory("INFO: GPU KV cache size: 17,000 tokens; memory profiling took 2 s")


def test_tables_are_eighty_columns_wide_and_mark_what_is_not_real(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    dummy = CANDIDATE.model_copy(update={"weights": "dummy", "acceptance": "synthetic"})
    many = [
        conclude_cell(v, 512, 131072, 1024, [cell(12345.6).model_copy(update={"power_w": 700.0,
                      "reported_acceptance_length": 3.25})] * 3, Limits(ttft_ms=500))
        for v in (dummy, PLAIN, BASE)
    ]  # fmt: skip
    failure = Failure(kind="out of memory", message="MemoryError", log_tail=("last words",))
    many.append(conclude_cell(BASE, 1024, 131072, 1024, [], failure=failure))
    variants = (dummy, PLAIN, BASE)
    sweep = Sweep(
        residency="together",
        repeats=3,
        lengths="matched",
        prefix_caching="off",
        variants=variants,
        cells=tuple(many),
        ratios=all_ratios(variants, many),
        limits=Limits(ttft_ms=500),
        prompts_digest="sha256:0",
        environment=collect_environment(),
        marks=tuple(v.mark for v in variants if v.mark),
    )
    throughput_sweep.show(sweep)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "NOT REAL: moe: dummy weights, synthetic acceptance" in said
    assert "out of memory" in said and "…" not in said.replace("N,N,…", "")
    error = throughput_sweep.failed(sweep)
    assert error is not None and error.exit_code == 6
    assert "dense, 1 cell: out of memory: MemoryError\n  | last words" in error.message
    assert Sweep.model_validate_json(json.dumps(sweep.model_dump(mode="json"))) == sweep
