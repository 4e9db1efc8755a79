"""A checkpoint of true shapes whose data are holes: headers say everything, the disk holds almost nothing."""

from __future__ import annotations

import json
from pathlib import Path

from packager.bailing.config import BailingConfig
from packager.bailing.layout import Role, expected_tensors
from packager.checkpoint.source import CONFIG_NAME, INDEX_NAME
from packager.checkpoint.writer import TensorSpec, plan_shards

LING_FLASH = Path(__file__).parents[1] / "recipes" / "ling-flash-2.0.json"


def write_sparse_checkpoint(path: Path, config: Path = LING_FLASH, shard_bytes: int = 5_000_000_000) -> Path:
    """Write every header, the index and the config of a BailingMoeV2 architecture; tensors read as zeros.

    Args:
        path: new folder.
        config: config.json of the architecture.
        shard_bytes: largest data section of a shard.
    """
    path.mkdir(parents=True)
    raw = json.loads(config.read_text(encoding="utf-8"))
    layout = expected_tensors(BailingConfig.parse(raw))
    groups = [
        [TensorSpec(want.name, "F32" if want.role is Role.EXPERT_BIAS else "BF16", want.shape)]
        for want in layout
    ]
    weight_map: dict[str, str] = {}
    total = 0
    for plan in plan_shards(groups, shard_bytes):
        header = plan.header
        size = plan.nbytes
        with (path / plan.name).open("wb") as handle:
            handle.write(header)
            handle.truncate(len(header) + size)
        weight_map.update({spec.name: plan.name for spec in plan.tensors})
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX_NAME).write_text(json.dumps(index))
    (path / CONFIG_NAME).write_text(json.dumps(raw))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return path
