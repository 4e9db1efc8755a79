"""The EAGLE3 head (arXiv 2503.01840) as vLLM and SGLang load it: one Llama layer over fused target states.

Why not speculators' `Eagle3DraftModel`, which a test compares this with, logit by logit: it runs over one
packed row and computes every position through attention, MLP and head, with a dense `[T, (steps) T]` mask on
CPU. Of an instruction sample only the response positions carry loss. Here prompts contribute keys and values
alone (one layer, so nothing else of them is ever read), padding is for attention alone, and
the keys that a further step adds, one for each query, enter as one extra score column instead of a `T x T`
diagonal block.

Indices: with target tokens x and states g, position i takes (embedding of x[i+1], g[i]) and proposes x[i+2].
Step k of the training-time test takes (x[i+1+k], own state of step k-1), proposes x[i+2+k], and sees the keys
of step 0 up to i and its own keys of steps 1 … k, just as in serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packager.bailing.model import MLP, RMSNorm, rotary_tables
from packager.draft.config import window_of


@dataclass
class DraftBatch:
    """Samples padded for attention, their N queries packed for everything else. B samples, L key
    positions."""

    keys: Tensor
    """[B, L] int64: x[1 : L+1]."""
    states: Tensor
    """[B, L, aux * hidden]: target states g[0 : L], layers side by side."""
    row: Tensor
    """[N] int64: sample of each query, ascending as far as they are real."""
    place: Tensor
    """[N] int64: position i of each query in its sample."""
    slot: Tensor
    """[N] int64: number of each query among those of its sample, from 0."""
    tokens: Tensor
    """[N, S + 1] int64: x[i+1 : i+2+S]; step k reads column k, its label is column k + 1; -1 past the end. A
    query whose column 1 is -1 is filling."""
    last: Tensor
    """[N, hidden]: the target's states, before its final norm, that predict column 1 of `tokens`. Those that
    predict column 1 + k are k rows on, in the same sample."""

    def to(self, device: torch.device) -> DraftBatch:
        """The same on another device; from pinned memory the copies do not wait for one another."""
        return DraftBatch(
            **{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        )

    def pinned(self) -> DraftBatch:
        """The same in page-locked memory."""
        return DraftBatch(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})


class _UnitScale(torch.autograd.Function):
    """RMS norm with its gradient in closed form: fewer passes over memory than autograd makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
        unit = wide * scale
        ctx.save_for_backward(unit, scale, weight)
        normed: Tensor = (unit * weight).to(x.dtype)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        gradient = gradients[0].float()
        to_weight = (gradient * unit).flatten(0, -2).sum(0)
        inner = gradient * weight
        share = torch.linalg.vecdot(inner, unit).div_(-unit.shape[-1]).unsqueeze(-1)
        to_input: Tensor = inner.addcmul_(unit, share).mul_(scale).to(gradients[0].dtype)
        return to_input, to_weight, None


class Norm(RMSNorm):
    """RMSNorm, faster to differentiate."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _UnitScale.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return found


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neox-style rotation of `x` [..., T, heads, dim] by tables [T, dim]."""
    a, b = x.chunk(2, dim=-1)
    turned = torch.cat((-b, a), dim=-1)
    return x * cos.unsqueeze(-2).to(x.dtype) + turned * sin.unsqueeze(-2).to(x.dtype)


