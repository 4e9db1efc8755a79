"""Sources of every float type and shape, and the way back from quantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tiny_architectures import TINY, layout_of, random_tensors, tiny_config, write_tensors, write_tiny

from packager.artifact import is_sealed
from packager.checkpoint import Checkpoint
from packager.cli import run as packager
from packager.errors import BadInput
from packager.layouts import QUANTIZABLE
from packager.quantize import dequantize, diff, quantize
from packager.quantize import quantized as quantized_module
from packager.quantize.dialects import Quantization, read_quantization
from packager.quantize.int4 import dequantize_int4
from packager.quantize.quantized import WeightCheckpoint
from packager.recipe import QuantizeSpec, TensorRule

LLAMA = "LlamaForCausalLM"
DIALECTS = ("compressed-tensors", "deepseek")


def run(source: Path, out: Path, **spec: Any) -> None:
    settings = QuantizeSpec(**spec)
    quantize(source, out, settings, recipe_digest=settings.digest, progress=lambda _: None, min_snr_db=None)


def arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every stored tensor in its own type."""
    opened = Checkpoint.open(path)
    with opened.reader() as reader:
        return {name: reader.array(info) for name, info in opened.tensors.items()}


def block_fp8(
    weight: np.ndarray[Any, Any], power_of_two: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Codes and scales of a weight, block by block: the definition, written plainly."""
    rows, columns = weight.shape
    codes = np.empty(weight.shape, np.uint8)
    scales = np.empty((-(-rows // 128), -(-columns // 128)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = np.s_[i * 128 : i * 128 + 128, j * 128 : j * 128 + 128]
            block = weight[part].astype(np.float32)
            scale = np.float32(np.abs(block).max()) / np.float32(448)
            if scale == 0:
                scale = np.float32(1)
            elif power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            scales[i, j] = scale
            nearest = np.clip(block / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            codes[part] = nearest.view(np.uint8)
    return codes, scales


# ---- sources --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["power-of-two", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_each_float_type_and_ragged_edge_is_quantized_as_the_definition_says(
    dtype: str, rounding: Any, tmp_path: Path
) -> None:
    # 136, 160, 200 and 72 are no multiples of 128: each matrix has blocks that are cut in one way or both.
    source = write_tiny(tmp_path / "source", LLAMA, dtype=dtype)
    run(source, tmp_path / "out", scale_rounding=rounding)
    before, after = arrays(source), arrays(tmp_path / "out")
    count = 0
    for want in layout_of(tiny_config(LLAMA)):
        if want.role not in QUANTIZABLE:
            assert before[want.name].tobytes() == after[want.name].tobytes()
            assert before[want.name].dtype == after[want.name].dtype
            continue
        codes, scales = block_fp8(before[want.name], rounding == "power-of-two")
        assert np.array_equal(after[want.name + "_scale"], scales)
        assert np.array_equal(after[want.name].view(np.uint8), codes)
        count += 1
    assert count == 14


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_value_that_is_not_finite_is_named_in_each_float_type(dtype: str, tmp_path: Path) -> None:
    raw = tiny_config(LLAMA)
    tensors = random_tensors(layout_of(raw), dtype)
    tensors["model.layers.1.mlp.down_proj.weight"][135, 199] = float("inf")
    source = write_tensors(tmp_path / "source", raw, tensors)
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.down_proj\.weight\[135, 199\] is infinity"):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture_goes_there_and_back(architecture: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", architecture)
    for dialect in DIALECTS:
        run(source, tmp_path / dialect, dialect=dialect)
        dequantize(tmp_path / dialect, tmp_path / f"{dialect}-bf16")
        assert diff(tmp_path / dialect, tmp_path / f"{dialect}-bf16").equal
    compared = diff(source, tmp_path / "deepseek-bf16")
    assert {row.role for row in compared.differing} <= {str(role) for role in QUANTIZABLE}
    assert all(row.snr_db is not None and row.snr_db > 30 for row in compared.differing)
    assert diff(tmp_path / DIALECTS[0], tmp_path / DIALECTS[1]).equal


@pytest.mark.parametrize("architecture", [name for name in TINY if not name.startswith("Bailing")])
def test_compressed_tensors_targets_the_linear_layers_that_are_quantized(
    architecture: str, tmp_path: Path
) -> None:
    import torch
    from compressed_tensors.utils.match import match_named_modules
    from transformers import AutoConfig, AutoModelForCausalLM

    rule = TensorRule(tensors="model.layers.1.self_attn.*", do="keep")
    run(write_tiny(tmp_path / "source", architecture), tmp_path / "out", rules=(rule,))
    opened = WeightCheckpoint.open(tmp_path / "out")
    stated = opened.raw_config["quantization_config"]
    fields = {key: value for key, value in tiny_config(architecture).items() if key != "architectures"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    targets = stated["config_groups"]["group_0"]["targets"]
    matched = {name for name, _ in match_named_modules(model, targets, stated["ignore"])}
    # transformers holds the experts of a layer in one module that is no linear layer.
    ours = {name.removesuffix(".weight") for name in opened.quantized if ".experts." not in name}
    assert matched == ours
    assert any(name.startswith("model.layers.0.self_attn") for name in ours)
    assert not any(name.startswith("model.layers.1.self_attn") for name in ours)


# ---- what others quantized ------------------------------------------------------------------------------

SIZES = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}


def weights_args(scheme: str) -> dict[str, Any]:
    """The `weights` of a compressed-tensors group."""
    integer = {"num_bits": 4, "type": "int"}
    return {
        "channel": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
        "block": {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "block",
            "block_structure": [128, 128],
        },
        "int4-g128": {**integer, "symmetric": True, "strategy": "group", "group_size": 128},
        "int4-g32-zero-points": {**integer, "symmetric": False, "strategy": "group", "group_size": 32},
        "int4-row": {**integer, "symmetric": True, "strategy": "channel"},
    }[scheme]


def scales_and_zeros(weight: Any, args: dict[str, Any]) -> tuple[Any, Any]:
    """A scale and a zero point for each group, row or block of a weight [N, K], in the weight's own type."""
    import torch

    rows, columns = weight.shape
    if args["strategy"] == "block":
        blocks = weight.reshape(rows // 128, 128, columns // 128, 128).float().abs().amax((1, 3))
        return (blocks / 448).to(weight.dtype), None
    groups = weight.float().reshape(rows, -1, args.get("group_size") or columns)
    if args["type"] == "float":
        return (groups.abs().amax(-1) / 448).to(weight.dtype), None
    if args["symmetric"]:
        return (groups.abs().amax(-1) / 7.5).to(weight.dtype), None
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).to(weight.dtype)
    zero = torch.clamp(torch.round(-8 - low / scale.float()), -8, 7).to(torch.int8)
    return scale, zero


def compressed(path: Path, scheme: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Write a checkpoint that compressed-tensors compressed; the weights as it decompresses them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    args = weights_args(scheme)
    kind = "pack-quantized" if args["type"] == "int" else "float-quantized"
    group: dict[str, Any] = {"targets": ["Linear"], "weights": args}
    if args["type"] == "float":
        group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    stated = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.layers.0.self_attn.o_proj"],
    }
    parsed = QuantizationConfig.model_validate(stated).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(kind)
    raw = tiny_config(LLAMA, **SIZES, quantization_config=stated)
    layout, out, truth = layout_of(raw), {}, {}
    for name, weight in random_tensors(layout, dtype).items():
        (want,) = (want for want in layout if want.name == name)
        if want.role not in QUANTIZABLE or name == "model.layers.0.self_attn.o_proj.weight":
            out[name] = truth[name] = weight
            continue
        scale, zero = scales_and_zeros(weight, args)
        state = {"weight": weight, "weight_scale": scale}
        if zero is not None:
            state["weight_zero_point"] = zero
        parts = compressor.compress(state, scheme=parsed)
        prefix = name.removesuffix("weight")
        out |= {prefix + key: value.contiguous() for key, value in parts.items()}
        truth[name] = compressor.decompress(parts, scheme=parsed)["weight"]
    names = list(out)
    shards = [{name: out[name] for name in names[part::2]} for part in range(2)]
    write_tensors(path, raw, *shards)
    return truth


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scheme", ["channel", "block", "int4-g128", "int4-g32-zero-points", "int4-row"])
def test_bf16_weights_are_those_that_compressed_tensors_decompresses(
    scheme: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    # A weight takes several slabs, cut where 256 rows of 256 columns end.
    monkeypatch.setattr(quantized_module, "_SLAB_ELEMENTS", 1 << 16)
    truth = compressed(tmp_path / "source", scheme, dtype)
    manifest = dequantize(tmp_path / "source", tmp_path / "bf16")
    assert is_sealed(tmp_path / "bf16")
    written = arrays(tmp_path / "bf16")
    assert written.keys() == truth.keys()
    quantized = WeightCheckpoint.open(tmp_path / "source").quantized
    for name, value in truth.items():
        exact = value.bfloat16() if name in quantized else value
        assert written[name].dtype == (np.float32 if exact.dtype is torch.float32 else ml_dtypes.bfloat16)
        assert torch.equal(torch.from_numpy(written[name].astype(np.float32)), exact.float()), name
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["hidden_size"] == 256
    index = json.loads((tmp_path / "bf16" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(truth)
    expected = {"channel": "fp8-channel", "block": "fp8-block"}.get(scheme, "int4")
    assert manifest.metrics["source_scheme"] == expected
    assert manifest.metrics["tensors"] == {"dequantized": 13, "kept": len(truth) - 13}
    assert WeightCheckpoint.open(tmp_path / "bf16").quantization is None
    # What was dequantized can be quantized otherwise.
    run(tmp_path / "bf16", tmp_path / "again")
    assert len(WeightCheckpoint.open(tmp_path / "again").quantized) == 14


def test_packed_groups_that_the_columns_do_not_fill_have_a_scale_of_their_own() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (5, 21), dtype=np.uint8)
    padded = np.pad(codes, ((0, 0), (0, 3))).reshape(5, 3, 8).astype(np.uint32)
    packed = (padded << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.uint8)
    scales = rng.random((5, 2), dtype=np.float32)
    expected = (codes.astype(np.float32) - 8) * np.repeat(scales, 16, axis=1)[:, :21]
    assert np.array_equal(dequantize_int4(packed.reshape(5, -1), scales, None, 21, 16), expected)


def test_int4_whose_stored_shape_is_another_is_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    compressed(tmp_path / "source", "int4-g128")
    name = "model.layers.0.mlp.up_proj.weight_shape"
    index = json.loads((tmp_path / "source" / "model.safetensors.index.json").read_text())
    shard = tmp_path / "source" / index["weight_map"][name]
    save_file({**load_file(shard), name: torch.tensor([384, 255])}, shard)
    with pytest.raises(BadInput, match=r"weight_shape says \[384, 255\], config.json \[384, 256\]"):
        dequantize(tmp_path / "source", tmp_path / "out")


def test_a_scale_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    compressed(tmp_path / "source", "int4-g128")
    tensors = {n: t for f in (tmp_path / "source").glob("*.safetensors") for n, t in load_file(f).items()}
    del tensors["model.layers.0.mlp.up_proj.weight_shape"]
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(256, 4)
    raw = json.loads((tmp_path / "source" / "config.json").read_text())
    bad = write_tensors(tmp_path / "bad", raw, tensors)
    with pytest.raises(BadInput) as caught:
        dequantize(bad, tmp_path / "out")
    assert "missing: model.layers.0.mlp.up_proj.weight_shape [2]" in caught.value.message
    assert "down_proj.weight_scale is [256, 4], expected [256, 3]" in caught.value.message


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"actorder": "group"}, "columns reordered"),
        ({"num_bits": 8}, "int 8 bit"),
        ({"group_size": None}, "int 4 bit, strategy group"),
        ({"strategy": "tensor_group"}, "strategy tensor_group"),
    ],
)
def test_packings_that_are_not_read_are_refused_by_name(changes: dict[str, Any], why: str) -> None:
    group = {"weights": {**weights_args("int4-g128"), **changes}, "format": "pack-quantized"}
    raw = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    with pytest.raises(BadInput, match=f"not read here: .*{why}"):
        read_quantization(raw)


