"""A checkpoint's architecture and the fields that fix its tensors, from config.json without transformers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from packager.errors import BadInput
from packager.layouts.architectures import ARCHITECTURES
from packager.layouts.declaration import Architecture, Expected, Field, Role, Value
from packager.layouts.expressions import evaluate

_MOST_LAYERS = 4096
_MOST_EXPERTS = 1 << 17
"""In all layers together; a config beyond it is damaged, and a list of its tensors would fill the memory."""
_MOST_PREDICTION_LAYERS = 16
"""The tensors of any further ones are unknown."""
_MTP_NAMES = re.compile(r"model\.layers\.(\d{1,9})\.(?:eh_proj|enorm|hnorm)\.")
_FUSED_NAMES = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(?:gate_up_proj|down_proj)$")


@dataclass(frozen=True)
class Model:
    """An architecture with the sizes of one config."""

    architecture: Architecture
    fields: Mapping[str, Value]

    @classmethod
    def of(cls, architecture: Architecture, raw: Mapping[str, Any], origin: str = "config.json") -> Model:
        """Read the fields that the declaration names.

        Raises:
            BadInput: fields that are missing, of another kind, or contradict one another; all are listed.
        """
        problems: list[str] = []
        values: dict[str, Value] = {}
        model = cls(architecture, values)
        for field in architecture.fields:
            try:
                values[field.name] = _read(field, raw, model)
            except ValueError as err:
                problems.append(str(err))
        if not problems:
            wrong = (text for check, text in architecture.checks.items() if not model.value(check))
            problems.extend(wrong)
            if model.layers > _MOST_LAYERS:
                problems.append(f"num_hidden_layers exceeds {_MOST_LAYERS}")
            elif model.experts * model.layers > _MOST_EXPERTS:
                problems.append(f"more than {_MOST_EXPERTS} experts in all layers together")
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise BadInput(f"{origin} is no {architecture.name} configuration:\n{lines}")
        return model

    @property
    def layers(self) -> int:
        """Layers, those for multi-token prediction not counted."""
        return int(self.value("num_hidden_layers"))

    @property
    def experts(self) -> int:
        """Routed experts of a layer; 0: a dense model."""
        return int(self.value("experts")) if self.architecture.experts else 0

    @property
    def shape(self) -> dict[str, int]:
        """Its size in the terms that are common to all architectures, for people."""
        known = self.architecture
        dense = sum(not self.value("sparse", layer=index) for index in range(self.layers))
        return {
            "layers": self.layers,
            "dense_layers": dense,
            "hidden_size": int(self.value("hidden_size")),
            "heads": int(self.value("num_attention_heads")),
            "kv_heads": int(self.value("kv_heads")),
            "head_dim": int(self.value("head_dim")),
            "experts": self.experts,
            "experts_per_token": int(self.value(known.experts_per_token)) if known.experts else 0,
            "shared_experts": int(self.value("shared_experts")) if "shared_experts" in known.derived else 0,
            "vocabulary": int(self.value("vocab_size")),
        }

    def value(self, text: str, *, layer: int = -1, fused: bool = False) -> Any:
        """The value of an expression of the declaration. Raises ValueError: a name in it is not known."""
        known = self.architecture

        def name(wanted: str) -> Any:
            if wanted in self.fields:
                return self.fields[wanted]
            match wanted:
                case "layer":
                    return layer
                case "fused":
                    return fused
                case "mtp":
                    return layer >= self.layers
                case "experts":
                    return self.fields[known.experts]
                case "experts_per_token":
                    return self.fields[known.experts_per_token]
                case "kv_heads":
                    return self.fields.get("num_key_value_heads", self.fields["num_attention_heads"])
                case "sparse" if "sparse" not in known.derived:
                    return bool(known.experts)
            if wanted not in known.derived:
                raise ValueError(f"{known.name}: a rule speaks of {wanted!r}, which no field gives")
            return evaluate(known.derived[wanted], name)

        return evaluate(text, name)

    def mtp_layers_in(self, names: Iterable[str]) -> int:
        """How many multi-token prediction layers a checkpoint with these tensor names has."""
        if not self.architecture.mtp_engines:
            return 0
        indices = {int(found[1]) for found in map(_MTP_NAMES.match, names) if found}
        return min(len({index for index in indices if index >= self.layers}), _MOST_PREDICTION_LAYERS)

    def fused_in(self, names: Iterable[str]) -> bool:
        """Whether a checkpoint with these tensor names holds all experts of a layer in one tensor."""
        return any(map(_FUSED_NAMES.match, names))

    def kinds(self, *, mtp_layers: int = 0, fused: bool = False) -> Iterator[tuple[Expected, int]]:
        """Every kind of tensor in each layer, in model order, and how many there are of it.

        More than one are the routed experts' (`{expert}` in the name); sizes are counted from these without a
        list of every tensor. The arguments are those of `tensors`.
        """
        for layered, rules in groupby(self.architecture.rules, key=lambda rule: rule.per_layer):
            block = tuple(rules)
            for layer in range(self.layers + mtp_layers) if layered else (-1,):
                for rule in block:
                    if rule.when and not self.value(rule.when, layer=layer, fused=fused):
                        continue
                    index = str(layer)
                    want = Expected(
                        rule.name.replace("{layer}", index),
                        rule.role,
                        self.value(rule.shape, layer=layer),
                        mtp=layer >= self.layers,
                        group=rule.group.replace("{layer}", index),
                        optional=rule.optional,
                    )
                    yield want, self.experts if rule.per_expert else 1

    def tensors(self, *, mtp_layers: int = 0, fused: bool = False) -> list[Expected]:
        """All tensors of a checkpoint, in model order, before any quantization.

        Args:
            mtp_layers: multi-token prediction layers present; the first has index `num_hidden_layers`.
            fused: whether the experts of a layer are one tensor.
        """
        found: list[Expected] = []
        for per_expert, run in groupby(
            self.kinds(mtp_layers=mtp_layers, fused=fused), key=lambda kind: "{expert}" in kind[0].name
        ):
            wants = [want for want, _ in run]
            if not per_expert:
                found.extend(wants)
                continue
            for expert in map(str, range(self.experts)):
                for want in wants:
                    name = want.name.replace("{expert}", expert)
                    found.append(
                        Expected(
                            name, want.role, want.shape, want.dtypes, want.mtp, want.group, want.optional
                        )
                    )
        return found

    def tensors_in(self, names: Iterable[str]) -> list[Expected]:
        """The tensors of a checkpoint with these names: its prediction layers, its form of experts."""
        known = list(names)
        return self.tensors(mtp_layers=self.mtp_layers_in(known), fused=self.fused_in(known))


def _read(field: Field, raw: Mapping[str, Any], model: Model) -> Value:
    """The value of a field. Raises ValueError: missing, of another kind, or given twice, differently."""
    given = {name: raw[name] for name in (field.name, *field.aliases) if name in raw}
    if len({repr(value) for value in given.values()}) > 1:
        raise ValueError(" and ".join(f"{name} {value!r}" for name, value in given.items()) + " disagree")
    value = next(iter(given.values()), None)
    # head_dim 0 occurs, and means the same as its absence.
    if value is None or (type(value) is int and value == 0 and isinstance(field.default, str)):
        value = field.null if given and field.null is not None else field.default
        if value is None:
            raise ValueError(f"{field.name}: {'null' if given else 'missing'}")
        if isinstance(value, str):
            try:
                value = model.value(value)
            except (ValueError, ZeroDivisionError):
                raise ValueError(f"{field.name}: missing, and it cannot be told from the others") from None
    if field.kind == "flag" and isinstance(value, bool):
        return value
    if field.kind == "layers" and isinstance(value, (list, tuple)) and all(type(i) is int for i in value):
        return tuple(value)
    least = {"size": 1, "count": 0}.get(field.kind)
    if least is not None and type(value) is int and least <= value < 1 << 40:
        return value
    wanted = {
        "size": "a positive integer",
        "count": "a natural number",
        "flag": "true or false",
        "layers": "a list of layers",
    }
    raise ValueError(f"{field.name}: {value!r} is not {wanted[field.kind]}")


def recognise(raw: Mapping[str, Any], origin: str = "config.json") -> Model:
    """The model that a config describes.

    Raises:
        BadInput: an architecture that is not declared, one that is recognised and refused (with the reason),
            or fields that are missing or wrong.
    """
    architecture = architecture_of(raw, origin)
    if architecture.refused:
        raise BadInput(
            f"{origin} is a {architecture.name}, which is not quantized here: {architecture.refused}",
            "Serve the checkpoint as it is.",
        )
    return Model.of(architecture, raw, origin)


def architecture_of(raw: Mapping[str, Any], origin: str = "config.json") -> Architecture:
    """The declared architecture that a config names. Raises BadInput: none, or one that is not declared."""
    names = raw.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    model_type = raw.get("model_type")
    for known in ARCHITECTURES:
        if known.name not in names and (names or model_type not in known.model_types):
            continue
        if model_type not in known.model_types:
            raise BadInput(
                f"{origin}: architecture {known.name} is not of model_type {model_type!r}; its own is "
                + " or ".join(known.model_types)
            )
        return known
    raise BadInput(
        f"{origin}: {', '.join(names) or model_type or 'an unnamed architecture'} is not known here",
        f"Known are {', '.join(known.name for known in ARCHITECTURES)}.",
    )


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, scales and multi-token prediction layers not counted."""

    total: int
    """All, the bias of the experts included."""
    float32: int
    """Of these, the ones stored as FP32: that bias."""
    active: int
    """Used for one token: the chosen experts of each layer, and everything else once."""
    mtp: int
    """Of multi-token prediction layers."""

    @property
    def bfloat16(self) -> int:
        """The rest, stored as BF16."""
        return self.total - self.float32


def count_parameters(model: Model, mtp_layers: int = 0) -> ParameterCount:
    """Count from the configuration alone."""
    total = float32 = routed = mtp = 0
    for tensor, times in model.kinds(mtp_layers=mtp_layers):
        count = times * tensor.count
        if tensor.optional:
            continue
        if tensor.mtp:
            mtp += count
            continue
        total += count
        if tensor.role is Role.EXPERT_BIAS:
            float32 += count
        elif tensor.role is Role.ROUTED_EXPERT:
            routed += count
    idle = routed * (model.experts - model.shape["experts_per_token"]) // max(model.experts, 1)
    return ParameterCount(total=total, float32=float32, active=total - idle, mtp=mtp)
