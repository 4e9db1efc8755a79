"""The transformers configuration of BailingMoeV2, so that no code inside a checkpoint is ever run.

transformers does not know `bailing_moe` or `bailing_moe_v2`, so stock vLLM asks for `trust_remote_code`.
Registering these classes (vllm_plugin beside this file does it in every vLLM process) removes that need.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

_ROPE_IDENTITY = ("factor", "original_max_position_embeddings", "rope_theta")


def _rope_type(parameters: dict[str, Any]) -> str:
    return str(parameters.get("rope_type", parameters.get("type", "default")))


def rope_disagreement(parameters: dict[str, Any] | None, scaling: dict[str, Any] | None) -> str | None:
    """Say how `rope_parameters` and `rope_scaling` of one config contradict each other; None if they do not.

    transformers 5 lets the former win in silence, so a YaRN patch written only into the latter is lost.
    """
    if not parameters or not scaling:
        return None
    if _rope_type(parameters) != _rope_type(scaling):
        return f"rope_parameters says {_rope_type(parameters)}, rope_scaling says {_rope_type(scaling)}"
    for key in _ROPE_IDENTITY:
        if key in parameters and key in scaling and parameters[key] != scaling[key]:
            return f"{key} is {parameters[key]} in rope_parameters and {scaling[key]} in rope_scaling"
    return None


class BailingMoeV2Config(PreTrainedConfig):  # type: ignore[misc]
    """Shape and routing of a BailingMoeV2 checkpoint; the defaults are those of the line's own class.

    Raises:
        ValueError: `rope_parameters` and `rope_scaling` are both given and contradict each other.
    """

    model_type = "bailing_moe_v2"

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int | None = 128,
        hidden_act: str = "silu",
        use_qkv_bias: bool = False,
        use_bias: bool = False,
        use_qk_norm: bool = True,
        use_rmsnorm: bool = True,
        rms_norm_eps: float = 1e-6,
        embedding_dropout: float = 0.0,
        max_position_embeddings: int = 32768,
        rope_theta: float = 600000.0,
        partial_rotary_factor: float = 1.0,
        rope_parameters: dict[str, Any] | None = None,
        rope_scaling: dict[str, Any] | None = None,
        num_experts: int = 256,
        num_shared_experts: int = 1,
        num_experts_per_tok: int = 8,
        n_group: int | None = 8,
        topk_group: int | None = 4,
        moe_intermediate_size: int = 512,
        first_k_dense_replace: int = 1,
        norm_topk_prob: bool = True,
        score_function: str | None = "sigmoid",
        moe_router_enable_expert_bias: bool = True,
        routed_scaling_factor: float = 1.0,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if problem := rope_disagreement(rope_parameters, rope_scaling):
            raise ValueError(f"the config contradicts itself: {problem}")
        # transformers' constructor reads these four while it standardizes RoPE: set them before it runs.
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.partial_rotary_factor = partial_rotary_factor
        self.rope_parameters = dict(rope_parameters or rope_scaling or {})
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.use_qkv_bias = use_qkv_bias
        self.use_bias = use_bias
        self.use_qk_norm = use_qk_norm
        self.use_rmsnorm = use_rmsnorm
        self.rms_norm_eps = rms_norm_eps
        self.embedding_dropout = embedding_dropout
        self.num_experts = num_experts
        self.num_shared_experts = num_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.n_group = n_group
        self.topk_group = topk_group
        self.moe_intermediate_size = moe_intermediate_size
        self.first_k_dense_replace = first_k_dense_replace
        self.norm_topk_prob = norm_topk_prob
        self.score_function = score_function
        self.moe_router_enable_expert_bias = moe_router_enable_expert_bias
        self.routed_scaling_factor = routed_scaling_factor
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


_FIRST_GENERATION: dict[str, Any] = {
    "use_qk_norm": False,
    "head_dim": None,
    "num_shared_experts": 0,
    "n_group": None,
    "topk_group": None,
    "first_k_dense_replace": 0,
    "score_function": None,
    "moe_router_enable_expert_bias": False,
}


class BailingMoeConfig(BailingMoeV2Config):
    """The line's other model type, which V2 checkpoints carry as well as those of the generation before.

    `architectures` tells them apart; the older keep their own defaults (softmax scores, no expert groups).
    """

    model_type = "bailing_moe"

    def __init__(self, **kwargs: Any) -> None:
        if "BailingMoeForCausalLM" in (kwargs.get("architectures") or ()):
            kwargs = _FIRST_GENERATION | kwargs
        super().__init__(**kwargs)


def register() -> None:
    """Make `AutoConfig` know both model types. Idempotent."""
    from transformers import AutoConfig

    for config in (BailingMoeV2Config, BailingMoeConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
