"""Four-bit schemes that look at data: GPTQ, AWQ and NVFP4, and MXFP4 beside them, through llm-compressor.

Unlike `quantize` this holds the whole model in main memory, and a run that was interrupted begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from packager.artifact import (
    ArtifactWriter,
    Manifest,
    file_sha256,
    is_sealed,
    sealed_for,
)
from packager.bailing.config import BailingConfig
from packager.checkpoint.header import DTYPE_BYTES, readable_bytes
from packager.checkpoint.memory import available_memory
from packager.checkpoint.source import CONFIG_NAME, Checkpoint, locate
from packager.checkpoint.writer import (
    ShardData,
    ShardPlan,
    TensorSpec,
    plan_shards,
    require_space,
    write_index,
)
from packager.errors import BadInput, UsageProblem
from packager.layouts import Do
from packager.quantize.calibration_data import choose, read_lines, tokenize
from packager.quantize.calibration_run import GROUP, NEEDS_DATA, CalibratedScheme, calibrate_model
from packager.quantize.decided import DecidedCheckpoint
from packager.quantize.dialects import ignored_modules
from packager.recipe import Spec

STAGE = "calibrate"
_LIBRARIES = 1_500_000_000
"""Bytes of torch, transformers and llm-compressor, and of what stays beside tensors: a compiled oneDNN kernel
for each shape, of which sequences of many lengths make up to 1,024, and pages that the allocator keeps. On
the nano 0.6 GB (8 sequences) to 1.2 GB (512 sequences of 64 to 512 tokens)."""


class CalibrationSpec(Spec):
    """What is calibrated, on how much text."""

    scheme: CalibratedScheme
    samples: int = Field(default=512, gt=0)
    """Lines of the calibration file that are used."""
    sequence_length: int = Field(default=2048, gt=0)
    """Tokens of each that are used."""
    seed: int = 0
    shard_bytes: int = Field(default=5_000_000_000, gt=0)


@dataclass(frozen=True)
class MemoryNeeded:
    """Peak of main memory in bytes."""

    model: int
    statistics: int
    """What a scheme gathers about one layer before it quantizes it."""
    activations: int
    """Of all calibration tokens, between two layers."""

    @property
    def total(self) -> int:
        """All of it, libraries included."""
        return _LIBRARIES + self.model + self.statistics + self.activations

    def __str__(self) -> str:
        return (
            f"{readable_bytes(self.total)}: the model {readable_bytes(self.model)}, statistics of a layer "
            f"{readable_bytes(self.statistics)}, activations {readable_bytes(self.activations)}"
        )


@dataclass(frozen=True)
class _Job:
    source: DecidedCheckpoint
    config: BailingConfig

    @property
    def checkpoint(self) -> Checkpoint:
        """The source's files."""
        return self.source.checkpoint


def memory_needed(
    config: BailingConfig, model_bytes: int, scheme: CalibratedScheme, tokens: int
) -> MemoryNeeded:
    """Peak memory of a calibration on `tokens` tokens of a model whose tensors take `model_bytes`.

    GPTQ: an FP32 Hessian [K, K] for each weight [N, K] of a layer, every expert's included. AWQ: for every
    token the inputs of each weight's parent, what the widest parent gives with the weights as they were and
    as they are tried (fused attention gives more than a hidden state), and a copy of the layer. Resident size
    may show more: pages of the source's files stay mapped until the system wants them back.
    """
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    moe = config.moe_layers > 0
    experts, shared = (config.num_experts, config.shared_width) if moe else (0, config.intermediate_size)
    statistics = 0
    if scheme == "gptq-w4a16":
        heads = config.num_attention_heads * config.head_dim
        squares = hidden**2 + heads**2 + 2 * hidden**2 + shared**2 + experts * (2 * hidden**2 + inner**2)
        statistics = 4 * squares
    elif scheme == "awq-w4a16":
        layer = 3 * hidden * (experts * inner + shared)
        attention = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        inputs, outputs = 2 * hidden + shared + experts * inner, 2 * max(hidden, attention)
        statistics = 2 * (tokens * (inputs + outputs) + layer)
    # Before a layer and after it; each sequence carries its rotary tables along.
    activations = tokens * (2 * 2 * hidden + 2 * 4 * config.rotary_dim)
    return MemoryNeeded(model_bytes, statistics, 0 if scheme not in NEEDS_DATA else activations)


