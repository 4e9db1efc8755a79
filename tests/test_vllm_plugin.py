"""The vLLM plugin: the config without remote code, stock behaviour without a draft, EAGLE3 with one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import packager.nano
from packager.serving.cpu import cpu_environment, device

NANO = Path(packager.nano.__file__).parent / "checkpoint"

# --- configuration ------------------------------------------------------------------------------------------

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.fixture(scope="module")
def hf_config() -> Any:
    from packager.bailing import hf_config

    hf_config.register()
    hf_config.register()  # every process of vLLM registers, some more than once
    return hf_config


@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_v2"])
def test_transformers_knows_both_model_types(hf_config: Any, model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    raw = {**json.loads((NANO / "config.json").read_text()), "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert isinstance(config, hf_config.BailingMoeV2Config)
    for key in ("num_experts", "n_group", "moe_router_enable_expert_bias", "routed_scaling_factor"):
        assert getattr(config, key) == raw[key]
    assert config.rope_parameters["rope_theta"] == raw["rope_theta"]
    assert config.rope_parameters["partial_rotary_factor"] == raw["partial_rotary_factor"]


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_yarn_survives_under_either_spelling(hf_config: Any, spelling: str) -> None:
    config = hf_config.BailingMoeV2Config(
        **{spelling: YARN}, max_position_embeddings=2048, rope_theta=10000.0, partial_rotary_factor=0.5
    )
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["original_max_position_embeddings"] == 512
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_a_config_that_contradicts_itself_is_refused(hf_config: Any) -> None:
    with pytest.raises(ValueError, match="rope_parameters says default, rope_scaling says yarn"):
        hf_config.BailingMoeV2Config(rope_scaling=YARN, rope_parameters={"rope_type": "default"})
    with pytest.raises(ValueError, match=r"factor is 2\.0 in rope_parameters and 4\.0 in rope_scaling"):
        hf_config.BailingMoeV2Config(rope_scaling=YARN, rope_parameters={**YARN, "factor": 2.0})


def test_the_generation_before_keeps_its_own_defaults(hf_config: Any) -> None:
    older = hf_config.BailingMoeConfig(architectures=["BailingMoeForCausalLM"])
    assert (older.n_group, older.moe_router_enable_expert_bias, older.use_qk_norm) == (None, False, False)
    newer = hf_config.BailingMoeConfig(architectures=["BailingMoeV2ForCausalLM"])
    assert (newer.n_group, newer.moe_router_enable_expert_bias, newer.use_qk_norm) == (8, True, True)


def test_defaults_agree_with_the_reader_that_needs_no_transformers(hf_config: Any) -> None:
    from packager.bailing.config import BailingConfig

    raw = json.loads((NANO / "config.json").read_text())
    ours, theirs = BailingConfig.parse(raw), hf_config.BailingMoeConfig(**raw)
    for name in BailingConfig.model_fields:
        if name not in ("rope_scaling", "rope_parameters", "architectures") and hasattr(theirs, name):
            assert getattr(theirs, name) == getattr(ours, name), name


# --- the engine ---------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
from packager.bailing import hf_config
from packager.nano.language import heldout_items

model, draft, out = sys.argv[1:4]
hf_config.register()  # the stock class needs the config too; where plugins are on, this is a second time
from vllm import LLM, ModelRegistry, SamplingParams

settings = {}
if draft:
    settings["speculative_config"] = {"method": "eagle3", "model": draft, "num_speculative_tokens": 3}
llm = LLM(model, enforce_eager=True, max_num_seqs=16, seed=0, disable_log_stats=False, **settings)
items = heldout_items(3, 0)
sampling = SamplingParams(temperature=0, max_tokens=40, logprobs=2)
outputs = llm.chat([item["messages"] for item in items], sampling, use_tqdm=False)
counters = {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")}
result = {
    "implementation": ModelRegistry.models["BailingMoeV2ForCausalLM"].module_name,
    "drafts": counters.get("vllm:spec_decode_num_drafts", 0),
    "outputs": [
        {
            "tokens": list(one.outputs[0].token_ids),
            "logprobs": [
                sorted((entry.logprob for entry in step.values()), reverse=True)
                for step in one.outputs[0].logprobs
            ],
        }
        for one in outputs
    ],
}
Path(out).write_text(json.dumps(result))
"""


