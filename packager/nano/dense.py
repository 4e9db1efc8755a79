"""The dense baseline: a Llama-like decoder, to the nano's active parameters what 36.15 B is to 6.15 B.

Made from a seed when it is needed: only its speed counts, never its answers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from packager.nano import CHECKPOINT
from packager.nano.architecture import CONFIG, TRAINED_LENGTH

RATIO = 36.15 / 6.15
"""Dense parameters to active parameters of the pair this stands for (Seed-OSS-36B, Ling-flash-2.0)."""

_SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": CONFIG["vocab_size"],
    "hidden_size": 384,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": CONFIG["rope_theta"],
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": CONFIG["bos_token_id"],
    "pad_token_id": CONFIG["pad_token_id"],
    "eos_token_id": CONFIG["eos_token_id"],
}


def active_parameters(config: dict[str, Any]) -> int:
    """Parameters that take part in one token of the nano: everything but the experts not chosen."""
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    heads = config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    attention = (
        hidden * heads * config["head_dim"] + config["num_attention_heads"] * config["head_dim"] * hidden
    )
    norms = 2 * hidden + 2 * config["head_dim"]
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    experts = config["num_experts_per_tok"] + config["num_shared_experts"]
    sparse = 3 * hidden * inner * experts + config["num_experts"] * (hidden + 1)
    total = 2 * config["vocab_size"] * hidden + hidden + layers * (attention + norms)
    return int(total + dense * 3 * hidden * config["intermediate_size"] + (layers - dense) * sparse)


def dense_config(length: int) -> dict[str, Any]:
    """The baseline's config.json: as deep as the nano, its feed-forward as wide as the ratio asks.

    Args:
        length: `max_position_embeddings`, in tokens.
    """
    hidden, layers = _SHAPE["hidden_size"], CONFIG["num_hidden_layers"] + 2
    heads = _SHAPE["num_attention_heads"] + 2 * _SHAPE["num_key_value_heads"]
    attention = hidden * (heads + _SHAPE["num_attention_heads"]) * _SHAPE["head_dim"]
    rest = RATIO * active_parameters(CONFIG) - 2 * _SHAPE["vocab_size"] * hidden - layers * attention
    width = round(rest / layers / (3 * hidden) / 128) * 128
    return _SHAPE | {
        "num_hidden_layers": layers,
        "intermediate_size": width,
        "max_position_embeddings": length,
    }


def write_dense(
    out: Path, seed: int = 0, *, tokenizer: Path = CHECKPOINT, length: int = 4 * TRAINED_LENGTH
) -> Path:
    """Write the baseline as a BF16 checkpoint.

    Args:
        out: directory to make.
        seed: of the random weights.
        tokenizer: a checkpoint directory whose tokenizer files are taken.
        length: `max_position_embeddings`, in tokens.
    """
    import torch
    from safetensors.torch import save_file

    config = dense_config(length)
    generator = torch.Generator().manual_seed(seed)
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    for n in range(config["num_hidden_layers"]):
        stem = f"model.layers.{n}"
        shapes |= {
            f"{stem}.input_layernorm.weight": (hidden,),
            f"{stem}.post_attention_layernorm.weight": (hidden,),
            f"{stem}.self_attn.q_proj.weight": (query, hidden),
            f"{stem}.self_attn.k_proj.weight": (key, hidden),
            f"{stem}.self_attn.v_proj.weight": (key, hidden),
            f"{stem}.self_attn.o_proj.weight": (hidden, query),
            f"{stem}.mlp.gate_proj.weight": (width, hidden),
            f"{stem}.mlp.up_proj.weight": (width, hidden),
            f"{stem}.mlp.down_proj.weight": (hidden, width),
        }
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(tokenizer / name, out / name)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = length
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    # config.json last: a directory without it is no checkpoint.
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out
