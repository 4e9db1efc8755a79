"""BF16 to block FP8, one output shard at a time, in memory bounded by one slab of rows."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.artifact import ArtifactWriter, Manifest, sealed_for
from packager.checkpoint.header import TensorInfo, readable_bytes
from packager.checkpoint.source import CONFIG_NAME, Checkpoint, TensorReader
from packager.checkpoint.writer import ShardData, ShardPlan, TensorSpec, plan_shards, write_index
from packager.errors import BadInput
from packager.layouts import (
    Decisions,
    Do,
    Expected,
    Model,
    PredictionLayers,
    count_parameters,
    decide,
    recognise,
)
from packager.quantize import fidelity
from packager.quantize.dialects import (
    BLOCK,
    Quantization,
    quantization_config,
    refuse_quantized,
    scale_shape,
)
from packager.quantize.fidelity import TensorFidelity
from packager.recipe import QuantizeSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STAGE = "quantize"
_SLAB_ELEMENTS = 1 << 20
"""Elements quantized at once: FP32 temporaries of this size stay in a core's cache."""


@dataclass(frozen=True)
class _Job:
    """All that the conversion needs to know before it reads a byte of data."""

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    config: Model
    decisions: Decisions
    layout: dict[str, Expected]
    spec: QuantizeSpec
    shards: list[ShardPlan]
    dropped: list[Expected]
    """Prediction layers, unless the spec has them, and what its rules or the layout drop."""


def quantize(
    source: Path,
    out: Path,
    spec: QuantizeSpec,
    *,
    recipe_digest: str,
    progress: Callable[[str], None],
) -> Manifest:
    """Write `source` (BF16, safetensors) as 128x128 block FP8 into the sealed artifact `out`.

    Embeddings, output head, norms, router, `expert_bias` and biases keep their bytes. Killed at any moment
    and called again, it goes on with the first unfinished shard and ends in the same bytes and the same
    digest; called on a finished `out` of the same source and settings, it returns its manifest.

    Args:
        source: checkpoint directory.
        out: new, unfinished, or already finished artifact.
        spec: dialect, rounding of scales, shard size.
        recipe_digest: what the manifest records as the settings' digest.
        progress: called with one line a shard.

    Raises:
        BadInput: not a BailingMoeV2 checkpoint, tensors that do not fit the config, already quantized, NaN or
            infinity in a weight (named, with its position), no room, or a target that cannot be written.
        IntegrityFailure: `source` is a sealed artifact that was altered.
    """
    job = _plan(Path(source), spec)
    progress(f"reading {readable_bytes(job.checkpoint.nbytes)} of source for its digest")
    inputs = {"source": job.checkpoint.digest()}
    if found := sealed_for(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs):
        progress(f"{out} is finished already")
        return found
    if job.dropped:
        progress(f"leaving out {len(job.dropped)} tensors")
    if (prediction := PredictionLayers.of(job.config, job.decisions)).found:
        progress(str(prediction))
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs) as writer:
        ledger = _write_shards(job, writer, progress)
        for side in job.checkpoint.side_files():
            if writer.done(side.name) is None:
                writer.write_bytes(side.name, side.read_bytes())
        write_index(writer, job.shards)
        writer.write_json(CONFIG_NAME, _output_config(job))
        return writer.seal(_metrics(job, ledger), tools=_tools())


def _plan(source: Path, spec: QuantizeSpec) -> _Job:
    checkpoint = Checkpoint.open(source)
    raw = checkpoint.config()
    model = recognise(raw, str(checkpoint.path / CONFIG_NAME))
    refuse_quantized(raw, checkpoint.tensors.values(), str(source))
    decisions = decide(
        model.tensors_in(checkpoint.tensors),
        checkpoint.tensors,
        rules=spec.rules,
        mtp=spec.mtp,
        origin=str(source),
    )
    quantization = Quantization(spec.dialect, ())
    groups = [
        _output_group(info, decisions.do[name], quantization)
        for name, info in checkpoint.tensors.items()
        if decisions.do[name] is not Do.DROP
    ]
    return _Job(
        checkpoint=checkpoint,
        raw_config=raw,
        config=model,
        decisions=decisions,
        layout=decisions.layout,
        spec=spec,
        shards=plan_shards(groups, spec.shard_bytes),
        dropped=decisions.those(Do.DROP),
    )


def _output_group(info: TensorInfo, do: Do, quantization: Quantization) -> list[TensorSpec]:
    if do is Do.KEEP:
        return [TensorSpec(info.name, info.dtype, info.shape)]
    if info.count % 8:
        # Engines map the file into memory: after an odd number of FP8 bytes nothing else would be aligned.
        raise BadInput(f"{info.name} {list(info.shape)}: block FP8 needs a multiple of 8 elements")
    return [
        TensorSpec(info.name, "F8_E4M3", info.shape),
        TensorSpec(quantization.scale_of(info.name), "F32", scale_shape(info.shape)),
    ]


