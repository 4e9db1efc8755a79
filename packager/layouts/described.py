"""What a config of any declared architecture says beyond its tensors: positions, vocabulary, quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packager.errors import BadInput
from packager.layouts.model import Model, recognise


@dataclass(frozen=True)
class Described:
    """A config.json whose architecture is known."""

    model: Model
    model_type: str
    max_position_embeddings: int
    rope_theta: float
    rotary_dim: int
    """Dimensions of a head that are rotated."""
    rope_scaling: dict[str, Any] | None
    rope_parameters: dict[str, Any] | None
    quantization_config: dict[str, Any] | None

    @classmethod
    def parse(cls, raw: Mapping[str, Any], origin: str = "config.json") -> Described:
        """Read a config. Raises BadInput: as `recognise`, or other fields that are of the wrong kind."""
        model = recognise(raw, origin)
        scaling, parameters = (_object(raw, name, origin) for name in ("rope_scaling", "rope_parameters"))
        inner = parameters or {}
        known = model.architecture
        theta = _number(raw, inner, "rope_theta", known.rope_theta, origin)
        share = _number(raw, inner, "partial_rotary_factor", 1.0, origin)
        length = raw.get("max_position_embeddings")
        if type(length) is not int or length <= 0:
            raise BadInput(f"{origin}: max_position_embeddings {length!r} is not a positive integer")
        rotated = "rotary_dim" if "rotary_dim" in known.derived else "head_dim"
        return cls(
            model=model,
            model_type=str(raw.get("model_type")),
            max_position_embeddings=length,
            rope_theta=theta,
            rotary_dim=int(int(model.value(rotated)) * share),
            rope_scaling=scaling,
            rope_parameters=parameters,
            quantization_config=_object(raw, "quantization_config", origin),
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.model.value("vocab_size"))

    @property
    def rope(self) -> dict[str, Any]:
        """What an engine on transformers 5 reads: rope_parameters if given, else rope_scaling, else empty."""
        return dict(self.rope_parameters or self.rope_scaling or {})


def _object(raw: Mapping[str, Any], name: str, origin: str) -> dict[str, Any] | None:
    value = raw.get(name)
    if value is None or isinstance(value, dict):
        return value
    raise BadInput(f"{origin}: {name} is no JSON object")


def _number(
    raw: Mapping[str, Any], inner: Mapping[str, Any], name: str, default: float, origin: str
) -> float:
    """A field that transformers 5 moves into rope_parameters."""
    value = raw.get(name)
    value = inner.get(name) if value is None else value
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise BadInput(f"{origin}: {name} {value!r} is not a positive number")
    return float(value)
