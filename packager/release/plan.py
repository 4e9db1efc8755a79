"""The dry run: what each stage of a recipe reads, writes and needs, computed from the architecture alone.

Nothing is typed in: tensors, their shapes and dtypes follow from config.json, sizes from those. It needs no
network, no torch and no weights.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packager.bailing.config import BailingConfig
from packager.bailing.layout import QUANTIZABLE, model_of
from packager.bundle.licensing import licence_statements, require_decided
from packager.checkpoint.hub_name import is_commit
from packager.checkpoint.source import read_json_object
from packager.draft.states_file import bytes_per_token
from packager.errors import BadInput
from packager.recipe import Recipe, SchemeName
from packager.release.rubrics import rubric_trouble
from packager.release.workspace import at_hand, packaged_checkpoint
from packager.serving.plan import fit, model_bytes, smallest
from validation.hardware import GB, Hardware, parse_hardware
from validation.models import Precision

TORCH_BYTES = 0.4 * GB
"""Resident size of a process that has imported torch."""
COPY_BYTES = 1 << 26
"""Piece in which tensors are copied."""

_PRECISIONS: Mapping[SchemeName, Precision] = {
    "fp8-block": "fp8",
    "fp8-channel": "fp8-channel",
    "int4-g128": "int4",
    "w8a8": "int8",
}
_WEIGHTS, _ITEMS, _DENSE = "the weights", "an items file", "a dense baseline"


@dataclass(frozen=True)
class Sizes:
    """Bytes that follow from the architecture and the recipe."""

    parameters: int
    active_parameters: int
    source: int
    fp8: int
    draft: int
    states: int
    """Hidden states of the draft's training set: every response at its longest, within the disk budget."""
    kv_token: int
    """KV cache of one token, BF16, the draft's layer included."""
    largest_weight: int
    """Largest tensor that is quantized, in BF16."""


@dataclass(frozen=True)
class StagePlan:
    """One stage, before it runs."""

    name: str
    reads: int
    """Bytes."""
    writes: int
    """Bytes; links count nothing."""
    memory: int
    """Peak bytes of main memory, about."""
    cards: int
    """Bytes of accelerator memory that what it serves or trains must have; 0: none."""
    needs: tuple[str, ...]
    missing: tuple[str, ...]
    """Of the needs, what is not here."""


@dataclass(frozen=True)
class DryRun:
    """The plan of a release and what this machine lacks for it."""

    recipe: str
    source: str
    hardware: str
    weights: str
    """What the quantized ones are called: FP8, INT8 or INT4."""
    sizes: Sizes
    stages: tuple[StagePlan, ...]
    gates: tuple[tuple[str, float | str], ...]
    peak_disk: int
    """Bytes in the workspace at its end, the source and all that may be deleted (`work/`) included."""
    missing: tuple[str, ...]
    """What must be decided or brought before the recipe can run here; empty: it can."""

    def document(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"kind": "dry run", **asdict(self), "gates": dict(self.gates)}


def sizes(config: BailingConfig, recipe: Recipe) -> Sizes:
    """Sizes of every artifact, tensor by tensor from the layout."""
    bf16 = model_bytes(config, "bf16")
    precision = _PRECISIONS[recipe.quantize.scheme]
    fp8 = model_bytes(config, precision, draft_vocab=recipe.draft.vocab_size)
    width = recipe.draft.intermediate_size or 4 * config.hidden_size
    widened = config.model_copy(update={"intermediate_size": width})
    tokens = recipe.draft.prompts * recipe.draft.max_response_tokens
    layers = len(recipe.draft.aux_layers) + 1
    token_states = bytes_per_token(layers, config.hidden_size, recipe.draft.states_dtype)
    return Sizes(
        parameters=bf16.parameters,
        active_parameters=bf16.active_parameters,
        source=bf16.weights,
        fp8=fp8.weights,
        draft=model_bytes(widened, precision, draft_vocab=recipe.draft.vocab_size).draft,
        states=min(tokens * token_states, recipe.draft.max_states_bytes or sys.maxsize),
        kv_token=fp8.kv_per_token,
        largest_weight=max(
            2 * want.count for want, _ in model_of(config).kinds() if want.role in QUANTIZABLE
        ),
    )