def calibrate(
    source: str | Path,
    out: Path,
    spec: CalibrationSpec,
    *,
    calibration: Path | None,
    recipe_digest: str,
    progress: Callable[[str], None],
) -> Manifest:
    """Write the BailingMoeV2 checkpoint `source` in a four-bit scheme into the sealed artifact `out`.

    Embeddings, output head, norms, router and `expert_bias` stay as they are (AWQ rescales norms and router
    against each other). Every expert is calibrated on every token. On a finished `out` of the same source,
    data and settings the manifest is returned.

    Args:
        source: checkpoint directory, BF16, FP16 or FP32.
        out: new, unfinished, or already finished artifact.
        spec: scheme, amount of data, seed.
        calibration: JSONL as `read_lines` takes it; None for MXFP4, which needs none.
        recipe_digest: what the manifest records as the settings' digest.
        progress: called with a line now and then.

    Raises:
        UsageProblem: data missing, or given to a scheme that has no use for it; a hub name.
        BadInput: another architecture, tensors that do not fit the config, quantized already, NaN or
            infinity, rows that a group does not divide; a line of data that is malformed, with its number;
            not enough memory or disk.
    """
    if (calibration is None) == (spec.scheme in NEEDS_DATA):
        raise UsageProblem(
            f"{spec.scheme} needs calibration data"
            if calibration is None
            else f"{spec.scheme} takes no calibration data: its scales come from the weights",
            "Give --calibration FILE.jsonl." if calibration is None else "Leave --calibration out.",
        )
    job = _plan(source, spec)
    tokenizer = _tokenizer(job.checkpoint.path)
    rows: list[list[int]] = []
    if calibration:
        lines = choose(read_lines(calibration), spec.samples, spec.seed)
        length = min(spec.sequence_length, job.config.max_position_embeddings)
        rows = tokenize(lines, tokenizer, length, str(calibration))
    if not is_sealed(out):  # before the source is hashed: that takes minutes where memory is short
        tokens = sum(map(len, rows))
        progress(f"{len(rows)} sequences, {tokens} tokens of calibration data")
        require_memory(memory_needed(job.config, job.checkpoint.nbytes, spec.scheme, tokens), progress)
    inputs = {"source": job.checkpoint.digest()}
    if calibration:
        inputs["calibration"] = f"sha256:{file_sha256(calibration)}"
    if found := sealed_for(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs):
        return found
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs) as writer:
        writer.discard()  # shards of two runs are never mixed
        require_space(writer.path, _estimated_bytes(job, spec.scheme))
        return _run(job, writer, spec, tokenizer, rows, progress)


def require_memory(needed: MemoryNeeded, progress: Callable[[str], None]) -> None:
    """Say what a run will take. Raises BadInput where that is more than there is."""
    available = available_memory()
    progress(f"peak memory about {needed}; {readable_bytes(available)} are available")
    if needed.total > available:
        raise BadInput(
            f"calibration needs about {needed}; {readable_bytes(available)} are available",
            "The whole model is held in main memory, nothing is offloaded to disk: take a machine with more, "
            "fewer --samples or a shorter --sequence-length, or `packager quantize`, which needs no data and "
            "little memory.",
        )


def _plan(source: str | Path, spec: CalibrationSpec) -> _Job:
    checkpoint = Checkpoint.open(locate(source))
    config = BailingConfig.parse(checkpoint.config(), checkpoint.folder.where(CONFIG_NAME))
    decided = DecidedCheckpoint.of(checkpoint)
    group = GROUP[spec.scheme]
    uneven = [want for want in decided.decisions.those(Do.QUANTIZE) if want.shape[1] % group]
    if uneven:
        raise BadInput(
            f"{spec.scheme} has a scale for {group} columns, which do not divide {len(uneven)} weights: "
            f"{uneven[0].name} {list(uneven[0].shape)}",
            "Choose a scheme with smaller groups: MXFP4 has 32 columns a scale, NVFP4 16.",
        )
    return _Job(decided, config)


def _estimated_bytes(job: _Job, scheme: CalibratedScheme) -> int:
    """Half a byte a weight, and at most two for each group's scale."""
    decisions = job.source.decisions
    quantized = sum(want.count for want in decisions.those(Do.QUANTIZE))
    kept = sum(job.checkpoint.tensors[want.name].nbytes for want in decisions.those(Do.KEEP))
    return kept + quantized // 2 + 2 * quantized // GROUP[scheme]


