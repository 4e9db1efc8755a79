"""Tensor parallelism: which numbers of GPUs a checkpoint can be split over, and why not others.

The rules are those of vLLM 0.32: `bailing_moe.py`, `deepseek_v2.py`, `QKVParallelLinear`,
`validate_fp8_block_shape` and `validate_fp8_block_shape_moe`, `VocabParallelEmbedding`; SGLang's counterparts
follow them. Both repeat KV heads where there are fewer of them than GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from packager.layouts import Expected, Model, Role

SIZES = range(1, 9)
_FEED_FORWARDS = (Role.DENSE_MLP, Role.ROUTED_EXPERT, Role.FUSED_EXPERTS, Role.SHARED_EXPERT)
_VOCABULARY_PADDING = 64


@dataclass(frozen=True)
class Split:
    """One model on `size` GPUs; widths are those of one GPU, None where they do not divide."""

    size: int
    heads: int | None
    kv_heads: int | None
    """At least 1: heads are repeated where there are fewer than GPUs. None also with latent attention."""
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
    model: Model,
    layout: Sequence[Expected],
    block: tuple[int, int] | None,
    quantized: Set[Role],
    sizes: Iterable[int] = SIZES,
) -> list[Split]:
    """How a model divides over each number of GPUs.

    Args:
        model: its architecture and sizes.
        layout: its tensors, before quantization.
        block: rows and columns that share a scale, (1, columns) for groups within a row; None: no such
            constraint (BF16, or one scale a row).
        quantized: roles that are stored quantized in such blocks.
        sizes: numbers of GPUs.
    """
    widths: dict[Role, int] = {}
    for want in layout:
        if want.role in _FEED_FORWARDS:
            # Its first matrix is the one from the hidden size to the width; fused experts hold two of those.
            width = want.shape[1] // 2 if want.role is Role.FUSED_EXPERTS else want.shape[0]
            widths.setdefault(want.role, width)
    return [_split(model, widths, block, quantized, size) for size in sizes]


def _split(
    model: Model, widths: Mapping[Role, int], block: tuple[int, int] | None, quantized: Set[Role], size: int
) -> Split:
    reasons: list[str] = []
    heads = _share(model.value("num_attention_heads"), size, "heads", reasons)
    kv_heads = None if _latent(model) else _kv_heads(model.value("kv_heads"), size, reasons)
    if block is not None and heads is not None:
        _attention(model, heads, kv_heads, block, quantized, size, reasons)
    dense = _mlp(widths, Role.DENSE_MLP, size, "dense width", block, quantized, reasons)
    routed = Role.FUSED_EXPERTS if Role.FUSED_EXPERTS in widths else Role.ROUTED_EXPERT
    expert = _mlp(widths, routed, size, "expert width", block, quantized, reasons)
    if widths.get(Role.SHARED_EXPERT) != widths.get(routed):
        _mlp(widths, Role.SHARED_EXPERT, size, "shared expert width", block, quantized, reasons)
    padded = -(-model.value("vocab_size") // _VOCABULARY_PADDING) * _VOCABULARY_PADDING
    vocabulary = _share(padded, size, "rows of vocabulary, padded to 64,", reasons)
    return Split(size, heads, kv_heads, dense, expert, vocabulary, tuple(reasons))


def _latent(model: Model) -> bool:
    """Whether keys and values come from a latent vector, which every GPU holds whole."""
    return "kv_lora_rank" in model.fields


def _attention(
    model: Model,
    heads: int,
    kv_heads: int | None,
    block: tuple[int, int],
    quantized: Set[Role],
    size: int,
    reasons: list[str],
) -> None:
    """Whether the heads of one GPU come in whole blocks; of the output projection the columns are split."""
    width = heads * model.value("head_dim")
    out_width = heads * model.value("v_head_dim") if _latent(model) else width
    inner, outer = Role.QUERY_KEY_VALUE in quantized, Role.ATTENTION_OUTPUT in quantized
    if inner and block[0] > 1:
        _whole_blocks(width, block[0], "query width", reasons)
    if outer and size > 1 and not (inner and block[0] > 1 and out_width == width):
        _whole_blocks(out_width, block[1], "value width" if _latent(model) else "query width", reasons)
    if inner and kv_heads is not None:
        _whole_blocks(kv_heads * model.value("head_dim"), block[0], "KV width", reasons)
    elif inner and _latent(model):
        each = model.value("qk_nope_head_dim") + model.value("v_head_dim")
        _whole_blocks(heads * each, block[0], "width of keys and values", reasons)


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
    widths: Mapping[Role, int],
    role: Role,
    size: int,
    what: str,
    block: tuple[int, int] | None,
    quantized: Set[Role],
    reasons: list[str],
) -> int | None:
    width = widths.get(role)
    if width is None:
        return None
    if width % size:
        reasons.append(f"{what} {width} does not divide by {size}")
        return None
    share = width // size
    if block is not None and role in quantized and (block[0] > 1 or size > 1):
        # Gate and up are stacked: their rows come in whole blocks on one GPU too. Down's columns are split.
        _whole_blocks(share, max(block), what, reasons)
    return share


def _whole_blocks(width: int, block: int, what: str, reasons: list[str]) -> None:
    if width % block:
        reasons.append(f"{what} {width} a GPU is no multiple of {block}")
