"""BailingMoeV2 in one flat file of plain torch: what the nano model is trained with, and a reference forward.

Parameters carry the names of the public checkpoints (`model.layers.N.attention.query_key_value.weight` …);
only the routed experts are stacked, `[experts, out, in]`, so that one batched product serves all of them.
`load_tensors` and `dump_tensors` translate. Written from the architecture's description and compared with
vLLM's `bailing_moe.py`; not a copy of either that or the upstream `modeling_bailing_moe_v2.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RotaryAndMask = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]
"""Cosines and sines [length, rotary_dim] (FP32), and a mask where there is one; see `Attention`."""


def yarn_inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN's inverse frequencies `[dim/2]` (FP32) and the factor for cos and sin (arXiv 2309.00071)."""
    factor, original = float(scaling["factor"]), int(scaling["original_max_position_embeddings"])
    fast, slow = float(scaling.get("beta_fast", 32)), float(scaling.get("beta_slow", 1))

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(correction(fast)), 0), min(math.ceil(correction(slow)), dim - 1)
    extrapolated = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    inverse = extrapolated * (1 - ramp) + extrapolated / factor * ramp
    return inverse, float(scaling.get("attention_factor") or 0.1 * math.log(factor) + 1.0)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in FP32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_tables(config: Mapping[str, Any], length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, rotary_dim]` (FP32) of the first `length` positions, YaRN included."""
    dim = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0))
    theta = float(config["rope_theta"])
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type", scaling.get("rope_type")) == "yarn":
        inverse, attention = yarn_inverse_frequencies(dim, theta, scaling)
    else:
        inverse, attention = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * attention, angles.sin() * attention


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `cos.shape[-1]` of the head's dimensions (neox halves), keep the rest."""
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)
    return torch.cat((turned, kept), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with a fused projection, QK-norm and partial rotary embedding."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.query_key_value = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.dense = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.query_layernorm = RMSNorm(self.head_dim, eps)
        self.key_layernorm = RMSNorm(self.head_dim, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`, broadcast to [batch, heads, query, key], true where a query may look; None: causal."""
        batch, length, _ = x.shape
        qkv = self.query_key_value(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q = _rotate(self.query_layernorm(q), cos, sin)
        k = _rotate(self.key_layernorm(k), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.dense(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU feed-forward: the dense first layers and the shared expert."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Gate(nn.Module):
    """Router: sigmoid scores in FP32; `expert_bias` steers which experts are picked, not their weight."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.experts, self.top_k = config["num_experts"], config["num_experts_per_tok"]
        self.groups, self.top_groups = config["n_group"], config["topk_group"]
        self.scaling, self.normalise = config["routed_scaling_factor"], config["norm_topk_prob"]
        self.weight = nn.Parameter(torch.empty(self.experts, config["hidden_size"]))
        self.register_buffer("expert_bias", torch.zeros(self.experts, dtype=torch.float32))
        self.expert_bias: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [tokens, hidden] -> chosen experts [tokens, k] (int64) and their weights [tokens, k] (FP32)."""
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(x.float() @ self.weight.float().t())
        biased = (scores + self.expert_bias).detach()
        grouped = biased.view(-1, self.groups, self.experts // self.groups)
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = group_scores.topk(self.top_groups, dim=-1).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        masked = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        chosen = masked.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scaling


class MoE(nn.Module):
    """Routed experts plus the shared expert. Every token is served: nothing is dropped at any imbalance."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
        self.gate = Gate(config)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))
        self.shared_experts = MLP(hidden, inner * config["num_shared_experts"])
        self.load: Tensor | None = None
        """Tokens per expert of the last forward [experts], for balancing while training."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        chosen, weights = self.gate(x)
        experts, top_k = self.gate_up.shape[0], chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        self.load = torch.bincount(chosen.flatten(), minlength=experts)
        # Every expert gets the same number of rows, a multiple of 64: one batched product whose shapes
        # repeat, instead of a matrix product of a new shape for each expert and step.
        rows = int(-(-int(self.load.max()) // 64) * 64)
        owner = chosen.flatten()[order]
        starts = self.load.cumsum(0) - self.load
        slot = owner * rows + (torch.arange(order.numel(), device=x.device) - starts[owner])
        dtype = (
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        )
        source = x.to(dtype)[order // top_k]
        batch = (
            source.new_zeros(experts * rows, x.shape[1]).index_copy(0, slot, source).view(experts, rows, -1)
        )
        gate, up = torch.bmm(batch, self.gate_up.to(dtype).transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down.to(dtype).transpose(1, 2)).view(experts * rows, -1)
        place = torch.empty_like(order).index_copy(0, order, slot).view(-1, top_k)
        routed = (out[place] * weights.to(out.dtype).unsqueeze(-1)).sum(1)
        return (routed + self.shared_experts(x)).view(shape)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One decoder layer; `moe` makes the feed-forward of those that have experts."""

    def __init__(
        self, config: Mapping[str, Any], index: int, moe: Callable[[Mapping[str, Any]], nn.Module] = MoE
    ) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        dense = index < config["first_k_dense_replace"]
        self.mlp: nn.Module = MLP(hidden, config["intermediate_size"]) if dense else moe(config)

    def forward(self, x: Tensor, positions: RotaryAndMask) -> Tensor:
        """`x` [batch, length, hidden] -> the same; `positions` as `Attention` takes them."""
        x = x + self.attention(self.input_layernorm(x), *positions)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class BailingMoeV2(nn.Module):
    """The causal language model. `config` is the checkpoint's config.json as a mapping."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)

    def forward(
        self, input_ids: Tensor, *, return_hidden: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Logits `[batch, length, vocab]` of token ids `[batch, length]` (int64).

        With `return_hidden` also the inputs of layers 0 … n-1 and the normed output of the last layer,
        n+1 tensors `[batch, length, hidden]`: entry j is what EAGLE3's aux layer id j means.
        """
        positions = rotary_tables(self.config, input_ids.shape[1])
        x = self._embed(input_ids)
        hidden = [x]
        for layer in self.model.layers:
            x = layer(x, positions)
            hidden.append(x)
        hidden[-1] = x = self.model.norm(x)
        logits: Tensor = self.lm_head(x)
        return (logits, hidden) if return_hidden else logits

    def _embed(self, input_ids: Tensor) -> Tensor:
        """The residual stream's beginning, in the dtype of autocast where that is on, as in an engine."""
        x: Tensor = self.model.word_embeddings(input_ids)
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def states(self, input_ids: Tensor) -> Tensor:
        """The final normed states `[batch, length, hidden]`, without the product by the head."""
        positions = rotary_tables(self.config, input_ids.shape[1])
        x = self._embed(input_ids)
        for layer in self.model.layers:
            x = layer(x, positions)
        out: Tensor = self.model.norm(x)
        return out

    def initialise(self, seed: int) -> None:
        """Seeded normal initialisation, 0.05 wide, projections into the residual stream scaled down.

        Embeddings are of unit width: narrower ones are drowned by what the first layer adds, and names that
        cannot be told apart cannot be looked up.
        """
        generator = torch.Generator().manual_seed(seed)
        depth = math.sqrt(2 * self.config["num_hidden_layers"])
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                inward = name.endswith(("dense.weight", "down_proj.weight", ".down"))
                std = 1.0 if name.endswith("word_embeddings.weight") else 0.05
                nn.init.normal_(parameter, std=std / (depth if inward else 1.0), generator=generator)

    def dump_tensors(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
        """The checkpoint's tensors under their public names; `expert_bias` stays FP32."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            if name.endswith(".gate_up"):
                stem = name.removesuffix("gate_up") + "experts"
                for number, expert in enumerate(tensor):
                    gate, up = expert.chunk(2, dim=0)
                    found[f"{stem}.{number}.gate_proj.weight"] = gate.to(dtype).contiguous()
                    found[f"{stem}.{number}.up_proj.weight"] = up.to(dtype).contiguous()
            elif name.endswith("mlp.down"):
                stem = name.removesuffix("down") + "experts"
                for number, expert in enumerate(tensor):
                    found[f"{stem}.{number}.down_proj.weight"] = expert.to(dtype).contiguous()
            else:
                keep = torch.float32 if name.endswith("expert_bias") else dtype
                found[name] = tensor.to(keep).contiguous()
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill the parameters from a checkpoint's tensors.

        Raises:
            KeyError: a tensor is missing.
        """
        state: dict[str, Tensor] = {}
        for name in self.state_dict():
            if name.endswith((".gate_up", "mlp.down")):
                stem, kind = name.rsplit(".", 1)
                experts = range(self.config["num_experts"])
                if kind == "down":
                    rows = [tensors[f"{stem}.experts.{n}.down_proj.weight"] for n in experts]
                else:
                    rows = [
                        torch.cat(
                            (
                                tensors[f"{stem}.experts.{n}.gate_proj.weight"],
                                tensors[f"{stem}.experts.{n}.up_proj.weight"],
                            )
                        )
                        for n in experts
                    ]
                state[name] = torch.stack(rows)
            else:
                state[name] = tensors[name]
        self.load_state_dict(state)
