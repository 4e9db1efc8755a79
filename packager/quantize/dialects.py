"""How checkpoints name quantized weights: the `quantization_config`, and what it means for the layout.

Written here: block FP8 in two dialects of the same bytes, all else in compressed-tensors alone. The fields
are those of `compressed_tensors.quantization` and its presets FP8_BLOCK, FP8_DYNAMIC, W4A16 and W8A8.
DeepSeek style: the config of DeepSeek-V3, read by vLLM's `quantization/fp8.py`, which compares skipped module
names exactly. Read as well, to dequantize it: INT4 with other groups, or with zero points.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from packager.checkpoint.header import TensorInfo
from packager.errors import BadInput
from packager.layouts import NEVER_QUANTIZED, QUANTIZABLE, Expected, Role
from packager.recipe import Dialect

Storage = Literal["fp8-block", "fp8-channel", "int4", "w8a8"]

BLOCK = 128
"""Rows and columns that share a weight scale; also the group of dynamic activation scales."""

SCALE_SUFFIX: dict[Dialect, str] = {"compressed-tensors": "weight_scale", "deepseek": "weight_scale_inv"}
"""Name of the scale beside `weight`. DeepSeek's is called inverse, yet the weight is multiplied by it too."""

_FLOAT_SCALES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Quantization:
    """A quantization as a config.json states it."""

    dialect: Dialect
    skipped: tuple[str, ...]
    """Modules left alone: exact names, or patterns that begin with `re:`."""
    scheme: Storage = "fp8-block"
    group: int = 0
    """INT4: columns that share a scale; 0: the whole row."""
    symmetric: bool = True
    """INT4: no zero points are stored."""

    def skips(self, module: str) -> bool:
        """Whether a module (a tensor name without `.weight`) is left unquantized."""
        names, patterns = self._skipped
        return module in names or any(pattern.match(module) for pattern in patterns)

    @cached_property
    def _skipped(self) -> tuple[frozenset[str], list[re.Pattern[str]]]:
        """Exact names, of which there may be thousands, and compiled patterns."""
        patterns = [re.compile(name[3:]) for name in self.skipped if name.startswith("re:")]
        return frozenset(name for name in self.skipped if not name.startswith("re:")), patterns

    def scale_of(self, weight: str) -> str:
        """Name of the scale that belongs to `X.weight`."""
        return weight.removesuffix("weight") + SCALE_SUFFIX[self.dialect]

    def codes_of(self, weight: str) -> str:
        """Name of the tensor that holds the codes of `X.weight`."""
        return f"{weight}_packed" if self.scheme == "int4" else weight

    def quantizes(self, want: Expected) -> bool:
        """Whether a tensor of the unquantized layout is stored as codes."""
        return want.role in QUANTIZABLE and not self.skips(_module(want))

    def stored(self, want: Expected) -> list[Expected]:
        """The tensors that hold a quantized weight [N, K]: codes first, then scales and the like.

        Of several dtypes that are read, the first is the one written here.
        """
        rows, columns = want.shape

        def part(name: str, shape: tuple[int, ...], *dtypes: str) -> Expected:
            return replace(want, name=name, role=Role.SCALE, shape=shape, dtypes=dtypes)

        scale = self.scale_of(want.name)
        if self.scheme == "fp8-block":
            parts = [part(scale, scale_shape(want.shape), "F32", "BF16")]
        elif self.scheme in ("fp8-channel", "w8a8"):
            parts = [part(scale, (rows, 1), *_FLOAT_SCALES)]
        else:
            groups = -(-columns // self.group) if self.group else 1
            codes = replace(
                want, name=self.codes_of(want.name), shape=(rows, -(-columns // 8)), dtypes=("I32",)
            )
            parts = [
                codes,
                part(scale, (rows, groups), "BF16", "F16", "F32"),
                part(f"{want.name}_shape", (2,), "I64", "I32"),
            ]
            if not self.symmetric:
                parts.append(part(f"{want.name}_zero_point", (-(-rows // 8), groups), "I32"))
            return parts
        return [replace(want, dtypes=("I8" if self.scheme == "w8a8" else "F8_E4M3",)), *parts]


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks along rows and columns of a weight [N, K]: [ceil(N/128), ceil(K/128)]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantization_config(
    stated: Quantization, layout: Collection[Expected], quantized: Container[str]
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that holds `layout`, the weights `quantized` as `stated`."""
    if stated.dialect == "deepseek":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": [_module(want) for want in _kept(layout, quantized)],
        }
    form, weights, activations = _group(stated)
    group: dict[str, Any] = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}
    if activations:
        group["input_activations"] = {**activations, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored_modules(layout, quantized),
        "kv_cache_scheme": None,
    }


def _group(stated: Quantization) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Format, arguments of weights and of activations; empty where these are not quantized."""
    fp8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    integer: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    row, token = {"strategy": "channel"}, {"strategy": "token"}
    if stated.scheme == "fp8-block":
        block = {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        return "float-quantized", {**fp8, **block}, {**fp8, "strategy": "group", "group_size": BLOCK}
    if stated.scheme == "fp8-channel":
        return "float-quantized", {**fp8, **row}, {**fp8, **token}
    if stated.scheme == "w8a8":
        return "int-quantized", {**integer, **row}, {**integer, **token}
    columns = {"strategy": "group", "group_size": stated.group} if stated.group else row
    return "pack-quantized", {**integer, "num_bits": 4, "symmetric": stated.symmetric, **columns}, {}


def _module(want: Expected) -> str:
    return want.name.removesuffix(".weight")


def _kept(layout: Collection[Expected], quantized: Container[str]) -> list[Expected]:
    """Matrices that are left alone."""
    return [want for want in layout if want.name not in quantized and len(want.shape) > 1]


def ignored_modules(layout: Collection[Expected], quantized: Container[str]) -> list[str]:
    """The `ignore` list of compressed-tensors: patterns for what is never quantized, names for what is left
    alone in this checkpoint."""
    names: list[str] = []
    touched = {_in_layer(want)[0] for want in layout if want.name in quantized}
    for want in _kept(layout, quantized):
        layer, tail = _in_layer(want)
        if want.mtp and layer not in touched:
            names.append(rf"re:.*\.layers\.{layer}\..*")  # instead of a line for each of its experts
        elif want.role is Role.FUSED_EXPERTS:
            names.append(r"re:.*\.mlp\.experts.*")
        elif layer and want.role in NEVER_QUANTIZED:
            names.append(rf"re:.*\.{re.escape(tail)}$")
        else:
            names.append(_module(want))
    return list(dict.fromkeys(names))


def _in_layer(want: Expected) -> tuple[str, str]:
    """Index of its layer and its module within the layer; empty and the whole module where it is in none."""
    found = re.fullmatch(r".*\.layers\.(\d+)\.(.+)", _module(want))
    return (found[1], found[2]) if found else ("", _module(want))


def quantization_of(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a config.json that describes a quantization, under either name; None: there is none."""
    found = raw.get("quantization_config") or raw.get("compression_config")
    if found is None or isinstance(found, dict):
        return found or None
    raise BadInput("the quantization_config of config.json is no JSON object")


def read_quantization(raw: Mapping[str, Any] | None) -> Quantization | None:
    """What a `quantization_config` says; None for an unquantized checkpoint.

    Raises:
        BadInput: a scheme that is not read here.
    """
    if not raw:
        return None
    method = raw.get("quant_method")
    if method == "fp8":
        if raw.get("weight_block_size") != [BLOCK, BLOCK] or raw.get("activation_scheme") != "dynamic":
            raise _unsupported(
                f"fp8 with weight_block_size {raw.get('weight_block_size')} and "
                f"{raw.get('activation_scheme')} activations"
            )
        return Quantization("deepseek", _names(raw.get("modules_to_not_convert")))
    if method == "compressed-tensors":
        return _read_compressed_tensors(raw)
    raise _unsupported(_KNOWN_METHODS.get(str(method), f"quant_method {method!r}"))


_KNOWN_METHODS = {
    "mxfp4": "MXFP4, as the model was trained; engines serve it as it is",
    "gptq": "GPTQ packing",
    "awq": "AWQ packing",
    "bitsandbytes": "bitsandbytes",
    "modelopt": "ModelOpt",
}


def _read_compressed_tensors(raw: Mapping[str, Any]) -> Quantization:
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise _unsupported("compressed-tensors with several or no config_groups")
    (group,) = groups.values()
    group = group if isinstance(group, dict) else {}
    weights = group.get("weights")
    weights = weights if isinstance(weights, dict) else {}
    activations = group.get("input_activations")
    static = isinstance(activations, dict) and activations.get("dynamic") is not True
    skipped = _names(raw.get("ignore"))
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    kind = (weights.get("type"), weights.get("num_bits"), strategy)
    if not static and kind == ("float", 8, "block") and block == [BLOCK, BLOCK]:
        return Quantization("compressed-tensors", skipped)
    if not static and kind == ("float", 8, "channel"):
        return Quantization("compressed-tensors", skipped, "fp8-channel")
    formats, symmetric = (raw.get("format"), group.get("format")), weights.get("symmetric") is not False
    if not static and kind == ("int", 8, "channel") and symmetric and "int-quantized" in formats:
        return Quantization("compressed-tensors", skipped, "w8a8")
    packed = "pack-quantized" in formats
    columns = weights.get("group_size") if strategy == "group" else 0
    sorted_columns = weights.get("actorder") in ("group", "dynamic")
    if (
        packed
        and not static
        and kind[:2] == ("int", 4)
        and strategy in ("group", "channel")
        and type(columns) is int
        and (columns > 0 or strategy == "channel")
        and not sorted_columns
    ):
        return Quantization("compressed-tensors", skipped, "int4", columns, symmetric)
    details = [f"format {group.get('format') or raw.get('format')}"]
    details += ["static activation scales"] if static else []
    details += ["columns reordered by activation"] if sorted_columns else []
    raise _unsupported(
        f"compressed-tensors {weights.get('type')} {weights.get('num_bits')} bit, strategy {strategy}, "
        + ", ".join(details)
    )


def _names(raw: Any) -> tuple[str, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not all(isinstance(name, str) for name in raw):
        raise BadInput("the list of skipped modules in quantization_config is malformed")
    for name in raw:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as err:
                raise BadInput(f"quantization_config skips {name!r}, which is no pattern: {err}") from None
    return tuple(raw)


def _unsupported(what: str) -> BadInput:
    return BadInput(
        f"this quantization is not read here: {what}",
        "Start from the BF16 checkpoint, from FP8 with a scale a 128x128 block or a row, or from INT4 or "
        "INT8 of compressed-tensors.",
    )


def refuse_quantized(raw: Mapping[str, Any], found: Iterable[TensorInfo], origin: str) -> None:
    """Raise BadInput where a checkpoint that is to be quantized is so already, with what to do instead."""
    stated = quantization_of(raw)
    if stated is None:
        codes = next((info for info in found if _looks_quantized(info)), None)
        if codes is not None:
            raise BadInput(
                f"{origin} is quantized already: {codes.name} is {codes.dtype}, though config.json does not "
                "say so",
                "Give the BF16 checkpoint, or one whose config.json states its quantization.",
            )
        return
    method = stated.get("quant_method")
    try:
        scheme = read_quantization(stated)
    except BadInput as err:
        raise BadInput(
            f"{origin} is quantized already ({method}): {err.message}",
            "Give the BF16 checkpoint: this one cannot be dequantized here.",
        ) from None
    raise BadInput(
        f"{origin} is quantized already ({method}, {scheme.scheme if scheme else method})",
        "Give the BF16 checkpoint, or make one with `packager dequantize`; `packager relabel` changes the "
        "dialect of block FP8.",
    )


def _looks_quantized(info: TensorInfo) -> bool:
    """8-bit numbers, or packed codes: gpt-oss calls them `_blocks`, compressed-tensors `weight_packed`."""
    packed = (".weight_packed", "_blocks", ".qweight")
    return info.dtype.startswith(("F8_", "I8")) or info.name.endswith(packed)


def quantized_layout(layout: Iterable[Expected], quantization: Quantization) -> list[Expected]:
    """The layout of the same model after quantization: codes for weights, each followed by its scale."""
    tensors: list[Expected] = []
    for want in layout:
        tensors.extend(quantization.stored(want) if quantization.quantizes(want) else [want])
    return tensors
