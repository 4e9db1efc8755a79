"""The architectures whose tensors are known, each as its public checkpoints store them.

Names and shapes: the model classes of transformers 5 and what its `save_pretrained` writes, which is what
public checkpoints hold (experts one by one, although transformers fuses them in memory). Groups: the fused
linear layers of vLLM's model classes (`packed_modules_mapping`, `FusedMoE`). DeepSeek-V3's prediction layers:
vLLM's `deepseek_mtp.py`. BailingMoeV2: `modeling_bailing_moe_v2.py` in inclusionAI/Ling-V2.
"""

from __future__ import annotations

from packager.layouts.declaration import Architecture, Field, Role, Rule

_LAYER = "model.layers.{layer}."
_WIDTHS = (
    Field("vocab_size"),
    Field("hidden_size"),
    Field("num_hidden_layers"),
    Field("num_attention_heads"),
)
_HEADS = (
    *_WIDTHS,
    Field("num_key_value_heads", default="num_attention_heads"),
    Field("head_dim", default="hidden_size // num_attention_heads"),
    Field("tie_word_embeddings", "flag", False),
)
_HEAD_CHECKS = {
    "num_attention_heads % num_key_value_heads == 0": "num_attention_heads is not a multiple of "
    "num_key_value_heads",
}
_EXPERT_CHECKS = {"experts_per_token <= experts": "more experts a token than there are"}
_DENSE_CHECKS = {
    "first_k_dense_replace <= num_hidden_layers": "first_k_dense_replace exceeds num_hidden_layers"
}


def _mlp(
    prefix: str,
    role: Role,
    width: str,
    when: str,
    *,
    bias: str = "",
    names: str = "gate_proj up_proj down_proj",
) -> tuple[Rule, ...]:
    """The three matrices of a gated feed-forward; `bias` is the condition under which each has one."""
    rules: list[Rule] = []
    group = f"{prefix}gate_up_proj" if role is not Role.ROUTED_EXPERT else prefix.partition("{expert}")[0]
    for place, name in enumerate(names.split()):
        rows, columns = (width, "hidden_size") if place < 2 else ("hidden_size", width)
        joined = group if place < 2 or role is Role.ROUTED_EXPERT else ""
        rules.append(Rule(f"{prefix}{name}.weight", role, f"{rows}, {columns}", when, joined))
        if bias:
            rules.append(Rule(f"{prefix}{name}.bias", Role.BIAS, f"({rows},)", bias))
    return tuple(rules)


def _attention(bias: str = "", out_bias: str = "") -> tuple[Rule, ...]:
    """Query, key, value and output as separate matrices; the conditions under which they have biases."""
    prefix, rules = f"{_LAYER}self_attn.", []
    for name, heads in (
        ("q", "num_attention_heads"),
        ("k", "num_key_value_heads"),
        ("v", "num_key_value_heads"),
    ):
        shape, group = f"{heads} * head_dim, hidden_size", f"{prefix}qkv_proj"
        rules.append(Rule(f"{prefix}{name}_proj.weight", Role.QUERY_KEY_VALUE, shape, group=group))
        if bias:
            rules.append(Rule(f"{prefix}{name}_proj.bias", Role.BIAS, f"({heads} * head_dim,)", bias))
    out = "hidden_size, num_attention_heads * head_dim"
    rules.append(Rule(f"{prefix}o_proj.weight", Role.ATTENTION_OUTPUT, out))
    if out_bias:
        rules.append(Rule(f"{prefix}o_proj.bias", Role.BIAS, "(hidden_size,)", out_bias))
    return tuple(rules)


def _qk_norms() -> tuple[Rule, ...]:
    return tuple(Rule(f"{_LAYER}self_attn.{x}_norm.weight", Role.NORM, "(head_dim,)") for x in "qk")


def _fused_experts(width: str, when: str) -> tuple[Rule, ...]:
    """The experts of a layer as transformers 5 holds them in memory, and saves them if asked to."""
    prefix = f"{_LAYER}mlp.experts."
    return (
        Rule(f"{prefix}gate_up_proj", Role.FUSED_EXPERTS, f"experts, 2 * {width}, hidden_size", when),
        Rule(f"{prefix}down_proj", Role.FUSED_EXPERTS, f"experts, hidden_size, {width}", when),
    )


