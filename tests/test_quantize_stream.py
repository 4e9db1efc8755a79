"""The stream: one result for any number of workers and either kernel, a ledger of every weight, a gate."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint
from quantizing import EVERY_SCHEME, SCHEMES, contents, run

from packager.artifact import is_sealed, read_manifest
from packager.checkpoint import Checkpoint
from packager.cli import run as run_command
from packager.errors import GateFailed, UsageProblem
from packager.quantize import compiled, diff, quantize
from packager.quantize.fidelity import LEDGER_NAME, Figures, LedgerEntry, by_layer, require_snr
from packager.quantize.kernel import Kernel, choose_kernel
from packager.quantize.schemes import scheme_of
from packager.quantize.stream import PIECE_BYTES
from packager.recipe import QuantizeSpec, SchemeName


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LEDGER_NAME).read_text().splitlines()]


# ---- one result -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", [SCHEMES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SCHEMES[1:])]
)
def test_any_number_of_workers_gives_the_same_bytes(
    scheme: SchemeName, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    # Some weights are cut into several pieces, and edges are not whole blocks where they need not be.
    odd = {"hidden_size": 200, "intermediate_size": 24_000}
    whole = {"hidden_size": 256, "intermediate_size": 19_200}
    source = make_checkpoint(shards=2, **(whole if scheme == "int4-g128" else odd))
    assert max(i.nbytes for i in Checkpoint.open(source).tensors.values()) > PIECE_BYTES
    spec = QuantizeSpec(shard_bytes=3_000_000, scheme=scheme)
    first = run(source, tmp_path / "1", spec, workers=1)
    for workers in (2, 5):
        assert run(source, tmp_path / str(workers), spec, workers=workers) == first
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "1")
    assert first.inputs == {"source": Checkpoint.open(source).digest()}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_float_types_are_read_too(make_checkpoint: MakeCheckpoint, tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    save_file({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}, source / "model.safetensors")
    run(source, tmp_path / "out")
    assert min(row["snr_db"] for row in ledger(tmp_path / "out")) > 31
    assert diff(source, tmp_path / "out").roles["routed_expert"]["worst_snr_db"] > 31


BY_CHANNEL: list[SchemeName] = ["w8a8", "fp8-channel"]
COMPILED = """
import json, os, sys
from pathlib import Path
from packager.quantize import quantize
from packager.recipe import QuantizeSpec
lines = []
spec = QuantizeSpec(shard_bytes=3_000_000, scheme=sys.argv[3], scale_rounding=sys.argv[4])
quantize(Path(sys.argv[1]), Path(sys.argv[2]), spec, recipe_digest="x", progress=lines.append, workers=3,
         kernel="compiled")
