"""YaRN (arXiv 2309.00071) as a patch of config.json, and the rotary frequencies that the patch means.

The patch writes what every reader looks for: transformers 5 takes `rope_parameters` and, where both are
there, ignores `rope_scaling`; older ones and SGLang take `rope_scaling`; `type` is the older spelling of
`rope_type`, and engines refuse a pair that disagrees. vLLM no longer derives the scaled length: it has to be
in `max_position_embeddings`, and exactly, since positions beyond the rotary table go wrong without an error.

The patch also records what it replaced, under `extended_from`, which engines pass over: so the trained config
comes back to the last byte, and one set of weights serves both lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packager.errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BETA_FAST, BETA_SLOW = 32, 1
"""Rotations over the trained length above which a dimension is left alone, below which it is interpolated."""

RECORD = "extended_from"
"""Top-level key: {"config": {key: value before}, "tokenizer_config": {…}}; an absent key was not there."""

_PATCHED = ("max_position_embeddings", "rope_scaling", "rope_parameters")
_TYPES = ("rope_type", "type")
_AT_TOP = ("rope_theta", "partial_rotary_factor")
_HARMLESS = frozenset({*_TYPES, *_AT_TOP})
_UNSCALED = (None, "default")


def yarn_patch(config: dict[str, Any], length: int) -> dict[str, Any]:
    """A copy of a model's config.json that serves `length` tokens through YaRN; target and draft alike.

    Args:
        config: with `max_position_embeddings` (the trained length) and `rope_theta`, unscaled.
        length: tokens; a multiple of the trained length.

    Raises:
        BadInput: a length that is no larger multiple, a config that is scaled already, or rotary settings
            that are missing or contradict each other.
    """
    if RECORD in config:
        raise BadInput(f"config.json has been extended before: it has {RECORD}", _TRAINED)
    for name in ("rope_scaling", "rope_parameters"):
        _refuse_scaled(config, name)
    original = config.get("max_position_embeddings")
    if type(original) is not int or original <= 0:
        raise BadInput("config.json has no max_position_embeddings: the trained length is unknown")
    if length <= original or length % original:
        raise BadInput(
            f"{length} tokens is no larger multiple of the trained length {original}",
            f"Choose {2 * original}, {4 * original} or another multiple.",
        )
    if config.get("original_max_position_embeddings", original) != original:
        raise BadInput("config.json states an original_max_position_embeddings: it has been extended before")
    theta = _one_value(config, "rope_theta")
    if theta is None:
        raise BadInput("config.json has no rope_theta; a guess would change every position")
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": length / original,
        "original_max_position_embeddings": original,
        "rope_theta": theta,
    }
    share = _one_value(config, "partial_rotary_factor")
    if share is not None:
        rope["partial_rotary_factor"] = share
    # Two dictionaries, not one twice: a caller may change one of them.
    return {
        **config,
        "max_position_embeddings": length,
        "rope_scaling": rope,
        "rope_parameters": dict(rope),
        RECORD: {"config": {name: config[name] for name in _PATCHED if name in config}},
    }


def undo_patch(config: dict[str, Any]) -> dict[str, Any]:
    """The trained-length config that a YaRN config came from, keys in their former order.

    Where `yarn_patch` made it, what it replaced comes back as it was. A YaRN config by others carries no
    record: it gets the same trained length, theta and rotary share, and no scaling.

    Raises:
        BadInput: the config is not YaRN's, does not say its trained length, or contradicts itself.
    """
    rope = yarn_settings(config)
    original = rope["original_max_position_embeddings"]
    record = config.get(RECORD)
    if record is None:
        trained = {
            name: value for name, value in rope.items() if name in ("rope_theta", "partial_rotary_factor")
        }
        unscaled = {"max_position_embeddings": original, "rope_scaling": None}
        if "rope_parameters" in config:
            unscaled["rope_parameters"] = {**trained, "rope_type": "default"}
        # Whoever reads the top level alone must not fall back to its own default.
        return {**config, **unscaled, **trained}
    before = record.get("config") if isinstance(record, dict) else None
    if not isinstance(before, dict) or before.get("max_position_embeddings") != original:
        raise BadInput(
            f"{RECORD} in config.json is not what was replaced at {original} tokens: it was altered"
        )
    kept = {name: value for name, value in config.items() if name != RECORD}
    return {
        name: before.get(name, value)
        for name, value in kept.items()
        if name in before or name not in _PATCHED
    }


def yarn_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The YaRN parameters of a config, in which every reader must find the same ones.

    Raises:
        BadInput: no YaRN, `type` and `rope_type` or `rope_scaling` and `rope_parameters` that disagree, or a
            trained length that is missing: engines then take the extended one for it.
    """
    found = {name: config[name] for name in ("rope_parameters", "rope_scaling") if config.get(name)}
    kinds = {name: _type_of(rope, name) for name, rope in found.items()}
    if not found or set(kinds.values()) <= set(_UNSCALED):
        raise BadInput(
            "config.json has no YaRN to undo: it is at its trained length",
            "Give a folder that `extend-context --length` or somebody else's YaRN has extended.",
        )
    if len(set(kinds.values())) > 1:
        said = " and ".join(f"{name} is {kind!r}" for name, kind in kinds.items())
        raise BadInput(f"config.json contradicts itself: {said}", _WINS)
    if "yarn" not in kinds.values():
        raise BadInput(f"config.json is scaled by {kinds.popitem()[1]!r}, not by YaRN")
    settings: dict[str, Any] = {}
    for key in ("factor", "original_max_position_embeddings", "rope_theta", "partial_rotary_factor"):
        places = [*found.values(), *([config] if key in _AT_TOP else [])]
        values = {place[key] for place in places if place.get(key) is not None}
        if len(values) > 1:
            raise BadInput(f"config.json contradicts itself: {key} is {sorted(values)}", _WINS)
        if values:
            settings[key] = values.pop()
    if not settings.get("original_max_position_embeddings"):
        raise BadInput(
            "the YaRN settings lack original_max_position_embeddings: the trained length is unknown",
            "Add it; engines take max_position_embeddings for it and rotate wrongly.",
        )
    return settings


