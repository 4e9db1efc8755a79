"""The stage that extends a checkpoint's context, and back: weights linked, two small files rewritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packager.artifact import ArtifactWriter, Manifest, sealed_for
from packager.bailing.config import BailingConfig
from packager.checkpoint.folder import Folder
from packager.checkpoint.source import CONFIG_NAME, INDEX_NAME, Checkpoint
from packager.checkpoint.writer import carry_over
from packager.context.yarn import RECORD, undo_patch, yarn_frequencies, yarn_patch
from packager.recipe import ContextSpec

STAGE = "context"
TOKENIZER_CONFIG = "tokenizer_config.json"
_LENGTH = "model_max_length"
"""Key of tokenizer_config.json that caps the length in engines."""
_DRAFTS = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")


def extend(source: str | Path | Folder, out: Path, spec: ContextSpec, *, recipe_digest: str) -> Manifest:
    """Write `source` with a YaRN configuration for `spec.length` tokens into the sealed artifact `out`.

    config.json gets the patch of `yarn_patch`, tokenizer_config.json the same `model_max_length` (which caps
    the length in engines); all other files are those of `source`, linked, or copied from the hub that it is
    on. The manifest's metrics hold the rotary frequencies that engines must arrive at. A target's EAGLE3
    draft is extended in the same way; it has no tokenizer.

    Raises:
        BadInput: neither a BailingMoeV2 checkpoint nor an EAGLE3 draft, one that is extended already, or a
            length that does not fit.
        IntegrityFailure: `source` is a sealed artifact that was altered; a hub gave other bytes.
        RemoteFailure: the hub does not give the bytes.
    """
    checkpoint = Checkpoint.open(source)
    raw = checkpoint.config()
    _require_known(raw, checkpoint.folder.where(CONFIG_NAME))
    patched = yarn_patch(raw, spec.length)
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is not None:
        patched[RECORD]["tokenizer_config"] = {
            name: tokenizer[name] for name in (_LENGTH,) if name in tokenizer
        }
        tokenizer = {**tokenizer, _LENGTH: spec.length}
    return _rewritten(checkpoint, out, patched, tokenizer, _metrics(patched), recipe_digest)


def undo(source: str | Path | Folder, out: Path, *, recipe_digest: str) -> Manifest:
    """Write the extended model or draft `source` as it was at its trained length into the artifact `out`.

    Raises:
        BadInput: `source` is not extended through YaRN, see `undo_patch`.
        IntegrityFailure, RemoteFailure: as `extend`.
    """
    checkpoint = Checkpoint.open(source)
    raw = checkpoint.config()
    config, tokenizer = trained_files(raw, _tokenizer(checkpoint))
    metrics = {
        "method": "none",
        "length": config["max_position_embeddings"],
        "extended_length": raw["max_position_embeddings"],
    }
    return _rewritten(checkpoint, out, config, tokenizer, metrics, recipe_digest)


def trained_files(
    config: dict[str, Any], tokenizer: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json and tokenizer_config.json (if there is one) of an extended checkpoint before that.

    Raises:
        BadInput: see `undo_patch`.
    """
    trained = undo_patch(config)
    if tokenizer is None or _LENGTH not in tokenizer:
        return trained, tokenizer
    before = (config.get(RECORD) or {}).get("tokenizer_config")
    if before is None:
        return trained, {**tokenizer, _LENGTH: trained["max_position_embeddings"]}
    kept = {name: before.get(name, value) for name, value in tokenizer.items() if name != _LENGTH or before}
    return trained, kept


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    present = TOKENIZER_CONFIG in checkpoint.folder.sizes()
    return checkpoint.folder.json(TOKENIZER_CONFIG) if present else None


def _require_known(raw: dict[str, Any], where: str) -> None:
    """Raise BadInput unless the config is one whose rotary embedding the patch has been proved on."""
    if not set(raw.get("architectures") or ()) & set(_DRAFTS):
        BailingConfig.parse(raw, where)


def _rewritten(
    checkpoint: Checkpoint,
    out: Path,
    config: dict[str, Any],
    tokenizer: dict[str, Any] | None,
    metrics: dict[str, Any],
    recipe_digest: str,
) -> Manifest:
    inputs = {"source": checkpoint.digest()}
    if found := sealed_for(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs):
        return found
    with ArtifactWriter(out, stage=STAGE, recipe_digest=recipe_digest, inputs=inputs) as writer:
        side = [file.name for file in checkpoint.side_files() if file.name != TOKENIZER_CONFIG]
        index = [INDEX_NAME] if INDEX_NAME in checkpoint.folder.sizes() else []
        carry_over(writer, checkpoint.folder, [*checkpoint.shards, *index, *side])
        if tokenizer is not None:
            writer.write_json(TOKENIZER_CONFIG, tokenizer)
        writer.write_json(CONFIG_NAME, config)
        return writer.seal(metrics)


def _metrics(patched: dict[str, Any]) -> dict[str, Any]:
    rope = patched["rope_parameters"]
    original, factor, theta = (
        rope["original_max_position_embeddings"],
        rope["factor"],
        float(rope["rope_theta"]),
    )
    head = patched.get("head_dim") or patched["hidden_size"] // patched["num_attention_heads"]
    rotary = int(head * rope.get("partial_rotary_factor", 1.0))
    found = yarn_frequencies(rotary, theta, factor, original)
    return {
        "method": "yarn",
        "length": patched["max_position_embeddings"],
        "original_length": original,
        "factor": factor,
        "rope_theta": theta,
        "rotary_dim": rotary,
        "mscale": float(f"{found.mscale:.9g}"),
        "ramp": [found.low, found.high],
        # Nine digits identify a float32 and leave out what depends on the mathematics library.
        "inverse_frequencies": [float(f"{value:.9g}") for value in found.inverse],
    }
