"""FP8 with a scale a row, INT4 in groups, INT8: the numbers of compressed-tensors, and proved once more."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeCheckpoint
from quantizing import run
from test_structure import rewrite

from packager.bailing.config import BailingConfig
from packager.cli import run as packager
from packager.errors import BadInput, GateFailed
from packager.proof.integers import Integers
from packager.proof.recompute import verify_against
from packager.proof.structure import check_structure
from packager.quantize import dequantize, diff, dry_run
from packager.quantize.fidelity import LEDGER_NAME
from packager.quantize.integers import bfloat16_values, pack_int4
from packager.quantize.quantized import WeightCheckpoint
from packager.quantize.schemes import scheme_of
from packager.recipe import QuantizeSpec, SchemeName, TensorRule
from packager.serving.plan import model_bytes

SCHEMES: tuple[SchemeName, ...] = ("fp8-channel", "int4-g128", "w8a8")
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def spec_of(scheme: SchemeName, **settings: Any) -> QuantizeSpec:
    return QuantizeSpec(shard_bytes=60_000, scheme=scheme, **settings)


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("schemes")
    for scheme in SCHEMES:
        run(tiny_checkpoint, base / scheme, spec_of(scheme))
    return {path.name: path for path in base.iterdir()}


def slab_of(scheme: SchemeName, weight: Any) -> tuple[Any, Any]:
    """Codes, as bytes, and scales of a BF16 weight, as tensors."""
    import ml_dtypes
    import torch

    slab = scheme_of(spec_of(scheme)).slab(weight.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    assert slab is not None
    narrow = slab.scales.dtype == ml_dtypes.bfloat16
    scales = torch.from_numpy(slab.scales.view(np.int16) if narrow else slab.scales)
    return torch.from_numpy(slab.codes), scales.view(torch.bfloat16) if narrow else scales


def unpacked(codes: Any) -> Any:
    """INT4 as stored, [R, K/2] bytes, as int8 [R, K]."""
    import torch

    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).to(torch.int8) - 8


# ---- the arithmetic -------------------------------------------------------------------------------------


def their_args(scheme: SchemeName) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    preset = {"fp8-channel": "FP8_DYNAMIC", "int4-g128": "W4A16", "w8a8": "W8A8"}[scheme]
    return preset_name_to_scheme(preset, ["Linear"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_and_codes_are_those_of_compressed_tensors_in_float32(scheme: SchemeName) -> None:
    import torch
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(96, 512, generator=torch.Generator().manual_seed(4)).bfloat16()
    (codes, found), args = slab_of(scheme, weight), their_args(scheme).weights
    groups = weight.float().reshape(96, -1, args.group_size or 512)
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(found, scales.to(found.dtype))
    kind = torch.float8_e4m3fn if scheme == "fp8-channel" else torch.int8
    theirs = quantize(weight.float(), found.float(), None, args, dtype=kind)
    ours = unpacked(codes) if scheme == "int4-g128" else codes
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_in_bf16_compressed_tensors_rounds_twice_and_is_never_nearer() -> None:
    import torch
    from compressed_tensors.quantization.lifecycle.forward import quantize

    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(5)).bfloat16()
    packed, scales = slab_of("int4-g128", weight)
    theirs = quantize(weight, scales, None, their_args("int4-g128").weights, dtype=torch.int8)
    ours, spread = unpacked(packed), scales.double().repeat_interleave(128, dim=1)
    steps = (ours.int() - theirs.int()).abs()
    assert steps.max() == 1 and 0 < steps.float().mean() < 0.01
    errors = [(codes.double() * spread - weight.double()).abs() for codes in (ours, theirs)]
    assert bool((errors[0] <= errors[1]).all())


def test_packing_is_that_of_compressed_tensors() -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-8, 8, (12, 256), generator=torch.Generator().manual_seed(6)).to(torch.int8)
    ours = torch.from_numpy(pack_int4(codes.numpy().view(np.uint8)).view(np.int32))
    assert torch.equal(ours, pack_to_int32(codes, 4))


def test_rounding_to_bf16_on_bits_is_the_cast() -> None:
    import torch

    bits = torch.arange(0x00800000, 0x7F000000, 4099, dtype=torch.int32)
    ties = (torch.arange(0x0080, 0x7F00, dtype=torch.int32) << 16) | 0x8000
    for values in (bits.view(torch.float32), ties.view(torch.float32)):
        assert torch.equal(bfloat16_values(values), values.bfloat16().float())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_judgement_of_integers_agrees_with_rounding_on_every_boundary(bits: int) -> None:
    import torch

    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    points = np.arange(2 * low - 2, 2 * high + 4, dtype=np.float32) / 2
    near = [np.nextafter(points, np.float32(way)) for way in (-np.inf, np.inf)]
    quotients = np.concatenate([points, *near])[None, :]
    arithmetic, one = Integers(bits), np.ones((1, 1), np.float32)
    theirs = torch.from_numpy(quotients).round().clamp(low, high).numpy()
    codes = (theirs.astype(np.int64) + (8 if bits == 4 else 0)).astype(np.uint8)
    assert np.array_equal(arithmetic.nearest_codes(quotients, one), codes)
    assert np.array_equal(arithmetic.VALUES[codes], theirs)
    assert not arithmetic.wrong_codes(quotients, one, codes).any()
    for other in range(1, 2**bits):
        assert arithmetic.wrong_codes(quotients, one, codes ^ np.uint8(other)).all()


# ---- the files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_decompresses_our_files_to_the_same_numbers(
    scheme: SchemeName, made: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    stated = json.loads((made[scheme] / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(stated)
    group = parsed.config_groups["group_0"]
    preset = their_args(scheme)
    assert group.weights == preset.weights and group.input_activations == preset.input_activations
    compressor = BaseCompressor.get_value_from_registry(stated["format"])
    stored = {n: t for file in made[scheme].glob("*.safetensors") for n, t in load_file(file).items()}
    names = set(compressor.compression_param_names(group))
    dequantize(made[scheme], tmp_path / "bf16")
    ours = {n: t for file in (tmp_path / "bf16").glob("*.safetensors") for n, t in load_file(file).items()}
    quantized = WeightCheckpoint.open(made[scheme]).quantized
    for weight in quantized:
        prefix = weight.removesuffix("weight")
        parts = {name: stored.pop(prefix + name) for name in names}
        theirs = compressor.decompress(parts, scheme=group)["weight"]
        assert torch.equal(theirs.bfloat16(), ours[weight]), weight
    assert len(quantized) == 22
    assert set(stored) == set(ours) - set(quantized)  # nothing else was written


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_element_is_what_numpy_computes(
    scheme: SchemeName, tiny_checkpoint: Path, made: dict[str, Path]
) -> None:
    proof = verify_against(made[scheme], tiny_checkpoint, sample=None, workers=2)
    assert proof.sound, [*proof.problems, *proof.mismatches]
    assert (proof.scheme, proof.checked, proof.kept) == (scheme, 22, 13)
    assert proof.elements == sum(math.prod(row["shape"]) for row in ledger(made[scheme]))
    stated = json.loads((made[scheme] / "manifest.json").read_text())["metrics"]
    assert proof.rounding == stated["scale_rounding"] and stated["scheme"] == scheme
    assert proof.roles["routed_expert"].snr_db == stated["fidelity"]["routed_expert"]["snr_db"]
    worst = {"fp8-channel": 1 / 17, "int4-g128": 1 / 15 * 1.06, "w8a8": 1 / 255 * 1.001}[scheme]
    assert 0.9 * worst < proof.worst_relative_error <= worst * (1 + 1e-6)


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LEDGER_NAME).read_text().splitlines()]


def damaged(checkpoint: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    rewrite(copy, change)
    return copy


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_changed_code_and_one_changed_scale_are_found(
    scheme: SchemeName, tiny_checkpoint: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    name = EXPERT + ("_packed" if scheme == "int4-g128" else "")
    other = "model.layers.0.mlp.down_proj.weight_scale"

    def change(tensors: dict[str, Any]) -> None:
        codes = tensors[name].view(torch.uint8)
        codes[100, 7] ^= 16 if scheme == "int4-g128" else 1  # of column 15: the high half of byte 7
        tensors[other][9, 0] *= 1.0625

    proof = verify_against(damaged(made[scheme], tmp_path, change), tiny_checkpoint, sample=None)
    found = {(mismatch.tensor, mismatch.kind): mismatch for mismatch in proof.mismatches}
    code = found[name, "code"]
    assert code.position == (100, 15 if scheme == "int4-g128" else 7) and code.count == 1
    scale = found[other, "scale"]
    assert (scale.position, scale.count) == ((9, 0), 1)
    assert {tensor for tensor, _ in found} <= {name, other, other.replace("_scale", ""),
                                               other.replace("_scale", "_packed")}  # fmt: skip
    assert not proof.problems


def test_what_is_wrong_with_packed_weights_is_listed(
    tiny_checkpoint: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    import torch

    def change(tensors: dict[str, Any]) -> None:
        tensors[EXPERT + "_shape"][0] += 8
        del tensors["model.layers.0.mlp.down_proj.weight_shape"]
        del tensors["model.layers.0.mlp.up_proj.weight_scale"]
        tensors["model.layers.0.mlp.gate_proj.weight_packed"] = torch.zeros(256, 8, dtype=torch.int32)
        tensors["model.layers.0.attention.dense.weight"] = torch.zeros(128, 128, dtype=torch.bfloat16)

    bad = damaged(made["int4-g128"], tmp_path, change)
    proof = "\n".join(verify_against(bad, tiny_checkpoint, sample=None).problems)
    structure = "\n".join(map(str, check_structure(bad).problems))
    for text in (proof, structure):
        assert f"{EXPERT}_shape: says [136, 128]" in text
        assert "model.layers.0.mlp.down_proj.weight_shape" in text
        assert re.search(r"without (its scale )?model\.layers\.0\.mlp\.up_proj\.weight_scale", text)
        assert "model.layers.0.mlp.gate_proj.weight_packed: shape [256, 8], expected [256, 16]" in text
    assert "model.layers.0.attention.dense.weight: stored twice" in proof
    with pytest.raises(BadInput, match=r"missing: model\.layers\.0\.mlp\.down_proj\.weight_shape"):
        dequantize(bad, tmp_path / "bf16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_structure_is_sound_and_its_faults_are_found(
    scheme: SchemeName, tiny_checkpoint: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    found = check_structure(made[scheme], source=tiny_checkpoint)
    assert found.sound, list(map(str, found.problems))
    assert (found.scheme, found.quantized, found.scales, found.kept) == (scheme, 22, 22, 13)
    # Groups of columns must not be cut: 128 columns of a down projection cannot be split over two GPUs.
    assert [split.possible for split in found.parallel[:2]] == [True, scheme != "int4-g128"]

    def change(tensors: dict[str, Any]) -> None:
        del tensors[EXPERT + "_scale"]
        tensors["model.layers.0.mlp.up_proj.weight_scale"][3, 0] = -1.0

    bad = check_structure(damaged(made[scheme], tmp_path, change))
    assert {problem.kind for problem in bad.problems} == {"scale-missing", "scale-value"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_verbs_understand_what_was_written(
    scheme: SchemeName,
    tiny_checkpoint: Path,
    made: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = made[scheme]
    assert packager(["inspect", str(path), "--json"]) == 0
    stated = json.loads(capsys.readouterr().out)["quantization"]
    assert stated["scheme"] == scheme.partition("-g")[0] and stated.get("group", 128) == 128
    planned, sizes = dry_run(tiny_checkpoint, spec_of(scheme)), path.glob("*.safetensors")
    assert planned.output_bytes == sum(file.stat().st_size for file in sizes)
    by_role = {row.role: row for row in planned.roles}
    stored = {"fp8-channel": "F8_E4M3 + F32", "int4-g128": "I32 + BF16 + I64", "w8a8": "I8 + F32"}
    assert by_role["routed_expert"].stored_as == stored[scheme]
    assert by_role["routed_expert"].decision == "quantize" and by_role["norm"].decision == "keep"
    assert packager(["plan", str(path), "--hardware", "1xh20", "--no-draft", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    precision = {"fp8-channel": "fp8-channel", "int4-g128": "int4", "w8a8": "int8"}[scheme]
    assert (plan["precision"], plan["weights_from"]) == (precision, "shard headers")
    config = BailingConfig.parse(json.loads((tiny_checkpoint / "config.json").read_text()))
    assert plan["weights_bytes"] == model_bytes(config, precision).weights  # type: ignore[arg-type]
    compared = diff(tiny_checkpoint, path)
    metrics = json.loads((path / "manifest.json").read_text())["metrics"]
    assert compared.roles == metrics["fidelity"]
    assert metrics["tensors"] == {"quantized": 22, "kept": 13, "left_out": 0}
    assert packager(["quantize", str(path), str(tmp_path / "again")]) == 3
    assert "is quantized already" in capsys.readouterr().err
    assert packager(["relabel", str(path), str(tmp_path / "other"), "--dialect", "deepseek"]) == 3


# ---- the ledger and its gate ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4-g128", "w8a8"])
def test_the_ledger_counts_codes_at_the_ends_and_empty_groups(
    scheme: SchemeName, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    tensors[EXPERT][5:8] = 0
    save_file(tensors, source / "model.safetensors")
    run(source, tmp_path / "out", spec_of(scheme))
    (row,) = (row for row in ledger(tmp_path / "out") if row["name"] == EXPERT)
    opened = WeightCheckpoint.open(tmp_path / "out")
    with opened.checkpoint.reader() as reader:
        values, scales = opened.values(reader, EXPERT), reader.array(opened.scale(EXPERT)).astype("f4")
    half = 8 if scheme == "int4-g128" else 128
    codes = np.rint(values / scales)  # 128 columns: one group a row
    assert row["zero_blocks"] == 3 and set(scales[5:8, 0]) == {1.0}
    assert row["saturated"] == ((codes == -half) | (codes == half - 1)).sum() > 50
    assert row["scale_max"] == np.delete(scales, [5, 6, 7]).max() < 1


def test_each_scheme_has_its_own_gate(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    tensors[EXPERT][:, 3] *= 12  # an outlier in every row: INT8 keeps it, INT4 and its neighbours do not
    save_file(tensors, source / "model.safetensors")
    for scheme in ("fp8-channel", "w8a8"):
        assert run(source, tmp_path / scheme, spec_of(scheme))
    with pytest.raises(GateFailed, match=r"1 weights are below 15 dB"):
        run(source, tmp_path / "int4", spec_of("int4-g128"))
    assert run(source, tmp_path / "int4", spec_of("int4-g128"), min_snr_db=10.0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_value_that_is_not_finite_is_named(
    scheme: SchemeName, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint()
    tensors = load_file(source / "model.safetensors")
    tensors[EXPERT][100, 7] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(BadInput, match=r"up_proj\.weight\[100, 7\] is NaN"):
        run(source, tmp_path / "out", spec_of(scheme))


# ---- what is asked for ----------------------------------------------------------------------------------


def test_weights_without_whole_groups_are_listed_and_may_be_kept(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(intermediate_size=200)
    with pytest.raises(BadInput, match="1 weights do not fit the scheme") as caught:
        run(source, tmp_path / "out", spec_of("int4-g128"))
    assert "model.layers.0.mlp.down_proj.weight [128, 200]" in caught.value.message
    assert "columns in whole groups of 128" in caught.value.message
    assert not (tmp_path / "out").exists()
    rule = TensorRule(tensors="model.layers.0.mlp.down_proj.weight", do="keep")
    run(source, tmp_path / "out", spec_of("int4-g128", rules=(rule,)))
    assert check_structure(tmp_path / "out").sound
    assert verify_against(tmp_path / "out", source, sample=None).checked == 21


def test_rules_and_prediction_layers_can_be_decided_on_the_command_line(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    source = make_checkpoint(mtp_layers=1, num_nextn_predict_layers=1)
    shared = "model.layers.*.mlp.shared_experts.*"
    options = ["--mtp", "keep", "--rule", f"{shared}=keep", "--rule", r"re:.*\.attention\..*_proj_?.*=keep"]
    assert packager(["quantize", str(source), str(tmp_path / "bad"), *options]) == 3  # matches nothing
    options[-1] = r"re:.*\.attention\.(dense|query_key_value)\.weight=keep"
    assert packager(["quantize", str(source), str(tmp_path / "out"), *options]) == 0
    rules = (
        TensorRule(tensors=shared, do="keep"),
        TensorRule(tensors=options[-1].removesuffix("=keep"), do="keep"),
    )
    by_recipe = run(source, tmp_path / "recipe", QuantizeSpec(mtp="keep", rules=rules))
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert made["metrics"] == by_recipe.metrics
    assert made["metrics"]["prediction_layers"]["written"] == 1
    assert set(made["metrics"]["fidelity"]) == {"dense_mlp", "routed_expert"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--scheme", "bf16"], "packager dequantize"),
        (["--scheme", "int4-g128", "--dialect", "deepseek"], "no deepseek dialect"),
        (["--scheme", "fp8-channel", "--dialect", "deepseek"], "no deepseek dialect"),
        (["--scheme", "int4-g128", "--scale-rounding", "power-of-two"], "rounded to bfloat16"),
        (["--scale-rounding", "bfloat16"], "rounded to power-of-two or float32"),
        (["--rule", "model.norm.weight"], "no pattern and decision"),
        (["--rule", "model.norm.weight=forget"], "no pattern and decision"),
        (["--rule", "re:(=keep"], "no pattern and decision"),
    ],
)
def test_what_makes_no_sense_is_a_usage_problem(
    options: list[str],
    said: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert packager(["quantize", str(tiny_checkpoint), str(tmp_path / "out"), *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_settings_that_existed_before_keep_their_digest() -> None:
    start = "sha256:"
    assert QuantizeSpec(shard_bytes=60_000).digest.startswith(start + "a2c802894b37f003")
    exact = QuantizeSpec(shard_bytes=60_000, scale_rounding="float32")
    assert exact.digest.startswith(start + "a65b8b5b7cb50d68")
    assert QuantizeSpec(scheme="fp8-channel").scale_rounding == "float32"
    assert QuantizeSpec(scheme="int4-g128") == QuantizeSpec(scheme="int4-g128", scale_rounding="bfloat16")
