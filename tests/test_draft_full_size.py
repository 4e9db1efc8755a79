"""The draft of the real recipe at its full size: what its config says; vLLM's own class takes it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from packager.context import yarn_patch
from packager.draft.config import draft_config, rope_of, tensor_shapes
from packager.draft.validator import _config_problems
from packager.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE = load_recipe(RECIPES / "antangelmed-fp8-eagle3-128k-h20.yaml")
# Ids stand in a checkpoint's config.json, not in the shape that is shipped; these are near its end.
IDS = {"bos_token_id": 156891, "eos_token_id": 156892, "pad_token_id": 156892}


@pytest.fixture(scope="module")
def target() -> dict[str, Any]:
    shape = json.loads((RECIPES / "ling-flash-2.0.json").read_text())
    return yarn_patch(shape | IDS, RECIPE.context.length)


@pytest.fixture(scope="module")
def config(target: dict[str, Any]) -> dict[str, Any]:
    return draft_config(target, RECIPE.draft)


def test_token_ids_are_the_targets_and_within_its_vocabulary(config: dict[str, Any]) -> None:
    assert {name: config[name] for name in IDS} == IDS
    assert (config["vocab_size"], config["draft_vocab_size"]) == (157184, 32000)
    assert max(IDS.values()) < config["vocab_size"]


def test_a_target_that_states_no_ids_gets_none_made_up() -> None:
    shape = json.loads((RECIPES / "ling-flash-2.0.json").read_text())
    assert not set(IDS) & draft_config(shape, RECIPE.draft).keys()


def test_rotary_embedding_is_the_targets_at_128k(config: dict[str, Any], target: dict[str, Any]) -> None:
    assert rope_of(config) == rope_of(target)
    assert rope_of(config) == {
        "rope_theta": 600000,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    assert config["max_position_embeddings"] == 131072
    assert config["rope_theta"] == 600000  # old readers look here
    assert config["rope_scaling"]["factor"] == 4.0


def test_heads_are_the_targets(config: dict[str, Any]) -> None:
    assert config["num_key_value_heads"] == 4
    assert (config["num_attention_heads"], config["head_dim"], config["hidden_size"]) == (32, 128, 4096)


def test_layers_are_those_that_both_engines_choose_by_default(config: dict[str, Any]) -> None:
    """vLLM and SGLang: (2, n // 2, n - 3); SGLang adds one to ids that a config lists."""
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 32 // 2, 32 - 3]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 15, 28]


def test_the_validator_has_nothing_to_say(config: dict[str, Any], target: dict[str, Any]) -> None:
    assert _config_problems(config, target, portable=True) == []


def test_size_is_that_of_the_shapes(config: dict[str, Any]) -> None:
    shapes = tensor_shapes(config)
    assert shapes["fc.weight"] == (4096, 3 * 4096)
    assert shapes["midlayer.self_attn.k_proj.weight"] == (4 * 128, 2 * 4096)
    parameters = sum(
        shape[0] * (shape[1] if len(shape) == 2 else 1)
        for name, shape in shapes.items()
        if name not in ("d2t", "t2d")
    )
    inner, hidden = 9216, 4096
    attention = (32 + 4 + 4) * 128 * 2 * hidden + hidden * hidden
    norms = 4 * hidden
    assert parameters == 3 * hidden**2 + attention + 3 * hidden * inner + 32000 * hidden + norms


# vLLM keeps its process groups and its config in globals, so it gets a process of its own.
_ON_META = """
import json, sys, torch
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import llama_eagle3
from packager.bailing.vllm_plugin import register
from packager.draft.config import tensor_shapes

target, port, window = sys.argv[1:]
register()
engine = EngineArgs(
    model=target, skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16",
    speculative_config={"method": "eagle3", "model": target + "/draft", "num_speculative_tokens": 4},
).create_engine_config()
loaded = set()

class Recording(llama_eagle3.AutoWeightsLoader):
    def load_weights(self, *args, **kwargs):
        found = super().load_weights(*args, **kwargs)
        if isinstance(self.module, llama_eagle3.Eagle3LlamaForCausalLM):
            loaded.update(found)
        return found

llama_eagle3.AutoWeightsLoader = Recording
config = json.load(open(target + "/draft/config.json"))
kinds = {"d2t": torch.int64, "t2d": torch.bool}
shapes = tensor_shapes(config)

def weights(**changed):
    for name, shape in (shapes | changed).items():
        yield name, torch.empty(shape, dtype=kinds.get(name, torch.bfloat16), device="meta")

with set_current_vllm_config(engine):
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
    initialize_model_parallel(1, 1)
    with torch.device("meta"):
        model = llama_eagle3.Eagle3LlamaForCausalLM(vllm_config=engine)
    model.load_weights(weights())
    refused = []
    for wrong in ({"fc.weight": (4096, 4096)}, {"midlayer.unknown.weight": (1,)}):
        try:
            model.load_weights(weights(**wrong))
        except (AssertionError, ValueError, KeyError, RuntimeError) as err:
            refused.append(type(err).__name__)
    draft = engine.speculative_config.draft_model_config
    draft.hf_config.update(json.loads(window))
    with torch.device("meta"):
        windowed = llama_eagle3.Eagle3LlamaForCausalLM(vllm_config=engine, prefix="windowed")
rope = model.model.layers[0].self_attn.rotary_emb
print("RESULT" + json.dumps({
    "meta": all(p.is_meta for p in model.parameters()),
    "parameters": sorted(name for name, _ in model.named_parameters()),
    "loaded": sorted(loaded),
    "refused": refused,
    "qkv": list(model.model.layers[0].self_attn.qkv_proj.weight.shape),
    "kv_heads": model.model.layers[0].self_attn.total_num_kv_heads,
    "rope": [type(rope).__name__, rope.rotary_dim, rope.base, rope.scaling_factor,
             rope.max_position_embeddings],
    "windows": [built.model.layers[0].self_attn.attn.sliding_window for built in (model, windowed)],
    "max_model_len": [engine.model_config.max_model_len, draft.max_model_len],
    "vocabulary": [draft.hf_config.vocab_size, draft.hf_config.draft_vocab_size],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="no vllm")
def test_vllms_own_draft_class_takes_every_tensor_at_full_size(
    config: dict[str, Any], target: dict[str, Any], tmp_path: Path
) -> None:
    """Built and loaded on meta tensors: names and shapes are vLLM's, 128K of YaRN on theta 600000."""
    (tmp_path / "draft").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(target))
    (tmp_path / "draft/config.json").write_text(json.dumps(config))
    with_window = draft_config(target, RECIPE.draft.model_copy(update={"sliding_window": 2048}))
    window = {name: value for name, value in with_window.items() if name not in config}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-c", _ON_META, str(tmp_path), str(port), json.dumps(window)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=RECIPES.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("RESULT")[2])
    assert found["meta"]
    shared = {"model.embed_tokens.weight"}  # the target's own
    assert set(found["parameters"]) - set(found["loaded"]) == shared
    assert len(found["refused"]) == 2, "vLLM took a wrong shape or an unknown name"
    assert found["qkv"] == [(32 + 2 * 4) * 128, 2 * 4096]
    assert found["kv_heads"] == 4
    assert found["rope"] == ["YaRNScalingRotaryEmbedding", 128, 600000, 4.0, 32768]
    assert found["windows"] == [None, 2048], "what an export with a window says reaches the attention"
    assert found["max_model_len"] == [131072, 131072]
    assert found["vocabulary"] == [157184, 32000]
