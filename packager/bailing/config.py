"""config.json of a BailingMoeV2 checkpoint: the fields that fix its shape, read without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from packager.checkpoint.source import CONFIG_NAME, read_json_object
from packager.errors import BadInput

ARCHITECTURE = "BailingMoeV2ForCausalLM"
MODEL_TYPES = ("bailing_moe", "bailing_moe_v2")
"""Both occur on checkpoints of this architecture."""


class BailingConfig(BaseModel):
    """Shape, routing and position fields; defaults are those of the line's own configuration class.

    Fields whose default would change the shape of a tensor have none and must be in the file.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    """Width of the feed-forward of the first, dense layers."""
    moe_intermediate_size: int = Field(gt=0)
    """Width of a routed expert."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of one shared expert; None: that of a routed one."""
    num_hidden_layers: int = Field(gt=0)
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    """Multi-token prediction layers that were trained; chat checkpoints often leave them out."""
    first_k_dense_replace: int = Field(default=0, ge=0)
    """How many layers, from the first, are dense."""
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(default=0, ge=0)
    """0 or null in the file: hidden size / heads."""
    num_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    num_shared_experts: int = Field(default=0, ge=0)
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = True
    score_function: str | None = None
    moe_router_enable_expert_bias: bool = False
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = False
    use_qkv_bias: bool = False
    use_bias: bool = False
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = Field(default=600000.0, gt=0)
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    max_position_embeddings: int = Field(gt=0)
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        # transformers 5 moves theta and the rotary share into rope_parameters.
        for name in ("rope_theta", "partial_rotary_factor"):
            if raw.get(name) is None:
                raw.pop(name, None)
                inner = (raw.get("rope_parameters") or {}).get(name)
                if inner is not None:
                    raw[name] = inner
        heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
        if not raw.get("head_dim") and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            raw["head_dim"] = hidden // heads
        for name in ("num_shared_experts", "num_nextn_predict_layers"):
            if raw.get(name) is None:
                raw.pop(name, None)
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if ARCHITECTURE not in self.architectures:
            raise ValueError(
                f"architecture {', '.join(self.architectures) or '(none)'} is not {ARCHITECTURE}"
            )
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {self.model_type!r} is none of {', '.join(MODEL_TYPES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is not a multiple of num_key_value_heads")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError("num_experts_per_tok exceeds num_experts")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError("first_k_dense_replace exceeds num_hidden_layers")
        if (self.n_group is None) != (self.topk_group is None):
            raise ValueError("n_group and topk_group come together or not at all")
        if self.n_group and (self.num_experts % self.n_group or (self.topk_group or 0) > self.n_group):
            raise ValueError("n_group must divide num_experts, topk_group must not exceed it")
        return self

    @classmethod
    def parse(cls, raw: dict[str, Any], origin: str = CONFIG_NAME) -> Self:
        """Read the fields of a config. Raises BadInput: another architecture, or fields missing or wrong."""
        try:
            return cls.model_validate(raw)
        except ValidationError as err:
            lines = [
                f"  {'.'.join(map(str, e['loc'])) or 'config'}: {e['msg'].removeprefix('Value error, ')}"
                for e in err.errors()
            ]
            raise BadInput(f"{origin} is no {ARCHITECTURE} configuration:\n" + "\n".join(lines)) from None

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read `directory`/config.json. Raises BadInput: missing, not JSON, or not of this architecture."""
        path = Path(directory) / CONFIG_NAME
        return cls.parse(read_json_object(path), str(path))

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query-key-value projection."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together; they are stored as one."""
        return (
            self.moe_shared_expert_intermediate_size or self.moe_intermediate_size
        ) * self.num_shared_experts

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts (multi-token prediction layers not counted)."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def rope(self) -> dict[str, Any]:
        """What an engine on transformers 5 reads: rope_parameters if given, else rope_scaling, else empty."""
        return dict(self.rope_parameters or self.rope_scaling or {})
