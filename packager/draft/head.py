"""The EAGLE3 head (arXiv 2503.01840) as vLLM and SGLang load it: one Llama layer over fused target states.

Why not speculators' `Eagle3DraftModel`, which a test compares this with, logit by logit: it runs over one
packed row and computes every position through attention, MLP and head, with a dense `[T, (steps) T]` mask on
CPU. Of an instruction sample only the response positions carry loss. Here prompts contribute keys and values
alone (one layer, so nothing else of them is ever read), samples are padded per batch instead of packed, and
the keys that a further step adds, one for each query, enter as one extra score column instead of a `T x T`
diagonal block.

Indices: with target tokens x and states g, position i takes (embedding of x[i+1], g[i]) and proposes x[i+2].
Step k of the training-time test takes (x[i+1+k], own state of step k-1), proposes x[i+2+k], and sees the keys
of step 0 up to i and its own keys of steps 1 … k, just as in serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packager.bailing.model import MLP, RMSNorm, rotary_tables


@dataclass
class DraftBatch:
    """Padded samples. B samples, L key positions, Q query positions, S steps."""

    keys: Tensor
    """[B, L] int64: x[1 : L+1]."""
    states: Tensor
    """[B, L, aux * hidden]: target states g[0 : L], layers side by side."""
    first: Tensor
    """[B] int64: position of the first query, the last prompt token."""
    query_count: Tensor
    """[B] int64: queries that are not padding."""
    tokens: Tensor
    """[B, Q + S] int64: x[first+1 :]; step k reads columns k … k+Q, labels are one further."""
    last: Tensor
    """[B, Q + S, hidden]: the target's last hidden states before its final norm, column c the one that
    predicts `tokens[:, c + 1]`."""


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neox-style rotation of `x` [B, T, heads, dim] by tables [B or 1, T, dim]."""
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat((-b, a), dim=-1)
    return x * cos.unsqueeze(2).to(x.dtype) + turned * sin.unsqueeze(2).to(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention whose input is twice as wide as its output."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, hidden = config["head_dim"], config["hidden_size"]
        self.q_proj = nn.Linear(2 * hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, 2 * hidden] -> rotated keys and values, each [B, T, KV heads, head_dim]."""
        shape = (*x.shape[:2], self.kv_heads, self.head_dim)
        return _rotate(self.k_proj(x).view(shape), cos, sin), self.v_proj(x).view(shape)

    def attend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: tuple[Tensor, Tensor],
        own: list[tuple[Tensor, Tensor]],
        mask: Tensor,
    ) -> Tensor:
        """Queries `x` [B, Q, 2 * hidden] over `context` ([B, L, KV heads, dim] twice, `mask` [B, Q, L] True
        where visible) and over each query's own keys of later steps ([B, Q, KV heads, dim] twice each)."""
        batch, length, _ = x.shape
        group = self.heads // self.kv_heads
        q = _rotate(self.q_proj(x).view(batch, length, self.heads, self.head_dim), cos, sin)
        q = q.view(batch, length, self.kv_heads, group, self.head_dim) * self.head_dim**-0.5
        # [B, KV heads, group * Q, dim]
        flat = q.permute(0, 2, 3, 1, 4).reshape(batch, self.kv_heads, group * length, self.head_dim)
        keys, values = context
        scores = (flat @ keys.permute(0, 2, 3, 1)).view(batch, self.kv_heads, group, length, -1).float()
        columns = [scores.masked_fill(~mask[:, None, None], float("-inf"))]
        columns += [torch.einsum("bqhgd,bqhd->bhgq", q, key).unsqueeze(-1).float() for key, _ in own]
        weights = torch.cat(columns, dim=-1).softmax(-1).to(values.dtype)
        over = weights[..., : keys.shape[1]].reshape(batch, self.kv_heads, group * length, -1)
        out = (over @ values.permute(0, 2, 1, 3)).view(batch, self.kv_heads, group, length, self.head_dim)
        for step, (_, value) in enumerate(own):
            share = weights[..., keys.shape[1] + step].unsqueeze(-1)
            out = out + share * value.permute(0, 2, 1, 3).unsqueeze(2)
        return self.o_proj(out.permute(0, 3, 1, 2, 4).reshape(batch, length, -1))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """The decoder layer; norms as in vLLM's llama_eagle3.py with `norm_before_residual` off, SGLang's only
    way."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(hidden, config["intermediate_size"])

    def inputs(self, embeds: Tensor, states: Tensor) -> Tensor:
        """[B, T, hidden] twice -> the attention's input [B, T, 2 * hidden]."""
        return torch.cat((self.input_layernorm(embeds), self.hidden_norm(states)), dim=-1)


class Eagle3Head(nn.Module):
    """The head. Parameter names are those of the exported file. `config` is the draft's config.json.

    `embed_tokens` is the target's, frozen and not exported: engines share the target's own.
    """

    embed_tokens: Tensor

    def __init__(self, config: Mapping[str, Any], embeddings: Tensor) -> None:
        super().__init__()
        self.config = dict(config)
        hidden = config["hidden_size"]
        aux = len(config["eagle_aux_hidden_state_layer_ids"])
        self.register_buffer("embed_tokens", embeddings, persistent=False)
        self.fc = nn.Linear(aux * hidden, hidden, bias=False)
        self.midlayer = Layer(config)
        self.norm = RMSNorm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, config["draft_vocab_size"], bias=False)

    def initialise(self, seed: int, head_rows: Tensor, norm: Tensor) -> None:
        """Seeded start. `head_rows` [draft vocab, hidden] and `norm` [hidden] are the target's: the head then
        starts as a reader of the residual stream. `fc` starts by passing the deepest state through."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02, generator=generator)
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.data.mul_(0.5)
        hidden = self.config["hidden_size"]
        with torch.no_grad():
            self.fc.weight[:, -hidden:] += torch.eye(hidden)
            self.lm_head.weight.copy_(head_rows)
            self.norm.weight.copy_(norm)

    def forward(self, batch: DraftBatch, steps: int) -> list[Tensor]:
        """Logits of each step over the draft vocabulary, `steps` tensors [B, Q, draft vocab]."""
        length, queries = batch.keys.shape[1], batch.tokens.shape[1] - steps
        cos, sin = rotary_tables(self.config, length + steps)
        layer = self.midlayer
        states = self.fc(batch.states.to(self.fc.weight.dtype))
        x = layer.inputs(F.embedding(batch.keys, self.embed_tokens), states)
        context = layer.self_attn.keys_values(x, cos[None, :length], sin[None, :length])

        place = batch.first[:, None] + torch.arange(queries)  # [B, Q] position i of each query
        place = place.clamp(max=length - 1)
        mask = torch.arange(length) <= place.unsqueeze(-1)  # padding lies behind every real query
        wide = place.unsqueeze(-1)
        states = states.gather(1, wide.expand(-1, -1, states.shape[-1]))
        x = x.gather(1, wide.expand(-1, -1, x.shape[-1]))
        own: list[tuple[Tensor, Tensor]] = []
        logits = []
        for step in range(steps):
            turn = cos[place + step], sin[place + step]
            if step:
                x = layer.inputs(
                    F.embedding(batch.tokens[:, step : step + queries], self.embed_tokens), states
                )
                own.append(layer.self_attn.keys_values(x, *turn))
            mixed = states + layer.self_attn.attend(x, *turn, context, own, mask)
            states = mixed + layer.mlp(layer.post_attention_layernorm(mixed))
            logits.append(self.lm_head(self.norm(states)))
        return logits
