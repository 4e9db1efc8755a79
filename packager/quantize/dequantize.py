"""Block FP8 back to BF16, for engines and machines without an FP8 kernel."""

from __future__ import annotations

from pathlib import Path

from packager.artifact import ArtifactWriter, Manifest, sealed_for
from packager.checkpoint.source import CONFIG_NAME, INDEX_NAME, TensorReader
from packager.checkpoint.writer import ShardData, ShardPlan, TensorSpec, carry_over, write_index
from packager.quantize.convert import require_space
from packager.quantize.quantized import WeightCheckpoint
from packager.recipe import Spec

STAGE = "dequantize"


class DequantizeSpec(Spec):
    """Settings of the way back."""

    dtype: str = "BF16"


def dequantize(source: Path, out: Path) -> Manifest:
    """Write the block-FP8 checkpoint `source` with BF16 weights and no `quantization_config`.

    Shards keep their names and the order of their weights. With power-of-two scales the BF16 values are
    exactly code x scale; with float32 scales they are rounded to BF16 once.

    Raises:
        BadInput: `source` is not a block-FP8 BailingMoeV2 checkpoint, no room, or a target that cannot be
            written.
        IntegrityFailure: `source` is a sealed artifact that was altered.
    """
    opened, _ = WeightCheckpoint.open_quantized(Path(source))
    checkpoint = opened.checkpoint
    recipe_digest = DequantizeSpec().digest
    inputs = {"source": checkpoint.digest()}
    if found := sealed_for(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs):
        return found
    plans = _plans(opened)
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs) as writer:
        pending = [plan for plan in plans if writer.done(plan.name) is None]
        require_space(writer.path, sum(spec.nbytes for plan in pending for spec in plan.tensors))
        with checkpoint.reader() as reader:
            for plan in pending:
                with writer.create(plan.name) as handle:
                    data = ShardData(plan, handle)
                    for spec in plan.tensors:
                        _write_tensor(opened, reader, spec.name, data)
                    data.finish()
        carry_over(writer, checkpoint.path, [file.name for file in checkpoint.side_files()])
        if (checkpoint.path / INDEX_NAME).is_file():
            write_index(writer, plans)
        config = {key: value for key, value in opened.raw_config.items() if key != "quantization_config"}
        writer.write_json(CONFIG_NAME, config)
        quantized = sum(opened.is_quantized(want.name) for want in opened.layout)
        written = sum(spec.nbytes for plan in plans for spec in plan.tensors)
        return writer.seal({"tensors": {"dequantized": quantized}, "bytes": {"written": written}})


def _plans(opened: WeightCheckpoint) -> list[ShardPlan]:
    scales = opened.scale_names()
    plans: list[ShardPlan] = []
    for shard, header in opened.checkpoint.shards.items():
        specs = tuple(
            TensorSpec(info.name, "BF16" if info.dtype == "F8_E4M3" else info.dtype, info.shape)
            for info in header.tensors.values()
            if info.name not in scales
        )
        plans.append(ShardPlan(shard, specs))
    return plans


def _write_tensor(opened: WeightCheckpoint, reader: TensorReader, name: str, data: ShardData) -> None:
    import ml_dtypes
    import numpy as np

    if opened.is_quantized(name):
        data.write(opened.values(reader, name).astype(ml_dtypes.bfloat16).view(np.uint8).data)
        return
    for chunk in reader.chunks(opened.checkpoint.tensors[name]):
        data.write(chunk.data)
