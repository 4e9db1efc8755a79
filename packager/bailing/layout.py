"""Every tensor of a BailingMoeV2 checkpoint: its role, shape and dtype, derived from the configuration.

Names as in the public checkpoints of the line; `modeling_bailing_moe_v2.py` in inclusionAI/Ling-V2 is the
source for what a layer holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from packager.bailing.config import BailingConfig
from packager.checkpoint.header import TensorInfo
from packager.checkpoint.source import listed
from packager.errors import BadInput

FLOATS = ("BF16", "F16", "F32")


class Role(StrEnum):
    """What a tensor is for."""

    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    NORM = "norm"
    QUERY_KEY_VALUE = "query_key_value"
    ATTENTION_OUTPUT = "attention_output"
    DENSE_MLP = "dense_mlp"
    SHARED_EXPERT = "shared_expert"
    ROUTED_EXPERT = "routed_expert"
    ROUTER = "router"
    EXPERT_BIAS = "expert_bias"
    BIAS = "bias"
    MTP_PROJECTION = "mtp_projection"
    SCALE = "scale"


QUANTIZABLE = frozenset(
    {
        Role.QUERY_KEY_VALUE,
        Role.ATTENTION_OUTPUT,
        Role.DENSE_MLP,
        Role.SHARED_EXPERT,
        Role.ROUTED_EXPERT,
    }
)
"""Roles that engines load in FP8. The router decides which expert runs and is never quantized."""


@dataclass(frozen=True)
class Expected:
    """A tensor that the configuration calls for."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    mtp: bool = False
    """Part of a multi-token prediction layer."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def _mlp(prefix: str, role: Role, hidden: int, width: int) -> Iterator[Expected]:
    yield Expected(f"{prefix}.gate_proj.weight", role, (width, hidden))
    yield Expected(f"{prefix}.up_proj.weight", role, (width, hidden))
    yield Expected(f"{prefix}.down_proj.weight", role, (hidden, width))


def _layer(config: BailingConfig, index: int) -> Iterator[Expected]:
    prefix, hidden = f"model.layers.{index}", config.hidden_size
    attention, mlp = f"{prefix}.attention", f"{prefix}.mlp"
    heads = config.num_attention_heads * config.head_dim
    yield Expected(f"{prefix}.input_layernorm.weight", Role.NORM, (hidden,))
    yield Expected(f"{prefix}.post_attention_layernorm.weight", Role.NORM, (hidden,))
    yield Expected(f"{attention}.query_key_value.weight", Role.QUERY_KEY_VALUE, (config.qkv_rows, hidden))
    if config.use_qkv_bias:
        yield Expected(f"{attention}.query_key_value.bias", Role.BIAS, (config.qkv_rows,))
    yield Expected(f"{attention}.dense.weight", Role.ATTENTION_OUTPUT, (hidden, heads))
    if config.use_bias:
        yield Expected(f"{attention}.dense.bias", Role.BIAS, (hidden,))
    if config.use_qk_norm:
        yield Expected(f"{attention}.query_layernorm.weight", Role.NORM, (config.head_dim,))
        yield Expected(f"{attention}.key_layernorm.weight", Role.NORM, (config.head_dim,))
    if index < config.first_k_dense_replace:
        yield from _mlp(mlp, Role.DENSE_MLP, hidden, config.intermediate_size)
        return
    yield Expected(f"{mlp}.gate.weight", Role.ROUTER, (config.num_experts, hidden))
    if config.moe_router_enable_expert_bias:
        yield Expected(f"{mlp}.gate.expert_bias", Role.EXPERT_BIAS, (config.num_experts,))
    for expert in range(config.num_experts):
        yield from _mlp(f"{mlp}.experts.{expert}", Role.ROUTED_EXPERT, hidden, config.moe_intermediate_size)
    if config.num_shared_experts:
        yield from _mlp(f"{mlp}.shared_experts", Role.SHARED_EXPERT, hidden, config.shared_width)


def _mtp_layer(config: BailingConfig, index: int) -> Iterator[Expected]:
    prefix, hidden = f"model.layers.{index}", config.hidden_size
    own = [
        Expected(f"{prefix}.enorm.weight", Role.NORM, (hidden,)),
        Expected(f"{prefix}.hnorm.weight", Role.NORM, (hidden,)),
        Expected(f"{prefix}.eh_proj.weight", Role.MTP_PROJECTION, (hidden, 2 * hidden)),
        Expected(f"{prefix}.final_layernorm.weight", Role.NORM, (hidden,)),
    ]
    for found in (*own, *_layer(config, index)):
        yield Expected(found.name, found.role, found.shape, found.dtypes, mtp=True)


def expected_tensors(config: BailingConfig, mtp_layers: int = 0) -> list[Expected]:
    """All tensors of a checkpoint, in model order, before any quantization.

    Args:
        config: the configuration.
        mtp_layers: multi-token prediction layers present; the first has index `num_hidden_layers`.
    """
    tensors = [
        Expected("model.word_embeddings.weight", Role.EMBEDDING, (config.vocab_size, config.hidden_size))
    ]
    for index in range(config.num_hidden_layers):
        tensors.extend(_layer(config, index))
    for index in range(config.num_hidden_layers, config.num_hidden_layers + mtp_layers):
        tensors.extend(_mtp_layer(config, index))
    tensors.append(Expected("model.norm.weight", Role.NORM, (config.hidden_size,)))
    if not config.tie_word_embeddings:
        tensors.append(Expected("lm_head.weight", Role.LM_HEAD, (config.vocab_size, config.hidden_size)))
    return tensors


def mtp_layers_in(config: BailingConfig, names: Iterable[str]) -> int:
    """How many multi-token prediction layers a checkpoint with these tensor names has."""
    pattern = re.compile(r"model\.layers\.(\d+)\.(?:eh_proj|enorm|hnorm)\.")
    indices = {int(found[1]) for found in map(pattern.match, names) if found}
    return len({index for index in indices if index >= config.num_hidden_layers})


def layout_problems(expected: Iterable[Expected], found: Mapping[str, TensorInfo]) -> list[str]:
    """Missing, unknown, misshapen and ill-typed tensors, one line each."""
    problems: list[str] = []
    known: set[str] = set()
    for want in expected:
        known.add(want.name)
        have = found.get(want.name)
        if have is None:
            problems.append(f"missing: {want.name} {list(want.shape)}")
        elif have.shape != want.shape:
            problems.append(f"wrong shape: {want.name} is {list(have.shape)}, expected {list(want.shape)}")
        elif have.dtype not in want.dtypes:
            problems.append(f"wrong dtype: {want.name} is {have.dtype}, expected {' or '.join(want.dtypes)}")
    problems.extend(f"unknown: {name} {list(found[name].shape)}" for name in found if name not in known)
    return problems


def require_layout(expected: Iterable[Expected], found: Mapping[str, TensorInfo], origin: str) -> None:
    """Raise BadInput, listing every problem, unless the tensors are exactly those expected."""
    if problems := layout_problems(expected, found):
        raise BadInput(
            f"{origin}: {len(problems)} tensors do not fit its config.json:\n{listed(problems)}",
            "Check that config.json belongs to these weights.",
        )


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, scales and multi-token prediction layers not counted."""

    total: int
    """All, `expert_bias` included."""
    float32: int
    """Of these, the ones the line stores as FP32: `expert_bias`."""
    active: int
    """Used for one token: the chosen experts of each layer, and everything else once."""
    mtp: int
    """Of multi-token prediction layers."""

    @property
    def bfloat16(self) -> int:
        """The rest, stored as BF16."""
        return self.total - self.float32


def count_parameters(config: BailingConfig, mtp_layers: int = 0) -> ParameterCount:
    """Count from the configuration alone."""
    total = float32 = routed = mtp = 0
    for tensor in expected_tensors(config, mtp_layers):
        if tensor.mtp:
            mtp += tensor.count
            continue
        total += tensor.count
        if tensor.role is Role.EXPERT_BIAS:
            float32 += tensor.count
        elif tensor.role is Role.ROUTED_EXPERT:
            routed += tensor.count
    idle = routed * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    return ParameterCount(total=total, float32=float32, active=total - idle, mtp=mtp)
