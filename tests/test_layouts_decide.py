"""Each tensor meets exactly one rule; what a recipe may decide, and what it is told when it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_architectures import TINY, layout_of, random_tensors, tiny_config, write_tensors, write_tiny

from packager.artifact import Manifest
from packager.checkpoint import Checkpoint
from packager.checkpoint.header import TensorInfo
from packager.errors import BadInput
from packager.layouts import Decisions, Do, Role, decide, recognise
from packager.quantize import quantize, relabel
from packager.quantize.quantized import WeightCheckpoint
from packager.recipe import QuantizeSpec, TensorRule

MOE = "Qwen3MoeForCausalLM"


def found_in(architecture: str, mtp_layers: int = 0, **changes: Any) -> dict[str, TensorInfo]:
    """The tensors of a sound checkpoint, as its headers would give them."""
    layout = layout_of(tiny_config(architecture, **changes), mtp_layers)
    return {want.name: TensorInfo(want.name, "BF16", want.shape, 0, "x.safetensors") for want in layout}


def extra(found: dict[str, TensorInfo], name: str, *shape: int, dtype: str = "BF16") -> None:
    found[name] = TensorInfo(name, dtype, shape, 0, "x.safetensors")


def decided(
    architecture: str, found: dict[str, TensorInfo], *rules: tuple[str, Any], mtp: Any = "drop"
) -> Decisions:
    spec = QuantizeSpec(rules=tuple(TensorRule(tensors=tensors, do=do) for tensors, do in rules), mtp=mtp)
    expected = recognise(tiny_config(architecture)).tensors_in(found)
    return decide(expected, found, rules=spec.rules, mtp=spec.mtp, origin="the source")


def refusal(architecture: str, found: dict[str, TensorInfo], *rules: tuple[str, Any]) -> list[str]:
    """The lines of the one error."""
    with pytest.raises(BadInput) as caught:
        decided(architecture, found, *rules)
    assert "quantize.rules" in caught.value.remedy
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


def run(source: Path, out: Path, said: list[str] | None = None, **spec: Any) -> Manifest:
    settings = QuantizeSpec(**spec)
    said = [] if said is None else said
    return quantize(source, out, settings, recipe_digest=settings.digest, progress=said.append)


# ---- without rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TINY)
def test_a_sound_checkpoint_is_decided_by_its_declaration(architecture: str) -> None:
    found = found_in(architecture)
    decisions = decided(architecture, found)
    assert decisions.layout.keys() == decisions.do.keys() == found.keys()
    assert all(do is decisions.layout[name].decision for name, do in decisions.do.items())
    assert {want.role for want in decisions.those(Do.KEEP)} >= {Role.EMBEDDING, Role.NORM}
    assert decisions.those(Do.DROP) == []


def test_all_that_does_not_fit_is_one_error() -> None:
    found = found_in(MOE)
    gone = "model.layers.1.mlp.experts.2.up_proj.weight"
    del found[gone]
    extra(found, "model.norm.weight", 137)
    extra(found, "model.layers.0.input_layernorm.weight", 136, dtype="I32")
    extra(found, "model.layers.1.mlp.experts.4.up_proj.weight", 144, 136)
    extra(found, "visual.blocks.0.weight", 3, 3)
    assert sorted(refusal(MOE, found)) == [
        f"missing: {gone} [144, 136]",
        "unknown: model.layers.1.mlp.experts.4.up_proj.weight [144, 136]",
        "unknown: visual.blocks.0.weight [3, 3]",
        "wrong dtype: model.layers.0.input_layernorm.weight is I32, expected BF16 or F16 or F32",
        "wrong shape: model.norm.weight is [137], expected [136]",
    ]


def test_forty_problems_stand_alone_and_more_are_folded_without_losing_one() -> None:
    sixteen = tiny_config(MOE, num_experts=16, num_hidden_layers=4, mlp_only_layers=[])
    expected = recognise(sixteen).tensors()
    found = found_in(MOE, num_experts=16, num_hidden_layers=4, mlp_only_layers=[])
    experts = [name for name in found if ".experts." in name]
    for name in experts:
        del found[name]
    del found["model.layers.2.self_attn.k_norm.weight"]
    with pytest.raises(BadInput) as caught:
        decide(expected, found, origin="the source")
    message = caught.value.message
    assert f"{len(experts) + 1} tensors do not fit" in message
    assert message.count("\n") == 4
    for name in ("gate_proj.weight [144, 136]", "up_proj.weight [144, 136]", "down_proj.weight [136, 144]"):
        assert f"missing: model.layers.{{0-3}}.mlp.experts.{{0-15}}.{name} (64 tensors)" in message
    assert "missing: model.layers.2.self_attn.k_norm.weight [40]" in message
    # One of the 192 is there: the ranges would lie, so the lines of its kind are not folded.
    extra(found, "model.layers.3.mlp.experts.7.up_proj.weight", 144, 136)
    with pytest.raises(BadInput) as caught:
        decide(expected, found, origin="the source")
    assert caught.value.message.count(".up_proj.weight") == 63
    assert "experts.7.up_proj" in caught.value.message
    assert "model.layers.3.mlp.experts.7.up_proj" not in caught.value.message


def test_a_header_full_of_odd_names_makes_neither_a_huge_list_nor_a_huge_message() -> None:
    found = found_in("DeepseekV3ForCausalLM")
    for index in range(3000):
        extra(found, f"model.layers.{2 + 7 * index}.eh_proj.weight", 0, 0)
        extra(found, f"odd{index}", 0)
    with pytest.raises(BadInput) as caught:
        decided("DeepseekV3ForCausalLM", found)
    assert len(recognise(tiny_config("DeepseekV3ForCausalLM")).tensors_in(found)) < 1000
    assert caught.value.message.count("\n") == 2001
    assert "lines more" in caught.value.message


def test_tensors_in_two_shards_are_one_error_that_names_each(tmp_path: Path) -> None:
    raw = tiny_config("LlamaForCausalLM")
    tensors = random_tensors(layout_of(raw))
    twice = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    source = write_tensors(tmp_path / "source", raw, tensors, {name: tensors[name].clone() for name in twice})
    with pytest.raises(BadInput) as caught:
        run(source, tmp_path / "out")
    assert all(f"{name} is in model-00001" in caught.value.message for name in twice)


def test_what_some_checkpoints_bring_and_engines_recompute_is_dropped(tmp_path: Path) -> None:
    raw = tiny_config("LlamaForCausalLM")
    tensors = random_tensors(layout_of(raw))
    import torch

    tensors |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(20) for n in range(2)}
    manifest = run(write_tensors(tmp_path / "source", raw, tensors), tmp_path / "out")
    assert not any("inv_freq" in name for name in Checkpoint.open(tmp_path / "out").tensors)
    assert manifest.metrics["tensors"]["left_out"] == 2


def test_a_tied_checkpoint_that_stores_its_head_again_is_taken() -> None:
    found = found_in("Qwen3ForCausalLM", tie_word_embeddings=True)
    extra(found, "lm_head.weight", 72, 136)
    expected = recognise(tiny_config("Qwen3ForCausalLM", tie_word_embeddings=True)).tensors_in(found)
    assert decide(expected, found, origin="x").do["lm_head.weight"] is Do.KEEP


def test_fused_experts_are_not_left_in_16_bits_without_a_word() -> None:
    found = {name: info for name, info in found_in(MOE).items() if ".experts." not in name}
    extra(found, "model.layers.1.mlp.experts.gate_up_proj", 4, 288, 136)
    extra(found, "model.layers.1.mlp.experts.down_proj", 4, 136, 144)
    lines = refusal(MOE, found)
    assert len(lines) == 2 and all(
        "engines load quantized experts one matrix at a time" in line for line in lines
    )
    kept = decided(MOE, found, ("*.mlp.experts.*", "keep"))
    assert kept.do["model.layers.1.mlp.experts.down_proj"] is Do.KEEP


# ---- rules ----------------------------------------------------------------------------------------------


def test_a_rule_decides_what_the_declaration_does_not_know() -> None:
    found = found_in(MOE)
    extra(found, "visual.proj.weight", 64, 64)
    extra(found, "visual.other.weight", 64, 64)
    extra(found, "old.position_ids", 1, 64, dtype="I64")
    rules = [("visual.proj.*", "quantize"), (r"re:visual\.o.*", "keep"), ("old.*", "drop")]
    decisions = decided(MOE, found, *rules)
    assert [want.name for want in decisions.those(Do.DROP)] == ["old.position_ids"]
    assert decisions.do["visual.proj.weight"] is Do.QUANTIZE
    assert decisions.do["visual.other.weight"] is Do.KEEP
    assert decisions.layout["visual.proj.weight"].role is Role.OTHER
    # One of them left undecided is still an error.
    assert refusal(MOE, found, *rules[:2]) == ["unknown: old.position_ids [1, 64]"]


def test_a_rule_takes_a_tensor_as_it_is_or_does_without() -> None:
    found = found_in(MOE)
    extra(found, "model.embed_tokens.weight", 80, 136)  # padded vocabulary
    del found["lm_head.weight"]
    assert len(refusal(MOE, found)) == 2
    decisions = decided(MOE, found, ("model.embed_tokens.weight", "keep"), ("lm_head.weight", "drop"))
    assert decisions.do["model.embed_tokens.weight"] is Do.KEEP
    assert "lm_head.weight" not in decisions.do


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (("*.mlp.gate.weight", "quantize"), "decides which expert runs"),
        (("lm_head.weight", "quantize"), "no quantization scheme"),
        (("model.embed_tokens.weight", "quantize"), "look rows up"),
        (("model.norm.weight", "quantize"), "no matrix of a linear layer"),
        (("model.layers.9.*", "keep"), "matches no tensor"),
        (
            ("model.layers.0.self_attn.q_proj.weight", "keep"),
            "engines load model.layers.0.self_attn.qkv_proj",
        ),
        (("model.layers.1.mlp.experts.3.*", "keep"), "engines load model.layers.1.mlp.experts. as one"),
        (("model.layers.0.mlp.up_proj.weight", "drop"), "decided apart"),
        (("odd.codes", "keep"), "it is U8; only"),
        (("odd.vector", "quantize"), "only matrices whose name ends in .weight"),
    ],
)
def test_a_rule_that_cannot_have_its_way_is_told_why(rule: tuple[str, Any], why: str) -> None:
    found = found_in(MOE)
    decided(MOE, found)
    if rule[0].startswith("odd."):
        extra(found, rule[0], 64, dtype="U8" if rule[0] == "odd.codes" else "BF16")
    lines = refusal(MOE, found, rule)
    assert all(why in line for line in lines)


def test_no_tensor_may_meet_two_rules() -> None:
    lines = refusal(MOE, found_in(MOE), ("model.layers.0.*", "keep"), ("*.o_proj.weight", "keep"))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert lines == [f"{name}: both rule 'model.layers.0.*' and rule '*.o_proj.weight' match it"]


def test_a_rule_is_checked_when_the_recipe_is_read() -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        TensorRule(tensors="re:(", do="keep")
    with pytest.raises(ValueError, match="Input should be"):
        TensorRule.model_validate({"tensors": "a", "do": "fp4"})
    assert TensorRule(tensors="model.layers.[01].*", do="keep").matches("model.layers.1.x")
    assert not TensorRule(tensors="layers", do="keep").matches("model.layers.1.x")
    assert not TensorRule(tensors="re:model", do="keep").matches("model.layers")
    spec = QuantizeSpec.model_validate({"rules": [{"tensors": "a", "do": "keep"}]})
    assert spec.digest != QuantizeSpec().digest != QuantizeSpec(mtp="keep").digest


@pytest.mark.parametrize("dialect", ["compressed-tensors", "deepseek"])
def test_what_a_rule_keeps_is_said_in_the_config_and_read_back(dialect: Any, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", MOE)
    rules = (
        TensorRule(tensors="model.layers.0.*", do="keep"),
        TensorRule(tensors="model.layers.1.self_attn.o_proj.weight", do="keep"),
    )
    run(source, tmp_path / "out", dialect=dialect, rules=rules)
    opened = WeightCheckpoint.open(tmp_path / "out")
    assert {name.split(".")[2] for name in opened.quantized} == {"1"}
    assert "model.layers.1.self_attn.q_proj.weight" in opened.quantized
    assert "model.layers.1.self_attn.o_proj.weight" not in opened.quantized
    stated = opened.raw_config["quantization_config"]
    skipped = stated["ignore" if dialect == "compressed-tensors" else "modules_to_not_convert"]
    assert {"lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"} <= set(skipped)
    other = "deepseek" if dialect == "compressed-tensors" else "compressed-tensors"
    relabel(tmp_path / "out", tmp_path / "other", other)  # type: ignore[arg-type]
    assert WeightCheckpoint.open(tmp_path / "other").quantized.keys() == opened.quantized.keys()


# ---- prediction layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["compressed-tensors", "deepseek"])
@pytest.mark.parametrize("mtp", ["drop", "keep", "quantize"])
@pytest.mark.parametrize(
    ("architecture", "engines"),
    [
        ("DeepseekV3ForCausalLM", "(vllm, sglang: can)"),
        ("BailingMoeV2ForCausalLM", "(vllm: cannot load it; sglang: can)"),
    ],
)
def test_prediction_layers_go_as_the_recipe_says_and_the_output_says_so(
    architecture: str, engines: str, mtp: Any, dialect: Any, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "source", architecture, mtp_layers=1, num_nextn_predict_layers=1)
    said: list[str] = []
    manifest = run(source, tmp_path / "out", said, mtp=mtp, dialect=dialect)
    stored = Checkpoint.open(tmp_path / "out")
    there = {name: info.dtype for name, info in stored.tensors.items() if name.startswith("model.layers.2.")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == (0 if mtp == "drop" else 1)
    assert bool(there) == (mtp != "drop")
    assert ("F8_E4M3" in there.values()) == (mtp == "quantize")
    assert there.get("model.layers.2.eh_proj.weight", "BF16") == "BF16"
    done = {"drop": "left out", "keep": "kept as stored", "quantize": "quantized"}[mtp]
    assert any(f"1 multi-token prediction layer {done} {engines}" in line for line in said)
    assert manifest.metrics["prediction_layers"]["written"] == (0 if mtp == "drop" else 1)
    opened = WeightCheckpoint.open(tmp_path / "out")  # the config says which modules are codes
    assert any(name.startswith("model.layers.2.") for name in opened.quantized) == (mtp == "quantize")


def test_a_prediction_layer_that_is_kept_whole_takes_one_line_of_the_config(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", "DeepseekV3ForCausalLM", mtp_layers=1)
    run(source, tmp_path / "out", mtp="keep")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["ignore"] == [
        "model.embed_tokens",
        r"re:.*\.mlp\.gate$",
        r"re:.*\.layers\.2\..*",
        "lm_head",
    ]


def test_a_config_that_promises_layers_which_are_not_there_is_corrected(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", "DeepseekV3ForCausalLM", num_nextn_predict_layers=1)
    run(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0


# ---- quantized already ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ({"quant_method": "mxfp4"}, "MXFP4, as the model was trained"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ packing"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
            "fp8-block",
        ),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantized_source_is_refused_with_what_it_is(
    stated: dict[str, Any], why: str, key: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {key: stated}
    source = write_tiny(tmp_path / "source", "LlamaForCausalLM", **changes)
    with pytest.raises(BadInput, match="quantized already") as caught:
        run(source, tmp_path / "out")
    assert why in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_quantized_source_whose_config_does_not_say_so_is_recognised(tmp_path: Path) -> None:
    import torch

    raw = tiny_config("LlamaForCausalLM")
    tensors = random_tensors(layout_of(raw))
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    source = write_tensors(tmp_path / "source", raw, tensors)
    with pytest.raises(BadInput, match=f"{name} is F8_E4M3, though config.json does not"):
        run(source, tmp_path / "out")