def _causal(*layer: Rule, embedding: str = "embed_tokens", tied_head: bool = True) -> tuple[Rule, ...]:
    """Embedding, layers with their two norms, final norm and head."""
    norms = (
        Rule(f"{_LAYER}input_layernorm.weight", Role.NORM, "(hidden_size,)"),
        Rule(f"{_LAYER}post_attention_layernorm.weight", Role.NORM, "(hidden_size,)"),
    )
    own = tuple(rule for rule in layer if rule.when == "mtp")
    head = Rule("lm_head.weight", Role.LM_HEAD, "vocab_size, hidden_size", "not tie_word_embeddings")
    # Some tied checkpoints store the head once more; engines skip it.
    again = Rule(head.name, head.role, head.shape, "tie_word_embeddings", optional=True)
    return (
        Rule(f"model.{embedding}.weight", Role.EMBEDDING, "vocab_size, hidden_size"),
        *own,
        *norms,
        *(rule for rule in layer if rule.when != "mtp"),
        Rule("model.norm.weight", Role.NORM, "(hidden_size,)"),
        head,
        *((again,) if tied_head else ()),
    )


def _prediction(norm: str, *more: Rule) -> tuple[Rule, ...]:
    """What a multi-token prediction layer has beside an ordinary layer; its norm's name differs."""
    return (
        Rule(f"{_LAYER}enorm.weight", Role.NORM, "(hidden_size,)", "mtp"),
        Rule(f"{_LAYER}hnorm.weight", Role.NORM, "(hidden_size,)", "mtp"),
        Rule(f"{_LAYER}eh_proj.weight", Role.MTP_PROJECTION, "hidden_size, 2 * hidden_size", "mtp"),
        Rule(f"{_LAYER}{norm}.weight", Role.NORM, "(hidden_size,)", "mtp"),
        *more,
    )


def _dense(
    name: str, model_type: str, fields: tuple[Field, ...], *attention: Rule, bias: str = ""
) -> Architecture:
    """A decoder with one feed-forward in every layer; `bias`: when its matrices have biases."""
    mlp = _mlp(f"{_LAYER}mlp.", Role.DENSE_MLP, "intermediate_size", "", bias=bias)
    return Architecture(
        name=name,
        model_types=(model_type,),
        fields=(*_HEADS, Field("intermediate_size"), *fields),
        checks=_HEAD_CHECKS,
        rules=_causal(*attention, *mlp),
    )


# Written by transformers before 4.32; every reader recomputes it.
_INV_FREQ = Rule(f"{_LAYER}self_attn.rotary_emb.inv_freq", Role.BUFFER, "(head_dim // 2,)", optional=True)

_BAILING_ATTENTION = f"{_LAYER}attention."
_BAILING_QKV = "(num_attention_heads + 2 * num_key_value_heads) * head_dim"

BAILING_MOE_V2 = Architecture(
    name="BailingMoeV2ForCausalLM",
    model_types=("bailing_moe", "bailing_moe_v2"),
    fields=(
        *_HEADS,
        Field("intermediate_size"),
        Field("moe_intermediate_size"),
        Field("moe_shared_expert_intermediate_size", default="moe_intermediate_size"),
        Field("first_k_dense_replace", "count", 0),
        Field("num_experts"),
        Field("num_experts_per_tok"),
        Field("num_shared_experts", "count", 0),
        Field("moe_router_enable_expert_bias", "flag", False),
        Field("use_qk_norm", "flag", False),
        Field("use_qkv_bias", "flag", False),
        Field("use_bias", "flag", False),
    ),
    derived={
        "sparse": "layer >= first_k_dense_replace",
        "shared_experts": "num_shared_experts",
        "shared_width": "moe_shared_expert_intermediate_size * num_shared_experts",
    },
    experts="num_experts",
    experts_per_token="num_experts_per_tok",
    checks={**_HEAD_CHECKS, **_EXPERT_CHECKS, **_DENSE_CHECKS},
    rope_theta=600000.0,
    mtp_engines=("sglang",),
    rules=_causal(
        *_prediction("final_layernorm"),
        Rule(
            f"{_BAILING_ATTENTION}query_key_value.weight",
            Role.QUERY_KEY_VALUE,
            f"{_BAILING_QKV}, hidden_size",
        ),
        Rule(f"{_BAILING_ATTENTION}query_key_value.bias", Role.BIAS, f"({_BAILING_QKV},)", "use_qkv_bias"),
        Rule(
            f"{_BAILING_ATTENTION}dense.weight",
            Role.ATTENTION_OUTPUT,
            "hidden_size, num_attention_heads * head_dim",
        ),
        Rule(f"{_BAILING_ATTENTION}dense.bias", Role.BIAS, "(hidden_size,)", "use_bias"),
        Rule(f"{_BAILING_ATTENTION}query_layernorm.weight", Role.NORM, "(head_dim,)", "use_qk_norm"),
        Rule(f"{_BAILING_ATTENTION}key_layernorm.weight", Role.NORM, "(head_dim,)", "use_qk_norm"),
        *_mlp(f"{_LAYER}mlp.", Role.DENSE_MLP, "intermediate_size", "not sparse"),
        Rule(f"{_LAYER}mlp.gate.weight", Role.ROUTER, "num_experts, hidden_size", "sparse"),
        Rule(
            f"{_LAYER}mlp.gate.expert_bias",
            Role.EXPERT_BIAS,
            "(num_experts,)",
            "sparse and moe_router_enable_expert_bias",
        ),
        *_mlp(f"{_LAYER}mlp.experts.{{expert}}.", Role.ROUTED_EXPERT, "moe_intermediate_size", "sparse"),
        *_mlp(
            f"{_LAYER}mlp.shared_experts.",
            Role.SHARED_EXPERT,
            "shared_width",
            "sparse and num_shared_experts > 0",
        ),
        embedding="word_embeddings",
        tied_head=False,
    ),
)