def _tokenizer(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        # By its class: what tokenizer_config.json may say about code of its own is not looked at.
        return PreTrainedTokenizerFast.from_pretrained(str(directory))
    except Exception as err:  # of many kinds, from two libraries
        raise BadInput(
            f"{directory} has no tokenizer that can be read: {err}",
            "Put tokenizer.json, tokenizer_config.json and the chat template beside the weights.",
        ) from None


def _run(
    job: _Job,
    writer: ArtifactWriter,
    spec: CalibrationSpec,
    tokenizer: Any,
    rows: list[list[int]],
    progress: Callable[[str], None],
) -> Manifest:
    written, quantized = job.source.decisions.written, job.source.quantized
    ignore = ignored_modules(written, quantized)
    model = _load(job)
    progress(f"calibrating {len(quantized)} weights, {spec.scheme}")
    stated = calibrate_model(model, tokenizer, rows, spec.scheme, job.config, ignore, spec.seed, progress)
    tensors = model.state_dict()
    _require_scales(tensors)
    plans = _shards(job, tensors, spec.shard_bytes)
    for plan in plans:
        with writer.create(plan.name) as handle:
            data = ShardData(plan, handle)
            for tensor in plan.tensors:
                data.write(_data(tensors[tensor.name]))
            data.finish()
        progress(f"{plan.name}: written")
    for side in job.checkpoint.side_files():
        writer.write_bytes(side.name, side.read_bytes())
    write_index(writer, plans)
    writer.write_json(CONFIG_NAME, job.source.output_config({**stated, "ignore": ignore}))
    metrics = {
        "scheme": spec.scheme,
        "calibration": {"sequences": len(rows), "tokens": sum(map(len, rows)), "seed": spec.seed},
        "tensors": {
            "quantized": len(quantized),
            "kept": len(written) - len(quantized),
            "left_out": len(job.source.decisions.those(Do.DROP)),
        },
        "bytes": {
            "source": job.checkpoint.nbytes,
            "written": sum(plan.nbytes for plan in plans),
        },
        "prediction_layers": job.source.prediction.document(),
    }
    return writer.seal(metrics, tools=_tools())


def _load(job: _Job) -> Any:
    from packager.bailing import hf_model

    hf_model.register()  # llm-compressor reads the config once more, by itself
    kinds = (hf_model.BailingMoeV2ForCausalLM, hf_model.BailingMoeForCausalLM)
    model_class = next(kind for kind in kinds if kind.config_class.model_type == job.config.model_type)
    # Prediction layers, which this model has no place for, were dropped by `decide`: not a surprise.
    model = model_class.from_pretrained(str(job.checkpoint.path), dtype="auto")
    expected = {want.name for want in job.source.decisions.written}
    if set(model.state_dict()) != expected:
        raise RuntimeError("the transformers model and the layout disagree about the tensors")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise BadInput(
                f"{name} holds NaN or infinity", "Repair the source; `packager quantize` names the position."
            )
    return model


def _require_scales(tensors: dict[str, Any]) -> None:
    """Raise BadInput where a scale is no positive number: nothing, or nothing finite, reached the module."""
    for name, tensor in tensors.items():
        if name.endswith("scale") and tensor.is_floating_point():
            values = tensor.float()
            if not values.isfinite().all() or (values < 0).any():
                raise BadInput(
                    f"calibration left {name} without a usable value",
                    "The activations that reach it are not finite: check the source model on this data.",
                )


def _shards(job: _Job, tensors: dict[str, Any], shard_bytes: int) -> list[ShardPlan]:
    """Tensors in the order of the source; within a shard wide types first, so that all are aligned."""
    parts: dict[str, list[TensorSpec]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(name.rpartition(".")[0], []).append(
            TensorSpec(name, _dtype_name(tensor.dtype), tuple(tensor.shape))
        )
    order = dict.fromkeys(name.rpartition(".")[0] for name in job.checkpoint.tensors)
    groups = [parts[module] for module in order if module in parts]
    return [
        ShardPlan(plan.name, tuple(sorted(plan.tensors, key=lambda spec: -DTYPE_BYTES[spec.dtype])))
        for plan in plan_shards(groups, shard_bytes)
    ]


def _dtype_name(dtype: Any) -> str:
    import torch

    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.uint8: "U8",
        torch.int32: "I32",
        torch.int64: "I64",
    }
    return names[dtype]


def _data(tensor: Any) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    data: memoryview = flat.numpy().data
    return data


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "llmcompressor", "compressed-tensors")}