def test_static_activation_scales_are_refused_by_name() -> None:
    group = {"weights": weights_args("channel"), "input_activations": {"dynamic": False}}
    with pytest.raises(BadInput, match="static activation scales"):
        read_quantization({"quant_method": "compressed-tensors", "config_groups": {"g": group}})


def test_the_format_may_stand_in_the_group() -> None:
    group = {"weights": weights_args("int4-g32-zero-points"), "format": "pack-quantized"}
    found = read_quantization({"quant_method": "compressed-tensors", "config_groups": {"g": group}})
    assert found == Quantization("compressed-tensors", (), "int4", 32, symmetric=False)


# ---- the verb -------------------------------------------------------------------------------------------


def test_the_verb_writes_bf16_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compressed(tmp_path / "source", "int4-g128")
    arguments = ["dequantize", str(tmp_path / "source"), str(tmp_path / "out")]
    assert packager(arguments) == 0
    assert "13 weights from int4 to BF16" in capsys.readouterr().out
    assert packager([*arguments, "--json"]) == 0  # finished already: the same manifest
    document = json.loads(capsys.readouterr().out)
    assert document["metrics"]["scheme"] == "bf16"
    assert packager(["dequantize", str(tmp_path / "out"), str(tmp_path / "twice")]) == 3
    assert "is not quantized" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["channel", "int4-g128"])
def test_only_block_fp8_has_two_dialects(
    scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compressed(tmp_path / "source", scheme)
    arguments = [str(tmp_path / "source"), str(tmp_path / "out")]
    assert packager(["relabel", *arguments, "--dialect", "deepseek"]) == 3
    assert "only block FP8 has two dialects" in capsys.readouterr().err
    assert packager(["quantize", *arguments]) == 3
    said = capsys.readouterr().err
    assert "is quantized already" in said and "packager dequantize" in said