_TRAINED = "Extend the checkpoint with the trained length, not one that was extended before."
_WINS = "transformers 5 takes rope_parameters, older readers rope_scaling; let both say the same."


def _type_of(rope: Any, name: str) -> str | None:
    if not isinstance(rope, dict):
        raise BadInput(f"{name} in config.json is not an object")
    kinds = {rope[key] for key in _TYPES if rope.get(key) is not None}
    if len(kinds) > 1:
        raise BadInput(
            f"{name} in config.json has two types: {' and '.join(sorted(map(repr, kinds)))}", _WINS
        )
    return kinds.pop() if kinds else None


def _refuse_scaled(config: dict[str, Any], name: str) -> None:
    rope = config.get(name)
    if rope is None:
        return
    kind = _type_of(rope, name)
    if kind not in _UNSCALED:
        raise BadInput(f"{name} in config.json is {kind!r} already (factor {rope.get('factor')})", _TRAINED)
    if extra := sorted(set(rope) - _HARMLESS):
        raise BadInput(f"{name} in config.json has settings that YaRN would contradict: {', '.join(extra)}")


def _one_value(config: dict[str, Any], name: str) -> Any:
    """A rotary setting, which may stand at the top level and inside the rope dictionaries, if they agree."""
    places = [config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {}]
    values = {place[name] for place in places if place.get(name) is not None}
    if len(values) > 1:
        raise BadInput(f"config.json gives {name} twice, differently: {sorted(values)}")
    return values.pop() if values else None


@dataclass(frozen=True)
class YarnFrequencies:
    """What an engine computes from the patch."""

    inverse: NDArray[np.float64]
    """Angle per position of each rotated pair of dimensions [rotary_dim / 2]."""
    mscale: float
    """Factor on cos and sin: 0.1 ln(factor) + 1."""
    low: int
    """Pairs below this index keep their frequency."""
    high: int
    """Pairs from this index on are divided by the factor; between the two, a ramp."""


def yarn_frequencies(rotary_dim: int, theta: float, factor: float, original: int) -> YarnFrequencies:
    """Compute YaRN's frequencies (paper, section 3.2, "NTK-by-parts", and 3.4, attention temperature).

    Args:
        rotary_dim: rotated dimensions of a head (head_dim x partial_rotary_factor).
        theta: rotary base.
        factor: extended length / trained length.
        original: trained length in tokens.
    """
    import numpy as np

    def pair_with(rotations: float) -> float:
        """Index of the pair that turns `rotations` times over the trained length."""
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(BETA_FAST)), 0)
    high = min(math.ceil(pair_with(BETA_SLOW)), rotary_dim - 1)
    pairs = np.arange(rotary_dim // 2, dtype=np.float64)
    unscaled = theta ** (-2.0 * pairs / rotary_dim)
    # Where the bounds meet, the ramp is a step; engines widen it by this much to avoid a division by zero.
    interpolated = np.clip((pairs - low) / ((high - low) or 0.001), 0.0, 1.0)
    inverse = unscaled * (1.0 - interpolated) + unscaled / factor * interpolated
    return YarnFrequencies(inverse, 0.1 * math.log(factor) + 1.0, low, high)