LLAMA = _dense(
    "LlamaForCausalLM",
    "llama",
    (Field("attention_bias", "flag", False), Field("mlp_bias", "flag", False)),
    *_attention("attention_bias", "attention_bias"),
    _INV_FREQ,
    bias="mlp_bias",
)

QWEN3 = _dense(
    "Qwen3ForCausalLM",
    "qwen3",
    (Field("attention_bias", "flag", False),),
    *_attention("attention_bias", "attention_bias"),
    *_qk_norms(),
)

SEED_OSS = _dense(
    "SeedOssForCausalLM",
    "seed_oss",
    (
        Field("attention_bias", "flag", True),
        Field("attention_out_bias", "flag", False),
        Field("mlp_bias", "flag", False),
    ),
    *_attention("attention_bias", "attention_out_bias"),
    bias="mlp_bias",
)

QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_types=("qwen3_moe",),
    fields=(
        *_HEADS,
        Field("intermediate_size"),
        Field("moe_intermediate_size"),
        Field("num_experts", aliases=("num_local_experts",)),
        Field("num_experts_per_tok"),
        Field("decoder_sparse_step", default=1),
        Field("mlp_only_layers", "layers", ()),
        Field("attention_bias", "flag", False),
    ),
    derived={"sparse": "layer not in mlp_only_layers and (layer + 1) % decoder_sparse_step == 0"},
    experts="num_experts",
    experts_per_token="num_experts_per_tok",
    checks={**_HEAD_CHECKS, **_EXPERT_CHECKS},
    rules=_causal(
        *_attention("attention_bias", "attention_bias"),
        *_qk_norms(),
        *_mlp(f"{_LAYER}mlp.", Role.DENSE_MLP, "intermediate_size", "not sparse"),
        Rule(f"{_LAYER}mlp.gate.weight", Role.ROUTER, "num_experts, hidden_size", "sparse"),
        *_mlp(
            f"{_LAYER}mlp.experts.{{expert}}.",
            Role.ROUTED_EXPERT,
            "moe_intermediate_size",
            "sparse and not fused",
        ),
        *_fused_experts("moe_intermediate_size", "sparse and fused"),
    ),
)

MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_types=("mixtral",),
    fields=(
        *_HEADS,
        Field("intermediate_size"),
        Field("num_local_experts", aliases=("num_experts",)),
        Field("num_experts_per_tok"),
    ),
    experts="num_local_experts",
    experts_per_token="num_experts_per_tok",
    rope_theta=1000000.0,
    checks={**_HEAD_CHECKS, **_EXPERT_CHECKS},
    rules=_causal(
        *_attention(),
        _INV_FREQ,
        Rule(f"{_LAYER}block_sparse_moe.gate.weight", Role.ROUTER, "experts, hidden_size", "not fused"),
        Rule(f"{_LAYER}mlp.gate.weight", Role.ROUTER, "experts, hidden_size", "fused"),
        *_mlp(
            f"{_LAYER}block_sparse_moe.experts.{{expert}}.",
            Role.ROUTED_EXPERT,
            "intermediate_size",
            "not fused",
            names="w1 w3 w2",
        ),
        *_fused_experts("intermediate_size", "fused"),
    ),
)

_MLA = f"{_LAYER}self_attn."
_MLA_FUSED = f"{_MLA}fused_qkv_a_proj"
_MLA_QUERY = "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)"

