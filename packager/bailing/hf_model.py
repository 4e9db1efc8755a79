"""BailingMoeV2 as a transformers model whose parameters are a checkpoint's tensors, one for one.

For tools that work on `nn.Linear` modules and call a model as transformers does (llm-compressor's `oneshot`):
every expert's projections are linear layers of their own, the router is none. The arithmetic is that of
`packager.bailing.model`, whose stacked experts train faster. No cache and no generation: engines serve.
Registering the classes here removes the need for code inside a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from packager.bailing.hf_config import BailingMoeConfig, BailingMoeV2Config
from packager.bailing.hf_config import register as register_configs
from packager.bailing.model import MLP, DecoderLayer, Gate, RMSNorm, rotary_tables
from packager.errors import BadInput


def model_fields(config: BailingMoeV2Config) -> dict[str, Any]:
    """What `packager.bailing.model` reads, from a config as transformers 5 keeps it.

    Raises:
        BadInput: the config asks for what this implementation does not have.
    """
    rope: Mapping[str, Any] = config.rope_parameters or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    lacking = [
        what
        for what, present in {
            f"hidden_act {config.hidden_act}": config.hidden_act == "silu",
            "no QK norm": config.use_qk_norm,
            "biases": not (config.use_bias or config.use_qkv_bias),
            f"score_function {config.score_function}": config.score_function == "sigmoid",
            "no expert groups": config.n_group and config.topk_group,
            "no expert_bias": config.moe_router_enable_expert_bias,
            "no shared expert": config.num_shared_experts,
            f"rope_type {rope_type}": rope_type in ("default", "yarn"),
        }.items()
        if not present
    ]
    if lacking:
        raise BadInput(
            f"the transformers model of BailingMoeV2 does not cover this config: {', '.join(lacking)}"
        )
    fields: dict[str, Any] = {
        **config.to_dict(),
        "rope_theta": rope.get("rope_theta", config.rope_theta),
        "partial_rotary_factor": rope.get("partial_rotary_factor", config.partial_rotary_factor),
        "rope_scaling": dict(rope) if rope_type == "yarn" else None,
    }
    return fields


class Experts(nn.ModuleList):
    """The routed experts, each a module of its own."""

    every_token = False
    """Compute every expert on every token, and use only what the router chose."""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """`x` [tokens, hidden], experts and weights [tokens, k] -> weighted sum [tokens, hidden]."""
        out = x.new_zeros(*chosen.shape, x.shape[1])
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)
            if self.every_token:
                out[token, place] = expert(x)[token]
            elif token.numel():
                out[token, place] = expert(x[token])
        return (out * weights.to(out.dtype).unsqueeze(-1)).sum(1)


class MoE(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, inner = fields["hidden_size"], fields["moe_intermediate_size"]
        shared = fields.get("moe_shared_expert_intermediate_size") or inner
        self.gate = Gate(fields)
        self.experts = Experts(MLP(hidden, inner) for _ in range(fields["num_experts"]))
        self.shared_experts = MLP(hidden, shared * fields["num_shared_experts"])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        routed = self.experts(rows, *self.gate(rows))
        return (routed + self.shared_experts(rows)).view(x.shape)  # type: ignore[no-any-return]


class Positions(nn.Module):
    """Rotary tables and attention mask of a batch; a module, so that tracers do not look inside."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = fields

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos and sin [length, rotary_dim] (FP32); mask [batch, 1, length, length] (bool), None: causal.

        Padded positions may stand at either end: rotary embeddings know distances only.
        """
        length = input_ids.shape[1]
        cos, sin = (table.to(input_ids.device) for table in rotary_tables(self._fields, length))
        if attention_mask is None or bool(attention_mask.all()):
            return cos, sin, None
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        # A padded query sees itself: a row of nothing but masked scores would be NaN.
        own = torch.eye(length, dtype=torch.bool, device=input_ids.device)
        return cos, sin, (causal & attention_mask[:, None, None, :].bool()) | own


class BailingMoeV2DecoderLayer(DecoderLayer):
    """One decoder layer, under the name that transformers and llm-compressor know it by."""

    def __init__(self, fields: Mapping[str, Any], index: int) -> None:
        super().__init__(fields, index, MoE)


class BailingMoeV2Model(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(fields["vocab_size"], fields["hidden_size"])
        self.layers = nn.ModuleList(
            BailingMoeV2DecoderLayer(fields, index) for index in range(fields["num_hidden_layers"])
        )
        self.norm = RMSNorm(fields["hidden_size"], fields["rms_norm_eps"])
        self.positions = Positions(fields)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        positions = self.positions(input_ids, attention_mask)
        x = self.word_embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, positions)
        return self.norm(x)  # type: ignore[no-any-return]


class BailingMoeV2ForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """The causal language model.

    Raises:
        BadInput: the config asks for what this implementation does not have.
    """

    config_class: type[BailingMoeV2Config] = BailingMoeV2Config
    base_model_prefix = "model"
    _no_split_modules = ["BailingMoeV2DecoderLayer"]  # noqa: RUF012  what transformers reads
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.model = BailingMoeV2Model(model_fields(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        # Prediction layers follow the decoder's; they have no part in it.
        layers, prediction = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0) or 1
        self._keys_to_ignore_on_load_unexpected = {
            rf"^model\.layers\.{index}\." for index in range(layers, layers + prediction)
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: ARG002  what transformers' callers pass
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Tensor]:
        """Logits [batch, length, vocab] of token ids [batch, length].

        Args:
            input_ids: int64.
            attention_mask: [batch, length], 0 where a position is padding, at either end; its own logits
                mean nothing.
            use_cache: nothing is cached.
            return_dict: False gives `(logits,)`.
        """
        logits = self.lm_head(self.model(input_ids, attention_mask))
        return (logits,) if return_dict is False else CausalLMOutput(logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.model.word_embeddings = value  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.expert_bias)


class BailingMoeForCausalLM(BailingMoeV2ForCausalLM):
    """The same under the line's other model type."""

    config_class = BailingMoeConfig


@contextmanager
def every_expert_sees_every_token(model: nn.Module) -> Iterator[None]:
    """Within it each expert is computed on all tokens, as calibration wants; outputs stay what they are.

    A calibration that followed the router would see seldom chosen experts seldom, or never.
    """
    found = [module for module in model.modules() if isinstance(module, Experts)]
    for module in found:
        module.every_token = True
    try:
        yield
    finally:
        for module in found:
            module.every_token = False


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` know both model types. Idempotent."""
    from transformers import AutoModelForCausalLM

    register_configs()
    for model in (BailingMoeV2ForCausalLM, BailingMoeForCausalLM):
        AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
