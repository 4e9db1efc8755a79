"""Declarations against what transformers saves, and against the layout that BailingMoeV2 has always had."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_CONFIG
from tiny_architectures import TINY, random_tensors, tiny_config, write_tensors, write_tiny

from packager.bailing.config import BailingConfig
from packager.bailing.layout import expected_tensors
from packager.checkpoint import Checkpoint
from packager.cli import run as packager
from packager.errors import BadInput
from packager.layouts import (
    ARCHITECTURES,
    NEVER_QUANTIZED,
    QUANTIZABLE,
    Described,
    Do,
    Role,
    architecture_of,
    count_parameters,
    recognise,
)
from packager.layouts.expressions import evaluate

DECLARED = [name for name in TINY if name != "BailingMoeV2ForCausalLM"]

# Each differs from the tiny config of its architecture in what decides which tensors there are.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in DECLARED),
    *((name, {"tie_word_embeddings": True}) for name in DECLARED),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    ("LlamaForCausalLM", {"head_dim": None, "num_key_value_heads": None}),
    ("Qwen3ForCausalLM", {"attention_bias": True}),
    ("SeedOssForCausalLM", {"attention_bias": False}),
    ("SeedOssForCausalLM", {"attention_out_bias": True, "mlp_bias": True}),
    ("Qwen3MoeForCausalLM", {"attention_bias": True, "mlp_only_layers": []}),
    ("Qwen3MoeForCausalLM", {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("MixtralForCausalLM", {"head_dim": None, "num_local_experts": 3}),
    ("DeepseekV3ForCausalLM", {"attention_bias": True, "first_k_dense_replace": 2}),
    ("DeepseekV3ForCausalLM", {"q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2}),
]


def saved_by_transformers(path: Path, raw: dict[str, Any], **options: Any) -> Checkpoint:
    """What transformers writes for a model of that config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in raw.items() if key not in ("architectures", "torch_dtype")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    model.save_pretrained(path, **options)
    return Checkpoint.open(path)


def shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items()}


def declared(raw: dict[str, Any], names: Any = ()) -> dict[str, tuple[int, ...]]:
    return {want.name: want.shape for want in recognise(raw).tensors_in(names) if not want.optional}


@pytest.mark.parametrize(("architecture", "changes"), VARIANTS)
def test_a_declaration_is_what_transformers_saves(
    architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    raw = tiny_config(architecture, **changes)
    saved = saved_by_transformers(tmp_path, raw)
    assert declared(raw) == shapes(saved)
    # The config as transformers writes it spells some fields otherwise.
    assert declared(saved.config()) == shapes(saved)


@pytest.mark.parametrize(
    "architecture", ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"]
)
def test_experts_saved_as_transformers_fuses_them_in_memory_are_known_and_not_quantized(
    architecture: str, tmp_path: Path
) -> None:
    raw = tiny_config(architecture)
    saved = saved_by_transformers(tmp_path, raw, save_original_format=False)
    layout = recognise(raw).tensors_in(saved.tensors)
    assert {want.name: want.shape for want in layout if not want.optional} == shapes(saved)
    fused = [want for want in layout if want.role is Role.FUSED_EXPERTS]
    assert {want.name.rpartition(".")[2] for want in fused} == {"gate_up_proj", "down_proj"}
    assert all(len(want.shape) == 3 and want.decision is Do.KEEP for want in fused)
    assert not any(want.role is Role.ROUTED_EXPERT for want in layout)


def test_prediction_layers_of_deepseek_v3_are_those_that_transformers_loads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    # transformers looks for them at the index that they have in the public checkpoint.
    raw = tiny_config(
        "DeepseekV3ForCausalLM",
        num_hidden_layers=61,
        hidden_size=8,
        intermediate_size=8,
        vocab_size=16,
        first_k_dense_replace=60,
    )
    layout = [want for want in recognise(raw).tensors(mtp_layers=1) if not want.optional]
    own = random_tensors(layout)
    source = write_tensors(tmp_path / "source", raw, own)
    loaded = MtpModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source)).state_dict()
    names = {want.name.removeprefix("model.layers.61.") for want in layout if want.mtp}
    shared = {"embed_tokens.weight", "shared_head.head.weight"}
    renamed = {"shared_head.norm.weight": "post_norm.weight"}
    singles = {name for name in names - shared if ".experts." not in name}
    bare = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    wanted = {renamed.get(n, n) if n in bare else f"mtp_block.{n}" for n in singles}
    found = {n.removeprefix("layers.0."): value for n, value in loaded.items() if n.startswith("layers.0.")}
    assert {name for name in found if ".experts." not in name} == wanted
    assert torch.equal(found["eh_proj.weight"], own["model.layers.61.eh_proj.weight"])
    gate_up = found["mtp_block.mlp.experts.gate_up_proj"]
    up = own["model.layers.61.mlp.experts.3.up_proj.weight"]
    assert torch.equal(gate_up[3, up.shape[0] :], up)
    assert shared <= names


