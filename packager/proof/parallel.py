"""Tensor parallelism: which numbers of GPUs a BailingMoeV2 checkpoint can be split over, and why not others.

The rules are those of vLLM 0.32: `bailing_moe.py`, `QKVParallelLinear`, `validate_fp8_block_shape` and
`validate_fp8_block_shape_moe`, `VocabParallelEmbedding`; SGLang's counterparts follow them. Both repeat KV
heads where there are fewer of them than GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from packager.bailing.config import BailingConfig
from packager.bailing.layout import Role

SIZES = range(1, 9)
_VOCABULARY_PADDING = 64


@dataclass(frozen=True)
class Split:
    """One model on `size` GPUs; widths are those of one GPU, None where they do not divide."""

    size: int
    heads: int | None
    kv_heads: int | None
    """At least 1: heads are repeated where there are fewer than GPUs."""
    dense_width: int | None
    """Of the feed-forward of dense layers; None also where there are no such layers."""
    expert_width: int | None
    vocabulary: int | None
    """Rows of the embedding after padding to a multiple of 64."""
    reasons: tuple[str, ...]
    """Why it cannot be; empty if it can."""

    @property
    def possible(self) -> bool:
        """Whether engines accept this size."""
        return not self.reasons


def splits(
    config: BailingConfig,
    block: tuple[int, int] | None,
    quantized: Set[Role],
    sizes: Iterable[int] = SIZES,
) -> list[Split]:
    """How a model divides over each number of GPUs.

    Args:
        config: its configuration.
        block: rows and columns that share a scale, (1, columns) for groups within a row; None: no such
            constraint (BF16, or one scale a row).
        quantized: roles that are stored quantized in such blocks.
        sizes: numbers of GPUs.
    """
    return [_split(config, block, quantized, size) for size in sizes]


def _split(config: BailingConfig, block: tuple[int, int] | None, quantized: Set[Role], size: int) -> Split:
    reasons: list[str] = []
    heads = _share(config.num_attention_heads, size, "heads", reasons)
    kv_heads = _kv_heads(config.num_key_value_heads, size, reasons)
    if block is not None and heads is not None and kv_heads is not None:
        projections = Role.QUERY_KEY_VALUE in quantized, Role.ATTENTION_OUTPUT in quantized
        width, kv_width = heads * config.head_dim, kv_heads * config.head_dim
        # The rows of the one are split, the columns of the other.
        if projections[0] and block[0] > 1:
            _whole_blocks(width, block[0], "query width", reasons)
        elif projections[1] and size > 1:
            _whole_blocks(width, block[1], "query width", reasons)
        if projections[0]:
            _whole_blocks(kv_width, block[0], "KV width", reasons)
    dense = expert = None
    if config.first_k_dense_replace:
        dense = _mlp(
            config.intermediate_size, size, "dense width", block, Role.DENSE_MLP in quantized, reasons
        )
    if config.moe_layers:
        routed = Role.ROUTED_EXPERT in quantized
        expert = _mlp(config.moe_intermediate_size, size, "expert width", block, routed, reasons)
        if config.num_shared_experts and config.shared_width != config.moe_intermediate_size:
            shared = Role.SHARED_EXPERT in quantized
            _mlp(config.shared_width, size, "shared expert width", block, shared, reasons)
    padded = -(-config.vocab_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    vocabulary = _share(padded, size, "rows of vocabulary, padded to 64,", reasons)
    return Split(size, heads, kv_heads, dense, expert, vocabulary, tuple(reasons))


def _share(total: int, size: int, what: str, reasons: list[str]) -> int | None:
    if total % size:
        reasons.append(f"{total} {what} do not divide by {size}")
        return None
    return total // size


def _kv_heads(total: int, size: int, reasons: list[str]) -> int | None:
    if total >= size:
        return _share(total, size, "KV heads", reasons)
    if size % total:
        reasons.append(f"{total} KV heads cannot be repeated evenly over {size}")
        return None
    return 1


def _mlp(
    width: int, size: int, what: str, block: tuple[int, int] | None, quantized: bool, reasons: list[str]
) -> int | None:
    if width % size:
        reasons.append(f"{what} {width} does not divide by {size}")
        return None
    share = width // size
    if block is not None and quantized and (block[0] > 1 or size > 1):
        # Gate and up are stacked: their rows come in whole blocks on one GPU too. Down's columns are split.
        _whole_blocks(share, max(block), what, reasons)
    return share


def _whole_blocks(width: int, block: int, what: str, reasons: list[str]) -> None:
    if width % block:
        reasons.append(f"{what} {width} a GPU is no multiple of {block}")
