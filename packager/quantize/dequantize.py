"""Quantized weights back to BF16: for machines without a kernel, and to quantize them otherwise."""

from __future__ import annotations

from pathlib import Path

from packager.artifact import ArtifactWriter, Manifest, sealed_for
from packager.checkpoint.folder import Folder
from packager.checkpoint.source import CONFIG_NAME, INDEX_NAME, TensorReader
from packager.checkpoint.writer import (
    ShardData,
    ShardPlan,
    TensorSpec,
    carry_over,
    require_space,
    write_index,
)
from packager.quantize.quantized import WeightCheckpoint
from packager.recipe import Spec

STAGE = "dequantize"


class DequantizeSpec(Spec):
    """Settings of the way back."""

    dtype: str = "BF16"


def dequantize(source: str | Path | Folder, out: Path) -> Manifest:
    """Write the quantized checkpoint `source` with BF16 weights and no `quantization_config`.

    `source` is a folder or on a hub: block FP8 in both dialects, FP8 with a scale a row, or INT4 or INT8 of
    compressed-tensors. Shards keep their names and the order of their weights. The BF16 values are code x
    scale, rounded once; with power-of-two scales they are exact. What was not quantized keeps its bytes.
    Memory: some rows of one weight, and its scales.

    Raises:
        BadInput: `source` is not such a checkpoint of a known architecture, no room, or a target that cannot
            be written.
        IntegrityFailure: `source` is a sealed artifact that was altered; a hub gave other bytes.
        RemoteFailure: the hub does not give the bytes.
    """
    opened, quantization = WeightCheckpoint.open_quantized(source)
    checkpoint = opened.checkpoint
    recipe_digest = DequantizeSpec().digest
    inputs = {"source": checkpoint.digest()}
    if found := sealed_for(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs):
        return found
    plans = _plans(opened)
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs) as writer:
        pending = [plan for plan in plans if writer.done(plan.name) is None]
        require_space(writer.path, sum(plan.nbytes for plan in pending))
        with checkpoint.reader() as reader:
            for plan in pending:
                with writer.create(plan.name) as handle:
                    data = ShardData(plan, handle)
                    for spec in plan.tensors:
                        _write_tensor(opened, reader, spec.name, data)
                    checkpoint.folder.settle(plan.name)
                    data.finish()
        carry_over(writer, checkpoint.folder, [file.name for file in checkpoint.side_files()])
        if INDEX_NAME in checkpoint.folder.sizes():
            write_index(writer, plans)
        stated = ("quantization_config", "compression_config")
        config = {key: value for key, value in opened.raw_config.items() if key not in stated}
        writer.write_json(CONFIG_NAME, config)
        tensors = {
            "dequantized": len(opened.quantized),
            "kept": len(opened.layout) - len(opened.quantized),
        }
        written = sum(plan.nbytes for plan in plans)
        return writer.seal(
            {
                "scheme": "bf16",
                "source_scheme": quantization.scheme,
                "tensors": tensors,
                "bytes": {"source": checkpoint.nbytes, "written": written},
            }
        )


def _plans(opened: WeightCheckpoint) -> list[ShardPlan]:
    weights = {opened.stored(want.name).name: want for want in opened.layout}
    plans: list[ShardPlan] = []
    for shard, header in opened.checkpoint.shards.items():
        specs = []
        for info in header.tensors.values():
            if (want := weights.get(info.name)) is not None:
                dtype = "BF16" if opened.is_quantized(want.name) else info.dtype
                specs.append(TensorSpec(want.name, dtype, want.shape))
        plans.append(ShardPlan(shard, tuple(specs)))
    return plans


def _write_tensor(opened: WeightCheckpoint, reader: TensorReader, name: str, data: ShardData) -> None:
    import ml_dtypes
    import numpy as np

    if opened.is_quantized(name):
        for slab in opened.slabs(reader, name):
            data.write(slab.astype(ml_dtypes.bfloat16).view(np.uint8).data)
        return
    for chunk in reader.chunks(opened.checkpoint.tensors[name]):
        data.write(chunk.data)