PUBLIC: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Meta-Llama-3.1-8B": (
        "LlamaForCausalLM",
        8_030_261_248,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": None,
        },
    ),
    "Mixtral-8x7B-v0.1": (
        "MixtralForCausalLM",
        46_702_792_704,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": None,
            "num_local_experts": 8,
        },
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeForCausalLM",
        30_532_122_624,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "mlp_only_layers": [],
        },
    ),
    "Seed-OSS-36B": (
        "SeedOssForCausalLM",
        36_151_104_512,
        {
            "vocab_size": 155136,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        671_026_419_200,
        {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "head_dim": None,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_of_public_models_are_those_of_the_model_class(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, parameters, fields = PUBLIC[name]
    raw = tiny_config(architecture, **fields)
    counted = count_parameters(recognise(raw))
    assert counted.total == parameters
    given = {key: value for key, value in raw.items() if key not in ("architectures", "torch_dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    assert counted.total == sum(
        tensor.numel() for key, tensor in model.state_dict().items() if "inv_freq" not in key
    )


def test_active_parameters_count_the_chosen_experts_only() -> None:
    raw = tiny_config("Qwen3MoeForCausalLM", **PUBLIC["Qwen3-30B-A3B"][2])
    counted = count_parameters(recognise(raw))
    idle = 48 * (128 - 8) * 3 * 768 * 2048
    assert counted.active == counted.total - idle
    dense = count_parameters(recognise(tiny_config("LlamaForCausalLM")))
    assert dense.active == dense.total


# Of `name role shape dtypes mtp`, a line a tensor, as the layout stated them before it became a declaration.
BEFORE: dict[str, tuple[dict[str, Any], int, str]] = {
    "as it is": ({}, 0, "b715bc8c1f69e3a2d71a55fcec1b39c3100bfcef20b7b33a1fbfc5151f22d5b1"),
    "one prediction layer": ({}, 1, "695a8713fb43a865940c7284329bf6a462286a8b91865abd7c4ebcd8b179ab75"),
    "two prediction layers, all dense": (
        {"first_k_dense_replace": 2},
        2,
        "9509c56777db2f50934a795008fb9bfe8d99160e959ae6af500af9b24f56e9b2",
    ),
    "tied": (
        {"tie_word_embeddings": True},
        0,
        "fec7aff31ba522df95243981c19d9c7b89000b227101544ad2590fcfe1bc7bc7",
    ),
    "biases": (
        {"use_qkv_bias": True, "use_bias": True},
        1,
        "00554f74012b5a9a2aa7ea44d99b732c4ac021c6398659ddbcd10b2df32ef0ca",
    ),
    "no norms, no bias of experts": (
        {"use_qk_norm": False, "moe_router_enable_expert_bias": False},
        0,
        "dd4eb6ee94a333a8166f02515a0a47ba8fb36959807f9bcbe1a8208159008a19",
    ),
    "wide shared experts": (
        {"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 192},
        0,
        "e7383a26f6ac07c2a41c5e5f272e345721f758ec2b8a95f99102141c808c2d4e",
    ),
    "no shared experts, derived head": (
        {"num_shared_experts": 0, "head_dim": None},
        0,
        "85a25c353de8030dbe256bce6b6823f72f60a09320dcc1d41564103413666d58",
    ),
    "all sparse": (
        {"first_k_dense_replace": 0, "num_experts": 12, "n_group": None, "topk_group": None},
        1,
        "0147d39cb4f8049fd5f882dd4fd2799b640a41a076cb9f6cff95275ec2b5e828",
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_bailing_is_declared_tensor_by_tensor_as_it_was_coded(case: str) -> None:
    changes, mtp_layers, digest = BEFORE[case]
    raw = {**TINY_CONFIG, **changes}
    parsed = expected_tensors(BailingConfig.parse(raw), mtp_layers)
    assert parsed == recognise(raw).tensors(mtp_layers=mtp_layers)
    lines = (f"{t.name} {t.role} {list(t.shape)} {','.join(t.dtypes)} {t.mtp}" for t in parsed)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


@pytest.mark.parametrize("architecture", TINY)
def test_no_tensor_is_declared_twice_and_each_role_has_one_decision(architecture: str) -> None:
    model = recognise(tiny_config(architecture))
    prediction = 2 if model.architecture.mtp_engines else 0
    for fused in (False, True):
        layout = model.tensors(mtp_layers=prediction, fused=fused)
        assert len({want.name for want in layout}) == len(layout)
        for want in layout:
            assert (want.role in QUANTIZABLE) != (want.role in NEVER_QUANTIZED)
            assert (want.decision is Do.QUANTIZE) == (want.role in QUANTIZABLE)
            assert want.mtp == (want.name.startswith(("model.layers.2.", "model.layers.3.")))


def test_matrices_that_the_public_fp8_release_of_deepseek_v3_holds_in_fp8_are_those_quantized() -> None:
    layout = recognise(tiny_config("DeepseekV3ForCausalLM")).tensors(mtp_layers=1)
    kinds: dict[Do, set[str]] = {Do.QUANTIZE: set(), Do.KEEP: set(), Do.DROP: set()}
    for want in layout:
        kinds[want.decision].add(want.name.removesuffix(".weight").rpartition(".")[2])
    mlp = {"gate_proj", "up_proj", "down_proj"}
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert kinds[Do.QUANTIZE] == mlp | attention
    kept = {"gate", "e_score_correction_bias", "embed_tokens", "lm_head", "head", "eh_proj"}
    assert kept <= kinds[Do.KEEP]
    assert kinds[Do.DROP] == set()


def test_gpt_oss_is_recognised_and_refused_with_the_reason() -> None:
    raw = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    assert architecture_of(raw).name == "GptOssForCausalLM"
    with pytest.raises(BadInput, match="MXFP4 as they were trained"):
        recognise(raw)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ({"architectures": ["OddForCausalLM"], "model_type": "odd"}, "OddForCausalLM is not known"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "qwen3"}, "is not of model_type 'qwen3'"),
        ({}, "an unnamed architecture is not known"),
        ({"architectures": "LlamaForCausalLM"}, "an unnamed architecture is not known"),
        ({"architectures": [["LlamaForCausalLM"]], "model_type": ["llama"]}, "is not known"),
    ],
)
def test_what_no_declaration_describes_is_named(raw: dict[str, Any], what: str) -> None:
    with pytest.raises(BadInput, match=what):
        recognise(raw)


def test_a_config_without_architectures_goes_by_its_model_type() -> None:
    raw = tiny_config("Qwen3ForCausalLM")
    del raw["architectures"]
    assert recognise(raw).architecture.name == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": -1}, "hidden_size: -1 is not a positive integer"),
        ({"hidden_size": True}, "hidden_size: True is not a positive integer"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok: '2' is not a positive integer"),
        ({"mlp_only_layers": [0, "1"]}, "is not a list of layers"),
        ({"attention_bias": 1}, "attention_bias: 1 is not true or false"),
        ({"num_experts": None}, "num_experts: null"),
        ({"num_local_experts": 8}, "num_experts 4 and num_local_experts 8 disagree"),
        ({"num_experts_per_tok": 9}, "more experts a token than there are"),
        ({"num_attention_heads": 3}, "not a multiple of"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers exceeds"),
        ({"num_experts": 10**9, "num_local_experts": 10**9}, "experts in all layers together"),
        ({"vocab_size": 1 << 60}, "vocab_size: 1152921504606846976 is not a positive integer"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(BadInput, match=what):
        recognise(tiny_config("Qwen3MoeForCausalLM", **changes))


def test_all_that_is_wrong_with_a_config_is_said_at_once() -> None:
    raw = tiny_config("DeepseekV3ForCausalLM", kv_lora_rank=0)
    for name in ("q_lora_rank", "hidden_size"):
        del raw[name]
    with pytest.raises(BadInput) as caught:
        recognise(raw)
    wrong = ("q_lora_rank: missing", "hidden_size: missing", "kv_lora_rank: 0 is not")
    assert all(text in caught.value.message for text in wrong)


def test_the_shape_of_a_model_is_told_in_common_terms() -> None:
    deepseek = tiny_config("DeepseekV3ForCausalLM", **PUBLIC["DeepSeek-V3"][2])
    assert recognise(deepseek).shape == {
        "layers": 61,
        "dense_layers": 3,
        "hidden_size": 7168,
        "heads": 128,
        "kv_heads": 128,
        "head_dim": 192,
        "experts": 256,
        "experts_per_token": 8,
        "shared_experts": 1,
        "vocabulary": 129280,
    }
    llama = recognise(tiny_config("LlamaForCausalLM")).shape
    assert (llama["dense_layers"], llama["experts"], llama["experts_per_token"]) == (2, 0, 0)


@pytest.mark.parametrize("architecture", TINY)
def test_inspect_names_every_architecture_and_finds_nothing_wrong(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tiny(tmp_path / "source", architecture)
    assert packager(["inspect", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == architecture
    assert found["problems"] == []
    stored = sum(info.count for info in Checkpoint.open(source).tensors.values())
    assert found["parameters"]["total"] == stored == found["weights"]["dtypes"]["BF16"]["elements"]
    assert packager(["inspect", str(source)]) == 0
    printed = capsys.readouterr().out
    assert architecture in printed
    assert ("routed" in printed) == bool(found["shape"]["experts"])


@pytest.mark.parametrize(("mtp_layers", "engines"), [(1, "vllm and sglang"), (0, "")])
def test_inspect_says_who_loads_prediction_layers(
    mtp_layers: int, engines: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tiny(tmp_path / "source", "DeepseekV3ForCausalLM", mtp_layers=mtp_layers)
    assert packager(["inspect", str(source), "--json"]) == 0
    said = " ".join(json.loads(capsys.readouterr().out)["notes"])
    assert ("prediction layer" in said) == bool(mtp_layers)
    assert engines in said


def test_inspect_of_gpt_oss_says_why_it_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}')
    assert packager(["inspect", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert "GptOssForCausalLM" in said and "MXFP4" in said


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"max_position_embeddings": None}, "max_position_embeddings None"),
        ({"rope_theta": "big"}, "rope_theta 'big' is not a positive number"),
        ({"rope_scaling": [1]}, "rope_scaling is no JSON object"),
        ({"quantization_config": "fp8"}, "quantization_config is no JSON object"),
    ],
)
def test_fields_beside_the_shape_are_checked_too(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(BadInput, match=what):
        Described.parse(tiny_config("LlamaForCausalLM", **changes))


def test_rope_is_read_wherever_transformers_puts_it() -> None:
    old = Described.parse(tiny_config("Qwen3ForCausalLM", rope_theta=1e6, partial_rotary_factor=0.5))
    inner = {"rope_theta": 1e6, "partial_rotary_factor": 0.5, "rope_type": "default"}
    new = Described.parse(tiny_config("Qwen3ForCausalLM", rope_parameters=inner))
    assert (old.rope_theta, old.rotary_dim) == (new.rope_theta, new.rotary_dim) == (1e6, 20)
    assert Described.parse(tiny_config("DeepseekV3ForCausalLM")).rotary_dim == 16


def test_every_architecture_states_why_it_is_refused_or_has_rules() -> None:
    assert all(bool(known.refused) != bool(known.rules) for known in ARCHITECTURES)


def test_expressions_are_arithmetic_and_nothing_else() -> None:
    fields: dict[str, Any] = {"a": 6, "b": 4, "some": (1, 2)}
    assert evaluate("a * (b + 2) // 5 - a % b, (b,)", fields.__getitem__) == (5, (4,))
    assert evaluate("a in some or not b <= 3 and a == 6", fields.__getitem__) is True
    assert evaluate("a if 2 not in some else b", fields.__getitem__) == 4
    for text in ("a.b", "a(b)", "a[0]", "'a'", "a ** b", "1 < a < 3", "1.5", "[a]", "lambda: a"):
        with pytest.raises(ValueError, match="no place in a declaration"):
            evaluate(text, fields.__getitem__)