def _spread(packed: Tensor, batch: DraftBatch, width: int) -> Tensor:
    """[N, ...] -> [B, width, ...], zeros where a sample has no query."""
    flat = packed.new_zeros(len(batch.keys) * width, *packed.shape[1:])
    flat = flat.index_copy(0, batch.row * width + batch.slot, packed)
    return flat.view(len(batch.keys), width, *packed.shape[1:])


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
        """[..., T, 2 * hidden] -> rotated keys and values, each [..., T, KV heads, head_dim]."""
        # One product: either alone is too narrow to be fast.
        both = F.linear(x, torch.cat((self.k_proj.weight, self.v_proj.weight)))
        keys, values = both.view(*x.shape[:-1], 2, self.kv_heads, self.head_dim).unbind(-3)
        return _rotate(keys, cos, sin), values

    def attend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: DraftBatch,
        context: tuple[Tensor, Tensor],
        own: list[tuple[Tensor, Tensor]],
        bias: Tensor,
    ) -> Tensor:
        """Packed queries `x` [N, 2 * hidden] over `context` ([B, L, KV heads, dim] twice; `bias` [B, 1, 1, Q,
        L] FP32, 0 where visible and -inf elsewhere) and over each query's own keys of later steps ([N, KV
        heads, dim] twice each)."""
        group, width = self.heads // self.kv_heads, bias.shape[-2]
        q = _rotate(self.q_proj(x).view(-1, self.heads, self.head_dim), cos, sin) * self.head_dim**-0.5
        q = q.view(-1, self.kv_heads, group, self.head_dim)
        keys, values = context
        samples, length = keys.shape[:2]
        # [B, KV heads, group * Q, dim] against [B, KV heads, dim, L]
        wide = _spread(q, batch, width).permute(0, 2, 3, 1, 4)
        scores = wide.reshape(samples, self.kv_heads, group * width, -1) @ keys.permute(0, 2, 3, 1)
        scores = scores.view(samples, self.kv_heads, group, width, length).float()
        columns = [scores + bias]
        for key, _ in own:
            score = (q * key.unsqueeze(2)).sum(-1).float()  # [N, KV heads, group]
            columns.append(_spread(score, batch, width).permute(0, 2, 3, 1).unsqueeze(-1))
        weights = torch.cat(columns, dim=-1).softmax(-1).to(values.dtype)
        over = weights[..., :length].reshape(samples, self.kv_heads, group * width, length)
        out = (over @ values.permute(0, 2, 1, 3)).view(samples, self.kv_heads, group, width, self.head_dim)
        packed = out.permute(0, 3, 1, 2, 4)[batch.row, batch.slot]  # [N, KV heads, group, dim]
        for step, (_, value) in enumerate(own):
            share = weights[..., length + step].permute(0, 3, 1, 2)[batch.row, batch.slot]
            packed = packed + share.unsqueeze(-1) * value.unsqueeze(2)
        return self.o_proj(packed.flatten(1))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """The decoder layer; norms as in vLLM's llama_eagle3.py with `norm_before_residual` off, SGLang's only
    way."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = Norm(hidden, eps)
        self.hidden_norm = Norm(hidden, eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = Norm(hidden, eps)
        self.mlp = MLP(hidden, config["intermediate_size"])

    def inputs(self, unit_embeds: Tensor, states: Tensor) -> Tensor:
        """[..., hidden] twice -> the attention's input [..., 2 * hidden]. The embeddings come normalised to
        unit mean square: they are frozen, so this is done once, not in every step."""
        # In the dtype that the products take: else all of it is widened here and narrowed again in each.
        embeds = (unit_embeds * self.input_layernorm.weight).to(states.dtype)
        return torch.cat((embeds, self.hidden_norm(states)), dim=-1)


class Eagle3Head(nn.Module):
    """The head. Parameter names are those of the exported file. `config` is the draft's config.json.

    `unit_embeddings` is the target's embedding, frozen and not exported (engines share the target's own), and
    already normalised to unit mean square for `input_layernorm`.
    """

    unit_embeddings: Tensor

    def __init__(self, config: Mapping[str, Any], embeddings: Tensor) -> None:
        super().__init__()
        self.config = dict(config)
        hidden = config["hidden_size"]
        aux = len(config["eagle_aux_hidden_state_layer_ids"])
        unit = F.rms_norm(embeddings.float(), (hidden,), eps=config["rms_norm_eps"])
        self.register_buffer("unit_embeddings", unit, persistent=False)
        self.window = window_of(config)
        self.fc = nn.Linear(aux * hidden, hidden, bias=False)
        self.midlayer = Layer(config)
        self.norm = Norm(hidden, config["rms_norm_eps"])
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

    @staticmethod
    def _bias(hidden: Tensor) -> Tensor:
        """[B, Q, L] bool -> what is added to scores [B, KV heads, group, Q, L]."""
        zeros = torch.zeros(hidden.shape, device=hidden.device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None, None]

    def forward(self, batch: DraftBatch, steps: int) -> list[Tensor]:
        """Logits of each step over the draft vocabulary, `steps` tensors [N, draft vocab]."""
        length = batch.keys.shape[1]
        device = batch.keys.device
        cos, sin = (table.to(device) for table in rotary_tables(self.config, length + steps))
        layer = self.midlayer
        narrow = torch.is_autocast_enabled(device.type)  # takes the states as they are
        states = self.fc(batch.states if narrow else batch.states.to(self.fc.weight.dtype))
        x = layer.inputs(F.embedding(batch.keys, self.unit_embeddings), states)
        context = layer.self_attn.keys_values(x, cos[:length], sin[:length])

        # Queries start behind the prompt, so a slot's position differs from sample to sample.
        width = int(batch.slot.max()) + 1
        last = _spread(batch.place, batch, width).unsqueeze(-1)
        places = torch.arange(length, device=device)
        hidden = places > last
        bias = self._bias(hidden)
        states, x = states[batch.row, batch.place], x[batch.row, batch.place]
        own: list[tuple[Tensor, Tensor]] = []
        logits = []
        for step in range(steps):
            turn = cos[batch.place + step], sin[batch.place + step]
            if self.window is not None:  # it ends at the token that is read, which is `step` places on
                bias = self._bias(hidden | (places <= last + step - self.window))
            if step:
                tokens = batch.tokens[:, step].clamp(min=0)
                x = layer.inputs(F.embedding(tokens, self.unit_embeddings), states)
                own.append(layer.self_attn.keys_values(x, *turn))
            mixed = states + layer.self_attn.attend(x, *turn, batch, context, own, bias)
            states = mixed + layer.mlp(layer.post_attention_layernorm(mixed))
            logits.append(self.lm_head(self.norm(states)))
        return logits
