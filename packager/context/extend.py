"""The stage that extends a checkpoint's context: weights linked, two small files rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packager.artifact import ArtifactWriter, Manifest, sealed_for
from packager.bailing.config import BailingConfig
from packager.checkpoint.folder import Folder
from packager.checkpoint.source import CONFIG_NAME, INDEX_NAME, Checkpoint
from packager.checkpoint.writer import carry_over
from packager.context.yarn import yarn_frequencies, yarn_patch
from packager.recipe import ContextSpec

STAGE = "context"
TOKENIZER_CONFIG = "tokenizer_config.json"


def extend(source: str | Path | Folder, out: Path, spec: ContextSpec, *, recipe_digest: str) -> Manifest:
    """Write `source` with a YaRN configuration for `spec.length` tokens into the sealed artifact `out`.

    config.json gets the patch of `yarn_patch`, tokenizer_config.json the same `model_max_length` (which caps
    the length in engines); all other files are those of `source`, linked, or copied from the hub that it is
    on. The manifest's metrics hold the rotary frequencies that engines must arrive at.

    Raises:
        BadInput: not a BailingMoeV2 checkpoint, one that is extended already, or a length that does not fit.
        IntegrityFailure: `source` is a sealed artifact that was altered; a hub gave other bytes.
        RemoteFailure: the hub does not give the bytes.
    """
    checkpoint = Checkpoint.open(source)
    raw = checkpoint.config()
    config = BailingConfig.parse(raw, checkpoint.folder.where(CONFIG_NAME))
    patched = yarn_patch(raw, spec.length)
    inputs = {"source": checkpoint.digest()}
    if found := sealed_for(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs):
        return found
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs) as writer:
        side = [file.name for file in checkpoint.side_files() if file.name != TOKENIZER_CONFIG]
        files = checkpoint.folder.sizes()
        index = [INDEX_NAME] if INDEX_NAME in files else []
        carry_over(writer, checkpoint.folder, [*checkpoint.shards, *index, *side])
        if TOKENIZER_CONFIG in files:
            tokenizer = checkpoint.folder.json(TOKENIZER_CONFIG)
            writer.write_json(TOKENIZER_CONFIG, {**tokenizer, "model_max_length": spec.length})
        writer.write_json(CONFIG_NAME, patched)
        return writer.seal(_metrics(config, patched["rope_parameters"], spec.length))


def _metrics(config: BailingConfig, rope: dict[str, Any], length: int) -> dict[str, Any]:
    original, factor, theta = (
        rope["original_max_position_embeddings"],
        rope["factor"],
        float(rope["rope_theta"]),
    )
    found = yarn_frequencies(config.rotary_dim, theta, factor, original)
    return {
        "method": "yarn",
        "length": length,
        "original_length": original,
        "factor": factor,
        "rope_theta": theta,
        "rotary_dim": config.rotary_dim,
        "mscale": float(f"{found.mscale:.9g}"),
        "ramp": [found.low, found.high],
        # Nine digits identify a float32 and leave out what depends on the mathematics library.
        "inverse_frequencies": [float(f"{value:.9g}") for value in found.inverse],
    }