def plan_release(recipe: Recipe, path: Path) -> DryRun:
    """Plan a recipe read from `path` (its `source.shape` lies beside it).

    Raises:
        BadInput: neither the source nor a shape is here, or it is not a BailingMoeV2 configuration.
    """
    config, present = _configuration(recipe, path)
    found = sizes(config, recipe)
    cards = _hardware(recipe)
    return DryRun(
        recipe=recipe.name,
        source=recipe.source.path or f"{recipe.source.repo}@{recipe.source.revision or '(not pinned)'}",
        hardware=recipe.hardware,
        weights=recipe.quantize.weights,
        sizes=found,
        stages=_stages(recipe, config, found, cards, present),
        gates=_bounds(recipe),
        # Source, quantized weights, draft, states, and a rehearsal that uploads and downloads the bundle.
        peak_disk=found.source + found.states + 3 * (found.fp8 + found.draft),
        missing=_undecided(recipe, config, present, found, cards),
    )


def _bounds(recipe: Recipe) -> tuple[tuple[str, float | str], ...]:
    """Gates that are set; the accuracy asked of long records only beside their length."""
    return tuple(
        (name, bound if isinstance(bound, (int, float, str)) else _listed(bound))
        for name, bound in recipe.gates
        if bound not in (None, (), {})
        and (name != "min_long_accuracy" or recipe.gates.min_long_context_tokens is not None)
    )


def _listed(named: Mapping[str, float] | Sequence[str]) -> str:
    pairs = [f"{name} {bound:g}" for name, bound in named.items()] if isinstance(named, Mapping) else named
    return ", ".join(pairs)


def _configuration(recipe: Recipe, path: Path) -> tuple[BailingConfig, bool]:
    """The architecture, and whether the weights are here too."""
    spec = recipe.source
    if spec.path is not None:
        directory = packaged_checkpoint(spec.path) or Path(spec.path).expanduser()
        if directory.is_dir():
            return BailingConfig.load(directory), True
        if spec.shape is None:
            raise BadInput(f"the recipe's source {spec.path} is not a folder", "Correct source.path.")
    if spec.shape is None:
        raise BadInput(
            f"{spec.repo} is not here, so its sizes cannot be computed",
            "Give source.shape: a config.json of the same architecture beside the recipe.",
        )
    shape = path.parent / spec.shape
    return BailingConfig.parse(read_json_object(shape), str(shape)), False


def _hardware(recipe: Recipe) -> Hardware | None:
    """The cards of a name like `2xh20`; None for `cpu`."""
    return None if recipe.hardware == "cpu" else parse_hardware(recipe.hardware)


