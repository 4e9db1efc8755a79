"""Block FP8: the arithmetic, both dialects, the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_CONFIG, MakeCheckpoint
from quantizing import contents, run

from packager.artifact import is_sealed, read_manifest
from packager.bailing.layout import Role
from packager.checkpoint import Checkpoint
from packager.errors import BadInput, IntegrityFailure, UsageProblem
from packager.quantize import dequantize, diff, relabel
from packager.quantize.dialects import Quantization, read_quantization
from packager.quantize.fidelity import LEDGER_NAME
from packager.quantize.plot import PLOT_NAME
from packager.quantize.quantized import WeightCheckpoint
from packager.recipe import QuantizeSpec


def weights(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every weight as float32, dequantized."""
    opened = WeightCheckpoint.open(path)
    with opened.checkpoint.reader() as reader:
        return {want.name: opened.values(reader, want.name) for want in opened.layout}


@pytest.fixture(scope="module")
def fp8(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fp8") / "out"
    run(tiny_checkpoint, out)
    return out


# ---- arithmetic -----------------------------------------------------------------------------------------


def test_each_code_is_the_nearest_e4m3_number_to_the_scaled_weight() -> None:
    import ml_dtypes

    from packager.quantize.schemes import scheme_of

    weight = np.random.default_rng(1).standard_normal((256, 384)).astype(ml_dtypes.bfloat16)
    slab = scheme_of(QuantizeSpec()).slab(weight)
    assert slab is not None
    scaled = weight.astype(np.float32) / np.kron(slab.scales, np.ones((128, 128), np.float32))
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)])
    right = np.clip(np.searchsorted(grid, scaled), 1, len(grid) - 1)
    nearest = np.minimum(np.abs(grid[right] - scaled), np.abs(grid[right - 1] - scaled))
    chosen = np.abs(slab.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) - scaled)
    assert np.array_equal(chosen, nearest)


def test_a_scale_is_the_smallest_power_of_two_that_does_not_overflow() -> None:
    import torch

    from packager.quantize.fp8_block import block_scales

    amax = torch.tensor([448.0, 448.0001, 447.9, 1.75, 1.0, 0.0, 1e-40, 3e38])
    scales = block_scales(amax, power_of_two=True)
    mantissa, _ = torch.frexp(scales)
    assert torch.all(mantissa == 0.5)
    assert torch.all(amax <= scales * 448)
    assert scales[:3].tolist() == [1.0, 2.0, 1.0]
    assert scales[3].item() == 2.0**-8
    assert scales[5].item() == 1.0
    assert torch.all(amax[[0, 1, 2, 3, 4, 7]] > scales[[0, 1, 2, 3, 4, 7]] * 224)
    exact = block_scales(amax, power_of_two=False)
    assert exact[3].item() == pytest.approx(1.75 / 448, rel=1e-6)


@pytest.mark.parametrize("shape", [(128, 128), (8, 16), (130, 200), (384, 136)])
@pytest.mark.parametrize("rounding", ["float32", "power-of-two"])
def test_slabs_of_any_shape_come_back_within_half_a_step(shape: tuple[int, int], rounding: Any) -> None:
    import ml_dtypes

    from packager.quantize.fp8_block import dequantize_array
    from packager.quantize.schemes import scheme_of

    source = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    slab = scheme_of(QuantizeSpec(scale_rounding=rounding)).slab(source)
    assert slab is not None
    assert slab.codes.shape == source.shape
    assert slab.scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = dequantize_array(slab.codes.view(ml_dtypes.float8_e4m3fn), slab.scales)
    # E4M3 has three mantissa bits: half a step is 1/16 of the value, or of the smallest normal number.
    floor = np.kron(slab.scales, np.ones((128, 128)))[: shape[0], : shape[1]] * 2.0**-6
    assert np.all(np.abs(back - source) <= np.maximum(np.abs(source), floor) / 16 * 1.0001)
    assert slab.figures.signal == pytest.approx(float((source.astype(np.float64) ** 2).sum()), rel=1e-6)
    assert slab.figures.error == pytest.approx(
        float(((back - source).astype(np.float64) ** 2).sum()), rel=1e-4
    )


# ---- the checkpoint -------------------------------------------------------------------------------------


