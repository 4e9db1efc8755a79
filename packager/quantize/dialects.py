"""The two ways engines name the same FP8 bytes, and what a `quantization_config` means for the layout.

compressed-tensors: the fields of `compressed_tensors.quantization` (preset FP8_BLOCK). DeepSeek style: the
config of DeepSeek-V3, read by vLLM's `quantization/fp8.py`, which compares skipped module names exactly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from packager.bailing.layout import QUANTIZABLE, Expected, Role
from packager.errors import BadInput

Dialect = Literal["compressed-tensors", "deepseek"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

BLOCK = 128
"""Rows and columns that share a weight scale; also the group of dynamic activation scales."""

SCALE_SUFFIX: dict[Dialect, str] = {"compressed-tensors": "weight_scale", "deepseek": "weight_scale_inv"}
"""Name of the scale beside `weight`. DeepSeek's is called inverse, yet the weight is multiplied by it too."""

_SKIPPED_PATTERNS = ("lm_head", r"re:.*word_embeddings$", r"re:.*\.mlp\.gate$", r"re:.*\.eh_proj$")
_SKIPPED_ROLES = frozenset({Role.EMBEDDING, Role.LM_HEAD, Role.ROUTER, Role.MTP_PROJECTION})


@dataclass(frozen=True)
class Quantization:
    """Block FP8 as a config.json states it."""

    dialect: Dialect
    skipped: tuple[str, ...]
    """Modules left alone: exact names, or patterns that begin with `re:`."""

    def skips(self, module: str) -> bool:
        """Whether a module (a tensor name without `.weight`) is left unquantized."""
        return any(
            re.match(name[3:], module) is not None if name.startswith("re:") else name == module
            for name in self.skipped
        )

    def scale_of(self, weight: str) -> str:
        """Name of the scale that belongs to `X.weight`."""
        return weight.removesuffix("weight") + SCALE_SUFFIX[self.dialect]


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks along rows and columns of a weight [N, K]: [ceil(N/128), ceil(K/128)]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantization_config(dialect: Dialect, layout: Iterable[Expected]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose quantizable roles are block FP8."""
    if dialect == "deepseek":
        modules = [want.name.removesuffix(".weight") for want in layout if want.role in _SKIPPED_ROLES]
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": modules,
        }
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    **common,
                    "strategy": "block",
                    "block_structure": [BLOCK, BLOCK],
                    "dynamic": False,
                },
                "input_activations": {
                    **common,
                    "strategy": "group",
                    "group_size": BLOCK,
                    "dynamic": True,
                },
            }
        },
        "ignore": list(_SKIPPED_PATTERNS),
        "kv_cache_scheme": None,
    }


def read_quantization(raw: dict[str, Any] | None) -> Quantization | None:
    """What a `quantization_config` says; None for an unquantized checkpoint.

    Raises:
        BadInput: a scheme other than 128x128 block FP8 in one of the two dialects.
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
        groups = raw.get("config_groups")
        if not isinstance(groups, dict) or len(groups) != 1:
            raise _unsupported("compressed-tensors with several or no config_groups")
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        kind = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
        if kind != ("float", 8, "block") or weights.get("block_structure") != [BLOCK, BLOCK]:
            raise _unsupported(
                f"compressed-tensors {weights.get('type')} {weights.get('num_bits')} bit, "
                f"strategy {weights.get('strategy')}"
            )
        return Quantization("compressed-tensors", _names(raw.get("ignore")))
    raise _unsupported(f"quant_method {method!r}")


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
        "Start from the BF16 checkpoint, or from 128x128 block FP8 in either dialect.",
    )


def quantized_layout(layout: Iterable[Expected], quantization: Quantization) -> list[Expected]:
    """The layout of the same model after quantization: FP8 weights, each followed by its scale."""
    tensors: list[Expected] = []
    for want in layout:
        if want.role not in QUANTIZABLE or quantization.skips(want.name.removesuffix(".weight")):
            tensors.append(want)
            continue
        tensors.append(Expected(want.name, want.role, want.shape, ("F8_E4M3",), want.mtp))
        tensors.append(
            Expected(
                quantization.scale_of(want.name),
                Role.SCALE,
                scale_shape(want.shape),
                ("F32", "BF16"),
                want.mtp,
            )
        )
    return tensors
