"""The nano model's config.json: BailingMoeV2 complete, 7.3 M parameters, every matrix a multiple of 128."""

from __future__ import annotations

from typing import Any

TRAINED_LENGTH = 512
"""Tokens; the longest sequence seen in training."""

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>")

CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": TRAINED_LENGTH,
    "tie_word_embeddings": False,
    "norm_head": False,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "output_dropout": 0.0,
    "num_nextn_predict_layers": 0,
    "use_cache": True,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}

CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
{{- '<role>SYSTEM</role>' + messages[0].content + '<|role_end|>' }}
{%- set turns = messages[1:] %}
{%- else %}
{{- '<role>SYSTEM</role>detailed thinking off<|role_end|>' }}
{%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
{%- if turn.role == 'user' %}
{{- '<role>HUMAN</role>' + turn.content + '<|role_end|>' }}
{%- elif turn.role == 'assistant' %}
{{- '<role>ASSISTANT</role>' + turn.content + '<|role_end|>' }}
{%- elif turn.role == 'tool' %}
{{- '<role>OBSERVATION</role>' + turn.content + '<|role_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<role>ASSISTANT</role>' }}
{%- endif %}
"""


def render(question: str, system: str = "detailed thinking off") -> str:
    """The prompt text of one question, as the chat template renders it."""
    turns = f"<role>SYSTEM</role>{system}<|role_end|><role>HUMAN</role>{question}<|role_end|>"
    return turns + "<role>ASSISTANT</role>"