print(json.dumps({"lines": lines, "modules": sorted(sys.modules)}))
"""


def compiled_elsewhere(source: Path, out: Path, spec: QuantizeSpec) -> dict[str, list[str]]:
    """What a process that was told to use the compiled kernel said, and what it had imported."""
    command = [sys.executable, "-c", COMPILED, source, out, spec.scheme, spec.scale_rounding]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    result: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("spec", EVERY_SCHEME, ids=lambda spec: f"{spec.scheme}-{spec.scale_rounding}")
def test_the_compiled_kernel_gives_the_same_bytes_and_is_made_once(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: QuantizeSpec
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # 4000 is no multiple of 128: blocks are cut at its edge.
    width = 3968 if spec.scheme == "int4-g128" else 4000
    source = make_checkpoint(
        hidden_size=640, intermediate_size=width, moe_intermediate_size=384, num_experts=8
    )
    spec = spec.model_copy(update={"shard_bytes": 3_000_000})
    quantize(source, tmp_path / "eager", spec, recipe_digest="x", progress=lambda _: None, kernel="eager")
    first = compiled_elsewhere(source, tmp_path / "first", spec)
    if not any("kernel: compiled" in line for line in first["lines"]):
        pytest.skip(f"no compiled kernel here: {first['lines']}")
    assert contents(tmp_path / "first") == contents(tmp_path / "eager")
    made = list((tmp_path / "cache" / "moe-packager" / "kernels").iterdir())
    assert {file.suffix for file in made} == {".so", ".expected"} and len(made) == 2  # sizes are variables
    again = compiled_elsewhere(source, tmp_path / "again", spec)
    assert again["lines"][0] == "kernel: compiled by Inductor"
    assert "torch" not in again["modules"]
    assert contents(tmp_path / "again") == contents(tmp_path / "eager")


def kernel_for(spec: QuantizeSpec, lines: list[str]) -> Kernel:
    scheme = scheme_of(spec)
    return choose_kernel("compiled", scheme, dtypes=["bfloat16"], nbytes=10**12, progress=lines.append)


def test_without_a_compiler_the_definition_itself_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    lines: list[str] = []
    kernel = kernel_for(QuantizeSpec(), lines)
    assert lines[-1] == "kernel: eager PyTorch, op by op (no compiled one: no C++ compiler found)"
    slabs = kernel(np.ones((256, 128), ml_dtypes.bfloat16))
    assert slabs is not None
    assert np.concatenate([slab.scales for slab in slabs]).tolist() == [[2.0**-8], [2.0**-8]]


@pytest.mark.slow
def test_a_kept_library_is_used_by_many_threads_and_trusted_only_if_it_computes_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines: list[str] = []
    spec, other = (QuantizeSpec(scheme=name, scale_rounding="float32") for name in BY_CHANNEL)
    kernel = kernel_for(spec, lines)
    if lines[-1] != "kernel: compiled by Inductor":
        pytest.skip(f"no compiled kernel here: {lines}")
    random = np.random.default_rng(7)
    weights = [random.standard_normal((384, 640)).astype(ml_dtypes.bfloat16) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(kernel, weights * 25))
    for found, rows in zip(several, weights * 25, strict=True):
        wanted = kernel.scheme.slab(rows)
        assert found is not None and wanted is not None
        assert np.array_equal(np.concatenate([slab.codes for slab in found]), wanted.codes)
    # Half a library, then that of another scheme, under the name of one that was never compiled.
    own, wrong = (compiled.library_of(scheme_of(s), "bfloat16") for s in (spec, other))
    good = own.read_bytes()
    for data, reason in ((good[:99], f"{wrong}: "), (good, "not those of the definition")):
        wrong.write_bytes(data)
        wrong.with_suffix(".expected").write_text("0" * 64)
        lines.clear()
        assert kernel_for(other, lines).title == "eager PyTorch, op by op"
        assert reason in lines[-1]
        assert not wrong.exists()


# ---- memory ---------------------------------------------------------------------------------------------


def test_too_little_memory_is_said_before_the_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="too little memory for 2 workers"):
        run(tiny_checkpoint, tmp_path / "out", workers=2, max_memory=100_000_000)
    assert run(tiny_checkpoint, tmp_path / "out")


# VmHWM is of this program alone; ru_maxrss would count the parent's memory too.
PEAK = """
import re, sys
from pathlib import Path
from packager.cli import run
code = run(["quantize", sys.argv[1], sys.argv[2], "--max-memory", sys.argv[3], "--workers", "2", "--json"])
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
sys.exit(code)
"""


@pytest.mark.slow
def test_memory_is_kept_whatever_the_size_of_a_shard(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = make_checkpoint(hidden_size=1024, moe_intermediate_size=1024, num_experts=128)
    assert (source / "model.safetensors").stat().st_size > 800_000_000
    limit = 900_000_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out"), str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.splitlines()[-1]) <= limit


# ---- the ledger and its gate ----------------------------------------------------------------------------


def test_the_ledger_states_what_happened_to_each_weight(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from packager.quantize.quantized import WeightCheckpoint

    manifest = run(tiny_checkpoint, tmp_path / "out")
    rows = {row["name"]: row for row in ledger(tmp_path / "out")}
    a, b = WeightCheckpoint.open(tiny_checkpoint), WeightCheckpoint.open(tmp_path / "out")
    assert list(rows) == [name for name in a.checkpoint.tensors if b.is_quantized(name)]
    assert manifest.metrics["tensors"]["quantized"] == len(rows)
    with a.checkpoint.reader() as read_a, b.checkpoint.reader() as read_b:
        for name, row in rows.items():
            was = a.values(read_a, name).astype(np.float64)
            now = b.values(read_b, name).astype(np.float64)
            scales = read_b.array(b.scale(name))
            snr = 10 * math.log10((was**2).sum() / ((now - was) ** 2).sum())
            cosine = (was * now).sum() / math.sqrt((was**2).sum() * (now**2).sum())
            assert row["snr_db"] == pytest.approx(snr, abs=0.006)
            assert row["cosine"] == pytest.approx(cosine, abs=2e-6)
            assert (row["scale_min"], row["scale_max"]) == (scales.min(), scales.max())
            assert row["shape"] == list(was.shape)
            blocks = [
                (part, now[i : i + 128, j : j + 128])
                for i in range(0, was.shape[0], 128)
                for j in range(0, was.shape[1], 128)
                if (part := was[i : i + 128, j : j + 128]).any()
            ]
            worst = max(np.abs(now - was).max() / np.abs(was).max() for was, now in blocks)
            assert row["max_relative_error"] == pytest.approx(worst, abs=1e-6)
            assert (row["zero_blocks"], row["nonfinite"], row["saturated"]) == (0, 0, 0)
    layers = manifest.metrics["fidelity_by_layer"]
    assert list(layers) == ["0", "1"]
    assert sum(layer["tensors"] for layer in layers.values()) == len(rows)


def test_empty_blocks_are_counted_and_have_no_part_in_the_range_of_scales(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    half, none = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    tensors[half][:128] = 0
    tensors[none][:] = 0
    save_file(tensors, source / "model.safetensors")
    run(source, tmp_path / "out")
    rows = {row["name"]: row for row in ledger(tmp_path / "out")}
    assert rows[half]["zero_blocks"] == 1
    assert rows[half]["scale_max"] < 1
    assert rows[none]["zero_blocks"] == 2
    assert [rows[none][key] for key in ("snr_db", "cosine", "scale_min", "scale_max")] == [None] * 4


def test_weights_below_the_gate_leave_nothing_that_looks_finished(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(GateFailed, match=r"weights are below 31\.5 dB") as error:
        run(tiny_checkpoint, out, min_snr_db=31.5)
    assert error.value.exit_code == 4
    assert not is_sealed(out)
    assert not (out / "config.json").exists()
    low = {row["name"] for row in ledger(out) if row["snr_db"] < 31.5}
    assert 0 < len(low) < len(ledger(out))
    assert all(name in error.value.message for name in sorted(low)[:1] if len(low) <= 12)
    lines: list[str] = []
    lowered = run(tiny_checkpoint, out, min_snr_db=30.0, lines=lines)
    assert not any(line.startswith("kernel") for line in lines)  # nothing was converted again
    assert lowered == run(tiny_checkpoint, tmp_path / "direct")


def test_a_weight_halfway_between_two_codes_fails_the_default_gate(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = tensors[name].sign() * 1.0625 * 2**-6  # codes there are 1 and 1.125: 24.6 dB
    save_file(tensors, source / "model.safetensors")
    code = run_command(["quantize", str(source), str(tmp_path / "out")])
    shown = capsys.readouterr().err
    assert code == 4
    assert f"{name}: 24.61 dB" in shown
    assert "--min-snr-db" in shown
    assert not is_sealed(tmp_path / "out")


def test_figures_do_not_depend_on_how_the_weights_are_cut() -> None:

    weight = np.random.default_rng(3).standard_normal((512, 384)).astype(ml_dtypes.bfloat16)
    for scheme in map(scheme_of, EVERY_SCHEME):
        whole = scheme.slab(weight)
        halves = [scheme.slab(part) for part in (weight[:256], weight[256:])]
        assert whole is not None
        assert np.array_equal(np.concatenate([half.scales for half in halves if half]), whole.scales)
        parts = [half.figures for half in halves if half is not None]
        total = Figures.total(parts)
        assert replace(total, signal=0, error=0, cross=0) == replace(
            whole.figures, signal=0, error=0, cross=0
        )
        assert total.error == pytest.approx(whole.figures.error, rel=1e-12)


def test_layers_are_counted_in_their_order_and_weights_outside_of_them_left_out() -> None:
    figures = Figures(1.0, 1e-3, 0.0, 0.03, 0, 0, 1.0, 1.0)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (10, 2, 2)] + ["lm_head.weight"]
    entries = [LedgerEntry.of(name, "dense_mlp", (8, 8), figures) for name in names]
    assert {layer: row["tensors"] for layer, row in by_layer(entries).items()} == {"2": 2, "10": 1}
    assert list(by_layer(entries)) == ["2", "10"]
    require_snr(entries, 30.0)
    with pytest.raises(GateFailed):
        require_snr(entries, 30.01)


@pytest.mark.parametrize("size", ["1.5 TB", "much", "-1", "1e9"])
def test_a_size_that_is_none_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    options = ["--max-memory", size]
    assert run_command(["quantize", str(tiny_checkpoint), str(tmp_path / "out"), *options]) == 2
    assert "is no size" in capsys.readouterr().err


def test_the_options_reach_the_work(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = [
        "--workers",
        "1",
        "--max-memory",
        "16GiB",
        "--kernel",
        "eager",
        "--min-snr-db",
        "25",
        "--json",
    ]
    assert run_command(["quantize", str(tiny_checkpoint), str(out), *options]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["digest"] == read_manifest(out).digest
    assert "kernel: eager" in shown.err