def test_only_the_projections_change_and_all_else_keeps_its_bytes(tiny_checkpoint: Path, fp8: Path) -> None:
    opened = WeightCheckpoint.open(fp8)
    before, after = Checkpoint.open(tiny_checkpoint), opened.checkpoint
    kept = set()
    with before.reader() as read_before, after.reader() as read_after:
        for want in opened.layout:
            was, now = before.tensors[want.name], after.tensors[want.name]
            if now.dtype == "F8_E4M3":
                assert after.tensors[want.name + "_scale"].dtype == "F32"
            else:
                kept.add(want.role)
                assert was.dtype == now.dtype
                assert np.array_equal(read_before.bytes(was), read_after.bytes(now))
    assert kept == {Role.EMBEDDING, Role.LM_HEAD, Role.NORM, Role.ROUTER, Role.EXPERT_BIAS}


def test_the_ledger_states_the_noise_that_is_there(tiny_checkpoint: Path, fp8: Path) -> None:
    manifest = read_manifest(fp8)
    a, b = weights(tiny_checkpoint), weights(fp8)
    experts = [name for name in a if ".experts." in name]
    signal = sum(float((a[n].astype(np.float64) ** 2).sum()) for n in experts)
    error = sum(float(((a[n] - b[n]).astype(np.float64) ** 2).sum()) for n in experts)
    stated = manifest.metrics["fidelity"]["routed_expert"]
    assert stated["snr_db"] == pytest.approx(10 * np.log10(signal / error), abs=0.01)
    assert 30 < stated["worst_snr_db"] <= stated["snr_db"] < 33
    assert stated["tensors"] == len(experts)
    compared = diff(tiny_checkpoint, fp8)
    assert compared.roles["routed_expert"] == stated
    assert manifest.metrics["parameters"]["total"] == sum(v.size for v in a.values())


def test_compressed_tensors_reads_the_same_numbers(fp8: Path) -> None:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    raw = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(raw).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    stored = {n: t for file in fp8.glob("*.safetensors") for n, t in load_file(file).items()}
    ours = weights(fp8)
    names = [name for name in stored if stored[name].dtype == torch.float8_e4m3fn]
    for name in names:
        part = {"weight": stored[name], "weight_scale": stored[name + "_scale"]}
        theirs = compressor.decompress(part, scheme=scheme)["weight"]
        assert torch.equal(theirs.float(), torch.from_numpy(ours[name]).bfloat16().float()), name
    assert len(names) == read_manifest(fp8).metrics["tensors"]["quantized"] > 10


def test_both_dialects_hold_the_same_data(tiny_checkpoint: Path, fp8: Path, tmp_path: Path) -> None:
    relabelled = relabel(fp8, tmp_path / "relabelled", "deepseek")
    direct = QuantizeSpec(shard_bytes=60_000, dialect="deepseek")
    run(tiny_checkpoint, tmp_path / "direct", direct)
    a, b, c = (Checkpoint.open(p) for p in (fp8, tmp_path / "relabelled", tmp_path / "direct"))
    assert {n.replace("scale_inv", "scale") for n in b.tensors} == set(a.tensors)
    for shard in a.shards:
        sections = {
            (opened.path / shard).read_bytes()[opened.shards[shard].data_start :] for opened in (a, b, c)
        }
        assert len(sections) == 1
        assert (b.path / shard).read_bytes() == (c.path / shard).read_bytes()
    assert b.config() == c.config()
    assert b.config()["quantization_config"]["modules_to_not_convert"] == [
        "model.word_embeddings",
        "model.layers.1.mlp.gate",
        "lm_head",
    ]
    back = relabel(tmp_path / "relabelled", tmp_path / "back", "compressed-tensors")
    returned, original = contents(tmp_path / "back"), contents(fp8)
    assert original.keys() - returned.keys() == {LEDGER_NAME, PLOT_NAME}
    for name, data in returned.items():
        assert name == "manifest.json" or original[name] == data
    assert back.metrics["data_sha256"] == relabelled.metrics["data_sha256"]
    with pytest.raises(UsageProblem, match="already"):
        relabel(fp8, tmp_path / "same", "compressed-tensors")


def test_dequantized_weights_are_the_fp8_ones_exactly_and_link_what_did_not_change(
    fp8: Path, tmp_path: Path
) -> None:
    manifest = dequantize(fp8, tmp_path / "bf16")
    out = Checkpoint.open(tmp_path / "bf16")
    assert "quantization_config" not in out.config()
    assert {info.dtype for info in out.tensors.values()} == {"BF16", "F32"}
    assert diff(fp8, tmp_path / "bf16").equal
    assert (tmp_path / "bf16" / "tokenizer.json").samefile(fp8 / "tokenizer.json")
    assert dequantize(fp8, tmp_path / "bf16") == manifest