def _stages(
    recipe: Recipe, config: BailingConfig, found: Sizes, cards: Hardware | None, present: bool
) -> tuple[StagePlan, ...]:
    bundle = found.fp8 + found.draft
    context_kv = recipe.context.length * found.kv_token
    served = found.fp8 + found.draft + context_kv
    # A head in training: FP32 weights, gradients and two moments beside the BF16 embeddings of the target.
    training = 16 * (found.draft // 2) + 2 * config.vocab_size * config.hidden_size
    weights = (_WEIGHTS,)
    accelerated = cards is not None
    engine = ("vLLM",)
    gpus = (f"{cards.label} ({cards.memory / GB:.0f} GB)",) if cards else ()

    def stage(
        name: str, reads: int, writes: int, memory: float, on_cards: int = 0, needs: tuple[str, ...] = ()
    ) -> StagePlan:
        return StagePlan(
            name=name,
            reads=reads,
            writes=writes,
            memory=int(memory),
            cards=on_cards if accelerated else 0,
            needs=needs,
            missing=tuple(need for need in needs if not _here(need, recipe, present)),
        )

    return (
        stage(
            "quantize",
            2 * found.source,  # once for the digest, once to convert
            found.fp8,
            TORCH_BYTES + 2.5 * found.largest_weight + COPY_BYTES,
            needs=(*weights, "torch"),
        ),
        # Weights pass on as links, but are hashed once more before they do.
        stage("extend-context", found.fp8, 0, 0.1 * GB, needs=()),
        stage(
            "draft",
            found.fp8 + 2 * found.states,
            found.states + found.draft,
            TORCH_BYTES + (0 if accelerated else served) + training,
            found.fp8 + context_kv + training,
            (*engine, *gpus),
        ),
        stage(
            "validate",
            found.source + 4 * found.fp8,
            0,
            TORCH_BYTES + (0 if accelerated else max(found.source, served)),
            max(found.source, served),
            (*weights, *engine, *gpus, *_questions(recipe)),
        ),
        stage("bundle", bundle, 0, 0.1 * GB, needs=()),
        stage("publish", 3 * bundle, 2 * bundle, 0.3 * GB, needs=()),
    )


def _questions(recipe: Recipe) -> tuple[str, ...]:
    needs = []
    if not recipe.source.packaged:
        needs.append(_ITEMS)
        if recipe.gates.min_ratio_to_dense is not None:
            needs.append(_DENSE)
    return tuple(needs)


def _here(need: str, recipe: Recipe, present: bool) -> bool:
    spec = recipe.validate_
    if need == _WEIGHTS:
        return present
    if need in ("torch", "vLLM"):
        return find_spec(need.lower()) is not None
    if need == _ITEMS:
        return spec.items_file is not None and Path(spec.items_file).expanduser().is_file()
    if need == _DENSE:
        return spec.dense_baseline is not None and Path(spec.dense_baseline).expanduser().is_dir()
    return _gpu_here()


def _gpu_here() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def _undecided(
    recipe: Recipe,
    config: BailingConfig,
    present: bool,
    found: Sizes,
    cards: Hardware | None,
) -> tuple[str, ...]:
    """Every reason why a real run would stop or fail here, one sentence each."""
    missing: list[str] = []
    spec = recipe.source
    nano = spec.packaged
    if not present:
        missing.append(f"the weights: {found.source / GB:.0f} GB of {spec.repo or spec.path}")
    if spec.repo is not None and not (spec.revision and is_commit(spec.revision)):
        missing.append("source.revision: the commit to release is not pinned")
    if recipe.bundle.license is None:
        missing.append("bundle.license: not decided")
    if not nano and recipe.draft.prompts_file is None:
        missing.append("draft.prompts_file: prompts to train the draft on")
    if not nano and recipe.validate_.items_file is None:
        missing.append("validate.items_file: items to validate with")
    if not nano and recipe.gates.min_ratio_to_dense is not None and recipe.validate_.dense_baseline is None:
        missing.append("validate.dense_baseline: the gate min_ratio_to_dense has nothing to compare with")
    missing.extend(_licence_trouble(recipe))
    missing.extend(rubric_trouble(recipe))
    if recipe.context.length % config.max_position_embeddings:
        missing.append(
            f"context.length: {recipe.context.length} is not a multiple of the trained length "
            f"{config.max_position_embeddings}"
        )
    if cards is not None:
        missing.extend(_card_trouble(config, recipe, cards))
        if not _gpu_here():
            missing.append(f"GPUs: the recipe is for {recipe.hardware}, this machine has none")
    missing.extend(f"{name}: not installed" for name in ("torch", "vllm") if find_spec(name) is None)
    free = shutil.disk_usage(Path.cwd()).free
    needed = found.fp8 + found.states
    if free < needed:
        weights = recipe.quantize.weights
        missing.append(
            f"disk: {free / GB:.0f} GB free here, {weights} weights and states take {needed / GB:.0f}"
        )
    return tuple(missing)


def _licence_trouble(recipe: Recipe) -> list[str]:
    """What upstream says of its licence, where that is here and leaves something to decide."""
    source = at_hand(recipe.source)
    try:
        require_decided(recipe, licence_statements(source) if source else ())
    except BadInput as err:
        return [err.message]
    return []


def _card_trouble(config: BailingConfig, recipe: Recipe, cards: Hardware) -> list[str]:
    """What of the release, and of the BF16 model it is compared with, the recipe's cards cannot hold."""
    trouble = []
    precision = _PRECISIONS[recipe.quantize.scheme]
    released = model_bytes(config, precision, draft_vocab=recipe.draft.vocab_size)
    reference = model_bytes(config, "bf16")
    for what, model, context in (
        ("the release", released, recipe.context.length),
        (
            f"the BF16 reference that {recipe.quantize.weights} is compared with",
            reference,
            config.max_position_embeddings,
        ),
    ):
        problem = fit(model, cards, context).problem
        if problem is not None:
            enough = smallest(model, context, cards.key)
            advice = f"; {enough.hardware.label} would do" if enough else ""
            trouble.append(f"cards: {what} does not fit {cards.label}: {problem}{advice}")
    return trouble