DEEPSEEK_V3 = Architecture(
    name="DeepseekV3ForCausalLM",
    model_types=("deepseek_v3",),
    fields=(
        *_WIDTHS,
        Field("tie_word_embeddings", "flag", False),
        Field("intermediate_size"),
        Field("moe_intermediate_size"),
        Field("n_routed_experts", aliases=("num_local_experts",)),
        Field("n_shared_experts", "count", null=0),
        Field("num_experts_per_tok"),
        Field("first_k_dense_replace", "count"),
        Field("moe_layer_freq", default=1),
        Field("q_lora_rank", "count", null=0),
        Field("kv_lora_rank"),
        Field("qk_nope_head_dim"),
        Field("qk_rope_head_dim"),
        Field("v_head_dim"),
        Field("attention_bias", "flag", False),
    ),
    derived={
        "sparse": "mtp or layer >= first_k_dense_replace and layer % moe_layer_freq == 0",
        "shared_experts": "n_shared_experts",
        "head_dim": "qk_nope_head_dim + qk_rope_head_dim",
        "rotary_dim": "qk_rope_head_dim",
    },
    experts="n_routed_experts",
    experts_per_token="num_experts_per_tok",
    checks={**_EXPERT_CHECKS, **_DENSE_CHECKS},
    mtp_engines=("vllm", "sglang"),
    rules=_causal(
        *_prediction(
            "shared_head.norm",
            Rule(f"{_LAYER}embed_tokens.weight", Role.EMBEDDING, "vocab_size, hidden_size", "mtp"),
            Rule(f"{_LAYER}shared_head.head.weight", Role.LM_HEAD, "vocab_size, hidden_size", "mtp"),
        ),
        Rule(
            f"{_MLA}q_a_proj.weight",
            Role.QUERY_KEY_VALUE,
            "q_lora_rank, hidden_size",
            "q_lora_rank > 0",
            _MLA_FUSED,
        ),
        Rule(f"{_MLA}q_a_proj.bias", Role.BIAS, "(q_lora_rank,)", "q_lora_rank > 0 and attention_bias"),
        Rule(f"{_MLA}q_a_layernorm.weight", Role.NORM, "(q_lora_rank,)", "q_lora_rank > 0"),
        Rule(f"{_MLA}q_b_proj.weight", Role.QUERY_KEY_VALUE, f"{_MLA_QUERY}, q_lora_rank", "q_lora_rank > 0"),
        Rule(f"{_MLA}q_proj.weight", Role.QUERY_KEY_VALUE, f"{_MLA_QUERY}, hidden_size", "q_lora_rank == 0"),
        Rule(
            f"{_MLA}kv_a_proj_with_mqa.weight",
            Role.QUERY_KEY_VALUE,
            "kv_lora_rank + qk_rope_head_dim, hidden_size",
            group=_MLA_FUSED,
        ),
        Rule(
            f"{_MLA}kv_a_proj_with_mqa.bias",
            Role.BIAS,
            "(kv_lora_rank + qk_rope_head_dim,)",
            "attention_bias",
        ),
        Rule(f"{_MLA}kv_a_layernorm.weight", Role.NORM, "(kv_lora_rank,)"),
        Rule(
            f"{_MLA}kv_b_proj.weight",
            Role.QUERY_KEY_VALUE,
            "num_attention_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank",
        ),
        Rule(f"{_MLA}o_proj.weight", Role.ATTENTION_OUTPUT, "hidden_size, num_attention_heads * v_head_dim"),
        Rule(f"{_MLA}o_proj.bias", Role.BIAS, "(hidden_size,)", "attention_bias"),
        *_mlp(f"{_LAYER}mlp.", Role.DENSE_MLP, "intermediate_size", "not sparse"),
        Rule(f"{_LAYER}mlp.gate.weight", Role.ROUTER, "n_routed_experts, hidden_size", "sparse"),
        Rule(f"{_LAYER}mlp.gate.e_score_correction_bias", Role.EXPERT_BIAS, "(n_routed_experts,)", "sparse"),
        *_mlp(
            f"{_LAYER}mlp.experts.{{expert}}.",
            Role.ROUTED_EXPERT,
            "moe_intermediate_size",
            "sparse and not fused",
        ),
        *_fused_experts("moe_intermediate_size", "sparse and fused"),
        *_mlp(
            f"{_LAYER}mlp.shared_experts.",
            Role.SHARED_EXPERT,
            "moe_intermediate_size * n_shared_experts",
            "sparse and n_shared_experts > 0",
        ),
    ),
)

GPT_OSS = Architecture(
    name="GptOssForCausalLM",
    model_types=("gpt_oss",),
    refused="its experts are MXFP4 as they were trained, about 4.25 bits a weight, and engines serve them "
    "so: FP8 or INT8 would be larger, INT4 hardly smaller, and none nearer to the model",
)

ARCHITECTURES = (BAILING_MOE_V2, QWEN3_MOE, DEEPSEEK_V3, MIXTRAL, LLAMA, QWEN3, SEED_OSS, GPT_OSS)
