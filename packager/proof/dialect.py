"""What a `quantization_config` states about quantized weights, read apart from the code that writes it.

Sources: compressed-tensors' `QuantizationArgs`; the config of DeepSeek-V3 and vLLM's `quantization/fp8.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

SUFFIXES = {"compressed-tensors": "weight_scale", "deepseek": "weight_scale_inv"}
"""Name of the scale beside `weight`, by dialect. The weight is multiplied by it in both."""
SCALE_DTYPES = ("F32", "BF16")
"""What engines load scales from."""
BLOCK = (128, 128)
"""The only block that the engines' FP8 kernels take."""


@dataclass(frozen=True)
class Stated:
    """Quantized weights with one scale a block, a row, or a group of columns of a row."""

    dialect: str
    """`deepseek` or `compressed-tensors`."""
    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: one scale a row."""
    skipped: tuple[str, ...]
    """Modules left alone: exact names, or patterns that begin with `re:` (compressed-tensors only)."""
    kind: Literal["fp8", "int4", "int8"] = "fp8"
    """Of the codes; INT4 is packed into int32."""

    @property
    def scheme(self) -> str:
        """`fp8-block`, `fp8-channel`, `int4-g128`, `int4-channel` or `w8a8`."""
        if self.kind == "fp8":
            return "fp8-channel" if self.block is None else "fp8-block"
        if self.kind == "int8":
            return "w8a8"
        return "int4-channel" if self.block is None else f"int4-g{self.block[1]}"

    @property
    def code_dtype(self) -> str:
        """Dtype of the tensor that holds the codes."""
        return {"fp8": "F8_E4M3", "int4": "I32", "int8": "I8"}[self.kind]

    def codes_of(self, weight: str) -> str:
        """Name of the tensor that holds the codes of `X.weight`."""
        return weight + "_packed" if self.kind == "int4" else weight

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of that tensor for a weight [N, K]."""
        return (*shape[:-1], -(-shape[-1] // 8)) if self.kind == "int4" else shape

    def shape_of(self, weight: str) -> str | None:
        """Name of the tensor that states the shape of a packed weight; None: its codes do."""
        return weight + "_shape" if self.kind == "int4" else None

    @property
    def suffix(self) -> str:
        """What a scale is called in place of `weight`."""
        return SUFFIXES[self.dialect]

    def skips(self, module: str) -> bool:
        """Whether vLLM leaves a module (a tensor name without `.weight`) unquantized."""
        return any(self.matches(entry, module) for entry in self.skipped)

    def matches(self, entry: str, module: str) -> bool:
        """Whether one entry of the list means a module."""
        if self.dialect == "compressed-tensors" and entry.startswith("re:"):
            return re.match(entry[3:], module) is not None
        return entry == module

    def sglang_skips(self, module: str) -> bool:
        """Whether SGLang does: of the DeepSeek style it also takes whole parts of a dotted name, with or
        without a leading `model.` (`quantization/fp8.py`, `is_layer_skipped`)."""
        if self.dialect != "deepseek":
            return self.skips(module)
        dotted = f".{module}."
        return any(f".{entry.removeprefix('model.').rstrip('.')}." in dotted for entry in self.skipped)


def scale_of(weight: str, suffix: str) -> str:
    """The name of the scale of `X.weight`."""
    return weight.removesuffix("weight") + suffix


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...]:
    """Shape of the scales of a weight [N, K]: [ceil(N/rows), ceil(K/columns)], or [N, 1] for one a row."""
    rows, columns = shape
    if block is None:
        return rows, 1
    return -(-rows // block[0]), -(-columns // block[1])


def read_stated(config: dict[str, Any]) -> tuple[Stated | None, list[str]]:
    """What a config.json states, and what is wrong with the statement; (None, []) for no quantization."""
    raw = config.get("quantization_config")
    if raw is None:
        return None, []
    if not isinstance(raw, dict):
        return None, ["quantization_config is not an object"]
    method = raw.get("quant_method")
    if method == "fp8":
        return _deepseek(raw)
    if method == "compressed-tensors":
        return _compressed(raw)
    return None, [f"quant_method {method!r} is neither fp8 nor compressed-tensors"]


def _deepseek(raw: dict[str, Any]) -> tuple[Stated | None, list[str]]:
    problems = []
    if raw.get("activation_scheme") != "dynamic":
        problems.append(f"activation_scheme is {raw.get('activation_scheme')!r}, not 'dynamic'")
    if raw.get("fmt", "e4m3") != "e4m3":
        problems.append(f"fmt is {raw.get('fmt')!r}, not 'e4m3'")
    if raw.get("weight_block_size") != list(BLOCK):
        problems.append(f"weight_block_size is {raw.get('weight_block_size')}, not {list(BLOCK)}")
    skipped = _names(raw, "modules_to_not_convert", problems)
    problems.extend(
        f"modules_to_not_convert has the pattern {name!r}; engines take plain names there"
        for name in skipped
        if name.startswith("re:")
    )
    return Stated("deepseek", BLOCK, skipped), problems


def _compressed(raw: dict[str, Any]) -> tuple[Stated | None, list[str]]:
    problems = []
    if raw.get("quantization_status") != "compressed":
        problems.append(f"quantization_status is {raw.get('quantization_status')!r}, not 'compressed'")
    skipped = _names(raw, "ignore", problems)
    for name in skipped:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as err:
                problems.append(f"ignore has {name!r}, which is no pattern: {err}")
                skipped = tuple(other for other in skipped if other != name)
    groups = raw.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict):
        return None, [*problems, "config_groups does not hold exactly one group"]
    if group.get("targets") != ["Linear"]:
        problems.append(f"the group's targets are {group.get('targets')}, not ['Linear']")
    weights = group.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    numbers = (weights.get("type"), weights.get("num_bits"))
    if numbers not in _FORMATS or weights.get("symmetric") is not True:
        kind = {key: weights.get(key) for key in ("type", "num_bits", "symmetric")}
        return None, [*problems, f"weights are {kind}, not symmetric 8-bit float or 4- or 8-bit int"]
    codes, form = _FORMATS[numbers]
    if raw.get("format") != form:
        problems.append(f"format is {raw.get('format')!r}, not {form!r}")
    block, want_activations = _sharing(codes, weights, problems)
    if want_activations is None:
        return None, problems
    activations = group.get("input_activations")
    if not want_activations and activations is not None:
        problems.append(f"input_activations are {activations}, not left alone")
    activations = activations if isinstance(activations, dict) else {}
    found = {key: activations.get(key) for key in want_activations}
    if found != want_activations:
        problems.append(f"input_activations are {found}, not {want_activations}")
    return Stated("compressed-tensors", block, skipped, codes), problems


_FORMATS: dict[Any, tuple[Literal["fp8", "int4", "int8"], str]] = {
    ("float", 8): ("fp8", "float-quantized"),
    ("int", 8): ("int8", "int-quantized"),
    ("int", 4): ("int4", "pack-quantized"),
}


def _sharing(
    codes: str, weights: dict[str, Any], problems: list[str]
) -> tuple[tuple[int, int] | None, dict[str, Any] | None]:
    """Which weights share a scale, and how activations must go with that; None: neither is known."""
    strategy = weights.get("strategy")
    token = {"strategy": "token", "dynamic": True}
    if strategy == "block" and codes == "fp8":
        if weights.get("block_structure") != list(BLOCK):
            problems.append(f"block_structure is {weights.get('block_structure')}, not {list(BLOCK)}")
        return BLOCK, {"strategy": "group", "group_size": BLOCK[1], "dynamic": True}
    if strategy == "channel":
        return None, {} if codes == "int4" else token
    columns = weights.get("group_size")
    if strategy == "group" and codes == "int4" and type(columns) is int and columns > 0:
        if weights.get("actorder") not in (None, "static", "weight"):
            problems.append(f"columns are reordered by activation (actorder {weights['actorder']!r})")
        return (1, columns), {}
    known = {"fp8": "block nor channel", "int8": "channel", "int4": "group nor channel"}[codes]
    word = "is not" if codes == "int8" else "is neither"
    problems.append(f"the weights' strategy {strategy!r} {word} {known}")
    return None, None


def _names(raw: dict[str, Any], key: str, problems: list[str]) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        problems.append(f"{key} is not a list of names")
        return ()
    return tuple(value)
