"""llm-compressor's `oneshot` on our transformers model: which modifiers, which data, and its few quirks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal, get_args

from packager.bailing.config import BailingConfig

CalibratedScheme = Literal["gptq-w4a16", "awq-w4a16", "nvfp4", "mxfp4"]
CALIBRATED_SCHEMES: tuple[CalibratedScheme, ...] = get_args(CalibratedScheme)

PRESETS: dict[CalibratedScheme, str] = {
    "gptq-w4a16": "W4A16",
    "awq-w4a16": "W4A16",
    "nvfp4": "NVFP4",
    "mxfp4": "MXFP4",
}
"""The scheme's name in compressed-tensors."""

GROUP: dict[CalibratedScheme, int] = {"gptq-w4a16": 128, "awq-w4a16": 128, "nvfp4": 16, "mxfp4": 32}
"""Columns that share a scale."""

NEEDS_DATA: tuple[CalibratedScheme, ...] = ("gptq-w4a16", "awq-w4a16", "nvfp4")
"""MXFP4's weight scales come from the weights, its activation scales from each token as it is served."""


def smoothed_pairs(config: BailingConfig) -> list[tuple[str, list[str]]]:
    """For AWQ: each module whose output channels are scaled down, and those that take them scaled up.

    llm-compressor has no mappings for this architecture. The router reads what the experts read, so it is
    scaled along: its choices must stay. Values do not pass to `dense` one to one (several query heads share
    them), so that pair is left out, as llm-compressor does for other models with grouped queries.
    """
    pairs = []
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        pairs.append((f"{layer}.input_layernorm", [f"{layer}.attention.query_key_value"]))
        if index < config.first_k_dense_replace:
            networks, router = [f"{layer}.mlp"], []
        else:
            experts = [f"{layer}.mlp.experts.{expert}" for expert in range(config.num_experts)]
            networks, router = [f"{layer}.mlp.shared_experts", *experts], [f"{layer}.mlp.gate"]
        inward = [f"{network}.{name}" for network in networks for name in ("gate_proj", "up_proj")]
        pairs.append((f"{layer}.post_attention_layernorm", inward + router))
        pairs += [(f"{network}.up_proj", [f"{network}.down_proj"]) for network in networks]
    return pairs


def _modifiers(scheme: CalibratedScheme, config: BailingConfig, ignore: Sequence[str]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

    settings: dict[str, Any] = {"targets": ["Linear"], "scheme": PRESETS[scheme], "ignore": list(ignore)}
    if scheme == "gptq-w4a16":
        # Columns are visited by activation, yet stored in their own order: kernels need no permutation.
        return [GPTQModifier(**settings, actorder="static")]
    if scheme == "awq-w4a16":
        mappings = [AWQMapping(smooth, balanced) for smooth, balanced in smoothed_pairs(config)]
        return [AWQModifier(mappings=mappings), QuantizationModifier(**settings)]
    return [QuantizationModifier(**settings)]


def calibrate_model(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Sequence[int]],
    scheme: CalibratedScheme,
    config: BailingConfig,
    ignore: Sequence[str],
    seed: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Quantize a `BailingMoeV2ForCausalLM` in place, layer after layer, and compress it.

    Args:
        model: in memory, on the CPU; layers visit the accelerator one by one where there is one.
        tokenizer: of the checkpoint; `oneshot` asks for one.
        rows: token ids, one sequence each, not padded; none for a scheme that needs no data.
        scheme: what to do.
        config: of the checkpoint.
        ignore: linear modules, or patterns, that are left alone.
        seed: of all random numbers.
        progress: called with llm-compressor's warnings.

    Returns:
        The fields of `quantization_config` that describe the result, without `ignore`.
    """
    import torch
    from torch.utils.data import DataLoader

    from packager.bailing.hf_model import every_expert_sees_every_token

    torch.manual_seed(seed)
    # One sequence a batch: nothing is padded, so no statistics are taken of padding.
    batches = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        for ids in rows
    ]
    with _logging_to(progress), _without_pinning(), every_expert_sees_every_token(model):
        from llmcompressor import oneshot

        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=DataLoader(batches, batch_size=None) if batches else None,  # type: ignore[arg-type]
            num_calibration_samples=len(batches),
            recipe=_modifiers(scheme, config, ignore),
            sequential_targets=list(model._no_split_modules),
            # A checkpoint that ties its embeddings keeps them so.
            tie_word_embeddings=True,
        )
        return _compress(model)


def _compress(model: Any) -> dict[str, Any]:
    import json

    import compressed_tensors
    from compressed_tensors import ModelCompressor

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    fields: dict[str, Any] = json.loads(compressor.quantization_config.model_dump_json())
    return {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        **{key: fields[key] for key in ("format", "quantization_status", "config_groups", "kv_cache_scheme")},
    }


@contextmanager
def _logging_to(progress: Callable[[str], None]) -> Iterator[None]:
    """llm-compressor logs to stdout, where data goes; its warnings go to `progress` instead."""
    with redirect_stdout(sys.stderr):  # it logs while it is imported, to what stdout is then
        from llmcompressor import LoggerConfig, configure_logger
    from loguru import logger

    configure_logger(LoggerConfig(console_log_level=None))
    sink = logger.add(
        lambda message: progress(f"llm-compressor: {message.record['message']}"),
        level="WARNING",
        filter=lambda record: record["level"].name != "METRIC" and "No accelerator" not in record["message"],
    )
    try:
        yield
    finally:
        logger.remove(sink)


@contextmanager
def _without_pinning() -> Iterator[None]:
    """Without an accelerator memory cannot be pinned; llm-compressor 0.14 has AWQ try it all the same."""
    import torch
    from compressed_tensors.utils import patch_attr
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    with patch_attr(IntermediatesCache, "pin_memory", lambda *_args, **_kwargs: None):
        yield