def _write_shards(job: _Job, writer: ArtifactWriter, progress: Callable[[str], None]) -> list[TensorFidelity]:
    ledger: list[TensorFidelity] = []
    pending: list[tuple[int, ShardPlan]] = []
    for number, plan in enumerate(job.shards, start=1):
        recorded = _recorded_fidelity(writer, plan)
        if recorded is None:
            pending.append((number, plan))
        else:
            ledger.extend(recorded)
            progress(f"shard {number}/{len(job.shards)} {plan.name}: kept from an earlier run")
    require_space(writer.path, sum(spec.nbytes for _, plan in pending for spec in plan.tensors))
    with job.checkpoint.reader() as reader:
        for number, plan in pending:
            entries: list[TensorFidelity] = []
            with writer.create(plan.name) as handle:
                data = ShardData(plan, handle)
                for spec in plan.tensors:
                    info = job.checkpoint.tensors.get(spec.name)
                    if info is None:
                        continue  # a scale: written right after its weight
                    if spec.dtype == "F8_E4M3":
                        entries.append(_quantize_tensor(job, reader, info, data))
                    else:
                        _copy_tensor(reader, info, data)
                data.finish()
                # Before the shard gets its name: a finished shard always has its ledger.
                (writer.scratch / f"{plan.name}.json").write_bytes(fidelity.dump(entries))
            ledger.extend(entries)
            progress(f"shard {number}/{len(job.shards)} {plan.name}: {readable_bytes(handle.size)}")
    return ledger


def _recorded_fidelity(writer: ArtifactWriter, plan: ShardPlan) -> list[TensorFidelity] | None:
    """Ledger of a shard that an earlier run finished; None: the shard is to be written."""
    if writer.done(plan.name) is None:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError):
        return fidelity.load((writer.scratch / f"{plan.name}.json").read_bytes())
    return None


def require_space(directory: Path, needed: int) -> None:
    """Raise BadInput before the work rather than after hours of it, if `needed` bytes will not fit."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise BadInput(
            f"{directory} has {readable_bytes(free)} free; {readable_bytes(needed)} are still to be written",
            "Free space or choose another directory; finished files are kept.",
        )


def _quantize_tensor(job: _Job, reader: TensorReader, info: TensorInfo, data: ShardData) -> TensorFidelity:
    import torch

    from packager.quantize.fp8_block import quantize_slab

    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[info.dtype]
    weight = torch.from_numpy(reader.bytes(info)).view(dtype).view(info.shape)
    step = max(_SLAB_ELEMENTS // info.shape[1] // BLOCK, 1) * BLOCK
    scales: list[torch.Tensor] = []
    signal = error = 0.0
    for first in range(0, info.shape[0], step):
        slab = quantize_slab(weight[first : first + step], job.spec.scale_rounding)
        if slab is None:
            _refuse_nonfinite(info, reader.bytes(info), 0)
            raise RuntimeError(f"{info.name}: overflow in float32")
        data.write(slab.codes.view(torch.uint8).numpy().data)
        scales.append(slab.scales)
        signal += slab.signal
        error += slab.error
    data.write(torch.cat(scales).numpy().data)
    return TensorFidelity(info.name, str(job.layout[info.name].role), signal, error)


def _copy_tensor(reader: TensorReader, info: TensorInfo, data: ShardData) -> None:
    begin = 0
    for chunk in reader.chunks(info):
        _refuse_nonfinite(info, chunk, begin)
        data.write(chunk.data)
        begin += chunk.nbytes


def _refuse_nonfinite(info: TensorInfo, chunk: NDArray[np.uint8], begin: int) -> None:
    """Raise BadInput at the first NaN or infinity in `chunk`, which starts at byte `begin` of the tensor."""
    import numpy as np

    # All exponent bits set: the test is on bits, so it costs one pass and no conversion.
    kind, exponent = {"BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00), "F32": ("<u4", 0x7F800000)}[info.dtype]
    bits = chunk.view(kind)
    bad = (bits & exponent) == exponent
    if not bad.any():
        return
    first = int(bad.argmax())
    position = np.unravel_index(begin // bits.itemsize + first, info.shape)
    what = "infinity" if int(bits[first]) & (exponent ^ (2 ** (8 * bits.itemsize - 1) - 1)) == 0 else "NaN"
    raise BadInput(
        f"{info.name}[{', '.join(str(int(axis)) for axis in position)}] is {what} (in {info.shard})",
        "The source checkpoint is damaged: download that shard again.",
    )


def _output_config(job: _Job) -> dict[str, Any]:
    # Code is never shipped, so nothing may point to it.
    config = {key: value for key, value in job.raw_config.items() if key != "auto_map"}
    prediction = PredictionLayers.of(job.config, job.decisions)
    if prediction.found or config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = prediction.written
    quantized = {want.name for want in job.decisions.those(Do.QUANTIZE)}
    config["quantization_config"] = quantization_config(job.spec.dialect, job.decisions.written, quantized)
    return config


def _metrics(job: _Job, ledger: list[TensorFidelity]) -> dict[str, Any]:
    written = [spec for plan in job.shards for spec in plan.tensors]
    parameters = count_parameters(job.config)
    return {
        "scheme": job.spec.scheme,
        "dialect": job.spec.dialect,
        "scale_rounding": job.spec.scale_rounding,
        "parameters": {
            "total": parameters.total,
            "float32": parameters.float32,
            "active": parameters.active,
            "left_out": sum(want.count for want in job.dropped),
        },
        "tensors": {
            "quantized": len(ledger),
            "kept": len(written) - 2 * len(ledger),
            "left_out": len(job.dropped),
        },
        "bytes": {"source": job.checkpoint.nbytes, "written": sum(spec.nbytes for spec in written)},
        "prediction_layers": PredictionLayers.of(job.config, job.decisions).document(),
        "fidelity": fidelity.by_role(ledger),
    }


def _tools() -> dict[str, str]:
    import torch

    return {"torch": str(torch.__version__)}
