"""The draft's config.json, derived from its target's so that vLLM and SGLang read the same positions and
tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packager.errors import BadInput
from packager.recipe import DraftSpec

ARCHITECTURE = "LlamaForCausalLMEagle3"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Theta and scaling of a config, whichever of `rope_parameters` and `rope_scaling` states them.

    Keys: `rope_theta`, `rope_type` (`default` without scaling) and the scaling's own numbers. The rotary
    share is left out: a Llama draft rotates whole heads whatever its target does.
    """
    stated = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = stated.pop("rope_type", None) or stated.pop("type", None) or "default"
    stated.pop("type", None)
    theta = stated.get("rope_theta") or config.get("rope_theta")
    scaling = {key: value for key, value in stated.items() if key not in _NOT_SCALING and value is not None}
    return {"rope_theta": theta, "rope_type": kind, **scaling}


def check_aux_layers(aux_layers: tuple[int, ...], layers: int) -> None:
    """Raise BadInput unless the ids are ascending, distinct and inputs of layers of the target."""
    if not aux_layers or list(aux_layers) != sorted(set(aux_layers)):
        raise BadInput(
            f"aux layers {list(aux_layers)} must be ascending and distinct", "Correct draft.aux_layers."
        )
    if aux_layers[0] < 1 or aux_layers[-1] > layers:
        raise BadInput(
            f"aux layers {list(aux_layers)} are not among 1 … {layers} of the target's layers",
            "Id j means the input of layer j, that is the output of layer j - 1.",
        )


def draft_config(target: Mapping[str, Any], spec: DraftSpec) -> dict[str, Any]:
    """config.json of a one-layer draft for a target with config `target`.

    Auxiliary ids stand twice, because the engines count differently (vLLM 0.32 v1/worker/gpu_model_runner.py
    reads the top level first and takes id j as the input of layer j; SGLang's set_eagle3_layers_to_capture
    reads `eagle_config` alone and adds one).

    A sliding window stands as `sliding_window` with `layer_types`: vLLM's llama.py takes the former only
    where the latter says so. It does so in a running engine: a nano draft given a window of 16 served an
    acceptance length of 2.480 at K = 3, predicted with that window 2.467, without it 3.292. SGLang's
    llama_eagle3.py reads neither; it has `--speculative-draft-window-size`.

    Raises:
        BadInput: the recipe's aux layers or draft vocabulary do not fit the target.
    """
    check_aux_layers(spec.aux_layers, target["num_hidden_layers"])
    hidden = target["hidden_size"]
    rope = rope_of(target)
    scaled = rope["rope_type"] != "default"
    if scaled:  # as the patch of the target's own config spells it: a test holds the two together
        rope = {**rope, "type": rope["rope_type"]}
    window = (
        {"sliding_window": spec.sliding_window, "layer_types": ["sliding_attention"]}
        if spec.sliding_window is not None
        else {}
    )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": target["vocab_size"],
        "draft_vocab_size": spec.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": spec.intermediate_size or 4 * hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": target["num_attention_heads"],
        "num_key_value_heads": target["num_key_value_heads"],
        "head_dim": target.get("head_dim") or hidden // target["num_attention_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": target.get("rms_norm_eps", 1e-6),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": target["max_position_embeddings"],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": dict(rope) if scaled else None,
        "rope_parameters": rope,
        **window,
        **{key: target[key] for key in TOKEN_IDS if target.get(key) is not None},
        "eagle_aux_hidden_state_layer_ids": list(spec.aux_layers),
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in spec.aux_layers],
        },
    }


def window_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that a draft with this config attends to, as vLLM reads it; None: all."""
    window = config.get("sliding_window")
    return int(window) if window and config.get("layer_types") == ["sliding_attention"] else None


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a one-layer draft with this config, `d2t` and `t2d` included."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    aux = len(config["eagle_aux_hidden_state_layer_ids"])
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "input_layernorm": (hidden,),
        "hidden_norm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, 2 * hidden),
        "self_attn.k_proj": (keys, 2 * hidden),
        "self_attn.v_proj": (keys, 2 * hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        "fc.weight": (hidden, aux * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
        **{f"midlayer.{name}.weight": shape for name, shape in layer.items()},
        "d2t": (config["draft_vocab_size"],),
        "t2d": (config["vocab_size"],),
    }