def test_output_is_the_same_bytes_each_time_and_carries_no_code(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(shards=2, auto_map={"AutoConfig": "evil.Config"})
    for name in ("evil.py", "old.bin", "old.pt", "old.pkl"):
        (source / name).write_bytes(b"x")
    (source / "merges.txt").write_text("a b")
    first, second = run(source, tmp_path / "a"), run(source, tmp_path / "b")
    assert first.digest == second.digest
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    suffixes = {p.suffix for p in (tmp_path / "a").iterdir()}
    assert suffixes == {".json", ".jsonl", ".jinja", ".safetensors", ".svg", ".txt"}
    assert "auto_map" not in json.loads((tmp_path / "a" / "config.json").read_text())
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    stored = Checkpoint.open(tmp_path / "a")
    assert index["weight_map"] == dict(sorted((n, i.shard) for n, i in stored.tensors.items()))
    assert index["metadata"]["total_size"] == stored.nbytes
    assert len(stored.shards) > 3


def test_prediction_layers_are_left_out_and_the_manifest_says_so(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    manifest = run(make_checkpoint(mtp_layers=1, num_nextn_predict_layers=1), tmp_path / "out")
    stored = Checkpoint.open(tmp_path / "out")
    assert not any(name.startswith("model.layers.2.") for name in stored.tensors)
    assert stored.config()["num_nextn_predict_layers"] == 0
    assert manifest.metrics["tensors"]["left_out"] > 10
    assert manifest.metrics["parameters"]["left_out"] > 128 * 256


# ---- input that is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("model.layers.1.mlp.experts.3.down_proj.weight", float("nan"), r"\[100, 7\] is NaN"),
        ("model.layers.0.mlp.up_proj.weight", float("inf"), r"\[100, 7\] is infinity"),
        ("model.word_embeddings.weight", float("-inf"), r"\[100, 7\] is infinity"),
        ("model.layers.1.mlp.gate.expert_bias", float("nan"), r"\[3\] is NaN"),
    ],
)
def test_a_value_that_is_not_finite_is_named_with_its_place(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, name: str, value: float, what: str
) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    tensors[name][(100, 7) if tensors[name].dim() == 2 else 3] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(BadInput, match=name.replace(".", r"\.") + what):
        run(source, tmp_path / "out")
    assert not is_sealed(tmp_path / "out")
    assert not list((tmp_path / "out").glob("**/*.part"))


def test_what_is_quantized_already_or_not_at_all_is_refused(
    tiny_checkpoint: Path, fp8: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="quantized already"):
        run(fp8, tmp_path / "a")
    with pytest.raises(BadInput, match="not quantized"):
        dequantize(tiny_checkpoint, tmp_path / "b")
    with pytest.raises(BadInput, match="not quantized"):
        relabel(tiny_checkpoint, tmp_path / "c", "deepseek")
    assert not list(tmp_path.iterdir())


def test_one_changed_byte_in_a_sealed_source_stops_every_stage(fp8: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(fp8, bad)
    shard = next(bad.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for act in (
        lambda: dequantize(bad, tmp_path / "a"),
        lambda: relabel(bad, tmp_path / "b", "deepseek"),
        lambda: diff(fp8, bad),
    ):
        with pytest.raises(IntegrityFailure, match=shard.name):
            act()
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_a_missing_scale_is_refused(fp8: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    shutil.copytree(fp8, bad)
    (bad / "manifest.json").unlink()
    index = json.loads((bad / "model.safetensors.index.json").read_text())
    name = "model.layers.0.attention.dense.weight_scale"
    shard = bad / index["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=f"missing: {name}".replace(".", r"\.")):
        dequantize(bad, tmp_path / "out")


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_method": "gptq"},
        {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}},
        },
    ],
)
def test_a_scheme_that_is_not_block_fp8_is_refused_by_name(raw: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="this quantization is not read here"):
        read_quantization(raw)


def test_skipped_modules_are_matched_whole_or_by_pattern() -> None:
    quantization = Quantization("compressed-tensors", ("lm_head", r"re:.*\.mlp\.gate$"))
    assert quantization.skips("lm_head")
    assert quantization.skips("model.layers.3.mlp.gate")
    assert not quantization.skips("model.layers.3.mlp.gate_proj")
    assert not quantization.skips("lm_head2")


def test_too_little_room_is_said_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        with pytest.raises(BadInput, match="100 kB free"):
            run(tiny_checkpoint, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert run(tiny_checkpoint, tmp_path / "out")


def test_a_shape_that_would_leave_data_unaligned_is_refused(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    odd = {**TINY_CONFIG, "hidden_size": 129, "moe_intermediate_size": 131}
    with pytest.raises(BadInput, match="multiple of 8"):
        run(make_checkpoint(**odd), tmp_path / "out")
