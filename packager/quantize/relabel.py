"""The same FP8 bytes under the other dialect: new headers and a new config, data copied as it is."""

from __future__ import annotations

import hashlib
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
from packager.errors import BadInput, UsageProblem
from packager.quantize.dialects import SCALE_SUFFIX, Quantization, quantization_config
from packager.quantize.quantized import WeightCheckpoint
from packager.recipe import Dialect, Spec

STAGE = "relabel"


class RelabelSpec(Spec):
    """Settings of a relabelling."""

    dialect: Dialect


def relabel(source: str | Path | Folder, out: Path, dialect: Dialect) -> Manifest:
    """Write the block-FP8 checkpoint `source` (a folder, or on a hub) under `dialect`.

    The manifest's metrics hold the SHA-256 of each shard's data section, which is that of the source's.

    Raises:
        UsageProblem: `source` has that dialect already.
        BadInput: `source` is not a block-FP8 checkpoint of a known architecture, no room, or a target that
            cannot be written.
        IntegrityFailure: `source` is a sealed artifact that was altered; a hub gave other bytes.
        RemoteFailure: the hub does not give the bytes.
    """
    opened, quantization = WeightCheckpoint.open_quantized(source)
    if quantization.scheme != "fp8-block":
        raise BadInput(f"{opened.checkpoint.name} is {quantization.scheme}; only block FP8 has two dialects")
    if quantization.dialect == dialect:
        raise UsageProblem(f"{opened.checkpoint.name} is in the {dialect} dialect already")
    checkpoint = opened.checkpoint
    recipe_digest = RelabelSpec(dialect=dialect).digest
    inputs = {"source": checkpoint.digest()}
    if found := sealed_for(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs):
        return found
    old, new = SCALE_SUFFIX[quantization.dialect], SCALE_SUFFIX[dialect]
    scales = opened.scale_names()
    renamed = {name: name.removesuffix(old) + new if name in scales else name for name in checkpoint.tensors}
    plans = [
        ShardPlan(
            shard,
            tuple(TensorSpec(renamed[i.name], i.dtype, i.shape) for i in header.tensors.values()),
        )
        for shard, header in checkpoint.shards.items()
    ]
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs) as writer:
        pending = [plan for plan in plans if writer.done(plan.name) is None]
        require_space(writer.path, sum(plan.nbytes for plan in pending))
        digests: dict[str, str] = {}
        with checkpoint.reader() as reader:
            for plan in plans:
                ledger = writer.scratch / f"{plan.name}.sha256"
                if writer.done(plan.name) is None or not ledger.is_file():
                    with writer.create(plan.name) as handle:
                        data = ShardData(plan, handle)
                        ledger.write_text(_copy_data(opened, reader, plan.name, data))
                        checkpoint.folder.settle(plan.name)
                        data.finish()
                digests[plan.name] = ledger.read_text()
        carry_over(writer, checkpoint.folder, [file.name for file in checkpoint.side_files()])
        if INDEX_NAME in checkpoint.folder.sizes():
            write_index(writer, plans)
        config = dict(opened.raw_config)
        config["quantization_config"] = quantization_config(
            Quantization(dialect, ()), opened.layout, opened.quantized
        )
        writer.write_json(CONFIG_NAME, config)
        return writer.seal({"dialect": dialect, "data_sha256": digests})


def _copy_data(opened: WeightCheckpoint, reader: TensorReader, shard: str, data: ShardData) -> str:
    """Copy a shard's data section; its SHA-256."""
    sha = hashlib.sha256()
    for info in opened.checkpoint.shards[shard].tensors.values():
        for chunk in reader.chunks(info):
            data.write(chunk.data)
            sha.update(chunk.data)
    return sha.hexdigest()
