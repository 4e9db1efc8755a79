"""What a roofline has to know of a model: how many weights a step reads, and how large its cache is."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import Field, model_validator

from validation.document import Document
from validation.errors import MeasurementError

Precision = Literal["bf16", "fp8", "fp8-channel", "int8", "int4"]
"""Of the weights that are quantized; embeddings, head, router and norms stay in BF16."""
WEIGHT_BYTES: dict[Precision, float] = {
    "bf16": 2.0,
    "fp8": 1.0 + 4 / 128**2,
    "fp8-channel": 1.0 + 4 / 4096,
    "int8": 1.0 + 4 / 4096,
    "int4": 0.5 + 2 / 128,
}
"""Bytes of a quantized weight with its part of the scale; of scales a row, for rows of 4096."""


class ModelShape(Document):
    """A decoder in the numbers that its speed depends on. Counts are of parameters."""

    name: str
    layers: int = Field(gt=0)
    attention_width: int = Field(gt=0)
    """Query heads x head dimension: scores and their sums cost 4 x this x context operations a layer."""
    kv_values: int = Field(gt=0)
    """Values that the cache holds of a token in a layer: 2 x KV heads x head dimension, or MLA's latent."""
    hidden: int = Field(gt=0)
    embedding: int = Field(ge=0)
    """Input embedding; a step reads one row a token. 0: tied, counted as `head`."""
    head: int = Field(gt=0)
    """Output head."""
    matrices: int = Field(ge=0)
    """Quantizable weights that every token uses: attention, dense feed-forwards, shared experts."""
    other: int = Field(ge=0)
    """Norms, routers, biases."""
    moe_layers: int = Field(default=0, ge=0)
    experts: int = Field(default=0, ge=0)
    """Routed experts of a layer."""
    experts_per_token: int = Field(default=0, ge=0)
    expert: int = Field(default=0, ge=0)
    """One routed expert."""

    @model_validator(mode="after")
    def _routed(self) -> ModelShape:
        if self.moe_layers and not (0 < self.experts_per_token <= self.experts and self.expert):
            raise ValueError("a mixture of experts needs experts, experts_per_token and expert")
        return self

    @property
    def parameters(self) -> int:
        """All of them."""
        return (
            self.embedding
            + self.head
            + self.matrices
            + self.other
            + self.moe_layers * self.experts * self.expert
        )

    @property
    def active_parameters(self) -> int:
        """Used for one token, the embedding included."""
        return self.parameters - self.moe_layers * (self.experts - self.experts_per_token) * self.expert

    def fixed_bytes(self, precision: Precision) -> float:
        """Weights that every step reads whatever the routing; not the embedding."""
        return WEIGHT_BYTES[precision] * self.matrices + 2.0 * (self.head + self.other)

    def expert_bytes(self, precision: Precision) -> float:
        """One routed expert."""
        return WEIGHT_BYTES[precision] * self.expert

    def weight_bytes(self, precision: Precision) -> float:
        """All weights."""
        experts = self.moe_layers * self.experts * self.expert_bytes(precision)
        return self.fixed_bytes(precision) + experts + 2.0 * self.embedding

    def kv_bytes(self, value_bytes: float = 2.0) -> float:
        """Cache of one token in all layers, for values of that many bytes (BF16 2, FP8 1)."""
        return self.layers * self.kv_values * value_bytes


class ServedModel(Document):
    """A shape as it is served: what a bound needs besides the hardware."""

    shape: ModelShape
    precision: Precision
    """Of the weights that a step reads."""
    kv_value_bytes: float = Field(default=2.0, gt=0)
    draft_tokens: int | None = Field(default=None, gt=0)
    """None: no draft."""
    draft_weight_bytes: float = Field(default=0.0, ge=0)
    """All that a draft step reads."""
    draft_kv_bytes: float = Field(default=0.0, ge=0)
    """The draft's cache of one token."""

    @property
    def name(self) -> str:
        """The published model with the same counts, whatever the folder is called; else the shape's own."""
        counts = self.shape.model_dump(exclude={"name"})
        same = (n for n, one in known_models().items() if one.model_dump(exclude={"name"}) == counts)
        return next(same, self.shape.name)


@cache
def known_models() -> dict[str, ModelShape]:
    """The shapes that come with the package, by name."""
    text = resources.files("validation.models").joinpath("shapes.yaml").read_text(encoding="utf-8")
    return {name: ModelShape(name=name, **fields) for name, fields in yaml.safe_load(text).items()}


def model_named(name: str) -> ModelShape:
    """A shape by name. Raises MeasurementError: not known (the known ones are listed)."""
    models = known_models()
    if name not in models:
        raise MeasurementError(f"no model shape is called {name!r}", f"Known: {', '.join(models)}.")
    return models[name]