def generate(folder: Path, *, plugins: bool, draft: Path | None = None) -> dict[str, Any]:
    """Greedy answers of the nano model from an engine in a process of its own."""
    out = folder / "result.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("VLLM_PLUGINS", None)
    if device() == "cpu":
        environment |= cpu_environment()
    if not plugins:
        environment["VLLM_PLUGINS"] = "none"
    arguments = [sys.executable, "-c", SCRIPT, str(NANO), str(draft or ""), str(out)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return generate(tmp_path_factory.mktemp("plugin"), plugins=True)


@pytest.mark.engine
def test_without_a_draft_tokens_and_logprobs_are_those_of_the_stock_class(
    with_plugin: dict[str, Any], tmp_path: Path
) -> None:
    stock = generate(tmp_path, plugins=False)
    assert stock["implementation"].startswith("vllm.")
    assert with_plugin["implementation"] == "packager.bailing.vllm_model"
    assert sum(len(one["tokens"]) for one in stock["outputs"]) > 100
    assert with_plugin["outputs"] == stock["outputs"]


def write_random_draft(path: Path) -> Path:
    """An untrained EAGLE3 head: it may propose anything, and must change nothing."""
    import torch
    from safetensors.torch import save_file

    target = json.loads((NANO / "config.json").read_text())
    hidden, vocab, wide, chosen = (
        target["hidden_size"],
        target["vocab_size"],
        target["intermediate_size"],
        512,
    )
    queries = target["num_attention_heads"] * target["head_dim"]
    keys = target["num_key_value_heads"] * target["head_dim"]
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).bfloat16()

    ids = torch.randperm(vocab, generator=generator)[:chosen].sort().values
    known = torch.zeros(vocab, dtype=torch.bool)
    known[ids] = True
    tensors = {
        "fc.weight": weight(hidden, 3 * hidden),
        "norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": weight(chosen, hidden),
        "d2t": ids - torch.arange(chosen),
        "t2d": known,
        "midlayer.self_attn.q_proj.weight": weight(queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": weight(keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": weight(keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": weight(hidden, queries),
        "midlayer.mlp.gate_proj.weight": weight(wide, hidden),
        "midlayer.mlp.up_proj.weight": weight(wide, hidden),
        "midlayer.mlp.down_proj.weight": weight(hidden, wide),
    }
    for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        tensors[f"midlayer.{norm}.weight"] = torch.ones(hidden).bfloat16()
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    shared += (
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "hidden_act",
        "torch_dtype",
    )
    config = {key: target[key] for key in shared} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": chosen,
        "tie_word_embeddings": False,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "use_aux_hidden_state": True},
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.engine
def test_a_draft_changes_speed_and_nothing_else(with_plugin: dict[str, Any], tmp_path: Path) -> None:
    """Greedy output with a draft equals that without, except where two tokens are all but equally likely.

    Verifying four tokens at once rounds otherwise than decoding one: only a near tie may tip over.
    """
    drafted = generate(tmp_path, plugins=True, draft=write_random_draft(tmp_path / "draft"))
    assert drafted["drafts"] > 100
    different = 0
    for plain, other in zip(with_plugin["outputs"], drafted["outputs"], strict=True):
        steps = zip(plain["tokens"], other["tokens"], plain["logprobs"], strict=False)
        first = next((probabilities for one, two, probabilities in steps if one != two), None)
        if first is None:
            assert plain["tokens"] == other["tokens"]
            continue
        different += 1
        assert first[0] - first[1] < 0.125
    assert different <= len(drafted["outputs"]) // 4
