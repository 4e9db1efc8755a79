"""The form in which an architecture is declared: fields of its config, and one rule a kind of tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Literal

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
    FUSED_EXPERTS = "fused_experts"
    ROUTER = "router"
    EXPERT_BIAS = "expert_bias"
    BIAS = "bias"
    MTP_PROJECTION = "mtp_projection"
    BUFFER = "buffer"
    SCALE = "scale"
    OTHER = "other"


QUANTIZABLE = frozenset(
    {
        Role.QUERY_KEY_VALUE,
        Role.ATTENTION_OUTPUT,
        Role.DENSE_MLP,
        Role.SHARED_EXPERT,
        Role.ROUTED_EXPERT,
    }
)
"""Roles that engines load quantized."""

_VECTOR = "it is no matrix of a linear layer: engines use it in the precision it has"
NEVER_QUANTIZED: Mapping[Role, str] = {
    Role.ROUTER: "it decides which expert runs, and engines give it no quantization scheme",
    Role.EMBEDDING: "engines look rows up in it and give it no quantization scheme",
    Role.LM_HEAD: "engines give the output head no quantization scheme",
    Role.MTP_PROJECTION: "engines build the projection of a prediction layer without a scheme",
    Role.FUSED_EXPERTS: "engines load quantized experts one matrix at a time; this tensor holds many",
    Role.NORM: _VECTOR,
    Role.BIAS: _VECTOR,
    Role.EXPERT_BIAS: _VECTOR,
    Role.BUFFER: _VECTOR,
}
"""Why engines never load a role quantized."""


class Do(StrEnum):
    """What becomes of a tensor."""

    QUANTIZE = "quantize"
    KEEP = "keep"
    DROP = "drop"


@dataclass(frozen=True)
class Expected:
    """A tensor that the configuration calls for."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    mtp: bool = False
    """Part of a multi-token prediction layer."""
    group: str = ""
    """Engines load all tensors of a group as one matrix, so they are quantized together or not at all."""
    optional: bool = False
    """Some checkpoints bring it, some do not."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def decision(self) -> Do:
        """What becomes of it unless a recipe decides otherwise."""
        if self.role is Role.BUFFER:
            return Do.DROP
        return Do.QUANTIZE if self.role in QUANTIZABLE else Do.KEEP


@dataclass(frozen=True)
class Rule:
    """One kind of tensor; `{layer}` and `{expert}` in a name stand for every index."""

    name: str
    role: Role
    shape: str
    """Expression over the fields: `vocab_size, hidden_size`."""
    when: str = ""
    """Condition over the fields, `layer`, `mtp` and `fused`; empty: always."""
    group: str = ""
    optional: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether there is one in each layer."""
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        """Whether there is one for each routed expert."""
        return "{expert}" in self.name


Kind = Literal["size", "count", "flag", "layers"]
Value = int | bool | tuple[int, ...]


@dataclass(frozen=True)
class Field:
    """A field of config.json that fixes tensors."""

    name: str
    kind: Kind = "size"
    """size: a positive integer; count: one that may be 0; flag: true or false; layers: a list of indices."""
    default: Value | str | None = None
    """Where the file lacks it; text: an expression over the fields before it; None: it must be there."""
    null: Value | str | None = None
    """What null in the file means; None: the same as its absence."""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """All that is to be known of an architecture to place each tensor of its checkpoints."""

    name: str
    """As `architectures` in config.json has it."""
    model_types: tuple[str, ...]
    fields: tuple[Field, ...] = ()
    rules: tuple[Rule, ...] = ()
    """In model order. Consecutive rules with `{layer}` are repeated together, layer by layer."""
    derived: Mapping[str, str] = field(default_factory=dict)
    """Names for expressions; they may use `layer`."""
    experts: str = ""
    """Field that counts the routed experts; empty: a dense model."""
    experts_per_token: str = ""
    checks: Mapping[str, str] = field(default_factory=dict)
    """Condition over the fields -> what is wrong where it does not hold."""
    rope_theta: float = 10000.0
    """Default of the architecture's configuration class."""
    mtp_engines: tuple[str, ...] = ()
    """Engines that load multi-token prediction layers of this architecture."""
    refused: str = ""
    """Why checkpoints of this architecture are recognised, but not quantized."""
