"""How fast a model can be at best on given hardware: bytes to move, operations to do, values to send.

A step takes at least as long as the longest of: reading what it reads from memory, computing what it
computes, sending what it sends between cards; all three may overlap. No engine reaches the bound. Method: of
E experts with k chosen a token, a step of T tokens reads D(T) = E (1 - (1 - k/E)^T) distinct ones on average
where routing is uniform; the cache of every sequence is read once; products are two operations a weight, and
attention four a cached position and head dimension.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from validation.document import Document
from validation.hardware import Card, Hardware
from validation.models import ModelShape, Precision

Limit = Literal["memory bandwidth", "arithmetic", "links between cards"]


class Draft(Document):
    """Speculative decoding as a bound sees it."""

    weight_bytes: float
    """All that a draft step reads."""
    kv_bytes: float
    """Its cache of one token."""
    tokens: int = Field(gt=0)
    """Draft tokens a step, K; the target verifies K + 1."""
    acceptance_length: float = Field(ge=1)
    """Tokens that a step of the target yields, measured or assumed."""


class Setting(Document):
    """How a model is served."""

    precision: Precision = "bf16"
    kv_value_bytes: float = Field(default=2.0, gt=0)
    """BF16 2, FP8 1."""
    tensor: int = Field(default=1, gt=0)
    """Cards over which every matrix is split."""
    pipeline: int = Field(default=1, gt=0)
    """Stages of layers, one after another on `tensor` cards each."""
    expert_parallel: bool = False
    """Experts are spread whole over the `tensor` cards instead of each being split, as vLLM's
    `--enable-expert-parallel` does; the messages are the same, the fullest card sets the pace."""
    routing_skew: float = Field(default=0.0, ge=0)
    """0: every expert is as likely. s: the r-th likeliest in proportion to r**-s (Zipf)."""
    launch_us: float = Field(default=0.0, ge=0)
    """Time of a step that neither memory, arithmetic nor links explain, microseconds a layer: kernel launches
    even as a CUDA graph, synchronization. 0: the pure bound."""
    draft: Draft | None = None

    @property
    def cards(self) -> int:
        """Cards in all."""
        return self.tensor * self.pipeline


class Step(Document):
    """One step of a model on some hardware."""

    seconds: float
    memory_s: float
    compute_s: float
    link_s: float
    launch_s: float
    weight_bytes: float
    """Read from the memory of all cards together."""
    kv_bytes: float
    operations: float
    limited_by: Limit


class Rate(Document):
    """The fastest decoding that the hardware allows at one concurrency and context."""

    concurrency: int
    context: int
    tokens_per_s: float
    """Output tokens/s of all sequences together."""
    limited_by: Limit
    step: Step

    @property
    def each(self) -> float:
        """Output tokens/s of one sequence."""
        return self.tokens_per_s / self.concurrency


def distinct_experts(experts: int, chosen: int, tokens: float, skew: float = 0.0) -> float:
    """Distinct experts of one layer that `tokens` tokens choose on average, each `chosen` of `experts`.

    With `skew`, expert r is chosen by a token with a probability in proportion to r**-skew, at most 1, the
    probabilities summing to `chosen`.
    """
    if skew == 0.0:
        return float(experts * (1 - (1 - chosen / experts) ** tokens))
    return math.fsum(1 - (1 - p) ** tokens for p in _popularity(experts, chosen, skew))


def _popularity(experts: int, chosen: int, skew: float) -> list[float]:
    weights = [rank**-skew for rank in range(1, experts + 1)]
    certain = 0
    # The likeliest would pass 1: they are certain, and the rest shares what is left.
    while certain < chosen:
        scale = (chosen - certain) / sum(weights[certain:])
        if weights[certain] * scale <= 1:
            return [1.0] * certain + [scale * w for w in weights[certain:]]
        certain += 1
    return [1.0] * certain + [0.0] * (experts - certain)


def fullest_share(experts: int, chosen: int, tokens: float, cards: int) -> float:
    """Load of the fullest card over the mean, experts spread whole over `cards` and chosen at random.

    Of m = tokens x chosen choices over c cards the largest share is about m/c + sqrt(2 m ln(c) / c) (balls
    into bins, Raab and Steger 1998, for m well above c ln c); never more than all of them on one card.
    """
    if cards == 1 or experts == 0:
        return 1.0
    choices = tokens * chosen
    return min(float(cards), 1 + math.sqrt(2 * cards * math.log(cards) / choices))


def decode_step(model: ModelShape, card: Card, setting: Setting, *, sequences: float, context: float) -> Step:
    """One step in which each of `sequences` with `context` cached tokens gets its next token or tokens.

    With a draft the step holds K draft steps and one verification of K + 1 tokens.
    """
    draft = setting.draft
    tokens = sequences * ((draft.tokens + 1) if draft else 1)
    step = _forward(model, card, setting, tokens=tokens, cached=sequences * context, pairs=tokens * context)
    if draft is None:
        return step
    moved = draft.tokens * (draft.weight_bytes + sequences * context * draft.kv_bytes)
    drafting = moved / (setting.tensor * card.bandwidth_tb_s * 1e12)
    work = draft.tokens * sequences * draft.weight_bytes  # two operations a weight of two bytes
    computing = work / (setting.tensor * card.bf16_tflops * 1e12)
    launch = draft.tokens * setting.launch_us * 1e-6
    memory, compute = step.memory_s + drafting, step.compute_s + computing
    seconds = max(memory, compute, step.link_s) + step.launch_s + launch
    return step.model_copy(
        update={
            "seconds": seconds,
            "memory_s": memory,
            "compute_s": compute,
            "launch_s": step.launch_s + launch,
            "weight_bytes": step.weight_bytes + draft.tokens * draft.weight_bytes,
            "kv_bytes": step.kv_bytes + draft.tokens * sequences * context * draft.kv_bytes,
            "operations": step.operations + work,
            "limited_by": _limit(memory, compute, step.link_s),
        }
    )


def prefill_step(model: ModelShape, card: Card, setting: Setting, *, prompts: int, length: int) -> Step:
    """Reading `prompts` prompts of `length` tokens each, nothing cached before; causal attention."""
    tokens = prompts * length
    return _forward(model, card, setting, tokens=tokens, cached=tokens, pairs=tokens * (length + 1) / 2)


def decode_rate(
    model: ModelShape, hardware: Hardware, setting: Setting, *, concurrency: int, context: int
) -> Rate:
    """The bound on decoding. With pipeline stages, `concurrency` is shared out into as many groups.

    Each group is on one stage at a time; a single sequence keeps one stage busy and passes through all.
    """
    stages = setting.pipeline
    group = max(1.0, concurrency / stages)
    step = decode_step(model, hardware.card, setting, sequences=group, context=context)
    # `step` counts all layers on the cards of one stage: the stages together take that long for one group,
    # and `stages` groups are under way at once, as far as there are so many sequences.
    gain = setting.draft.acceptance_length if setting.draft else 1.0
    under_way = min(stages, concurrency)
    rate = gain * group * under_way / step.seconds
    return Rate(
        concurrency=concurrency, context=context, tokens_per_s=rate, limited_by=step.limited_by, step=step
    )


def _forward(
    model: ModelShape, card: Card, setting: Setting, *, tokens: float, cached: float, pairs: float
) -> Step:
    """All layers for `tokens` new tokens on the `tensor` cards of a stage, `cached` of them read.

    Args:
        cached: cached tokens read, over all sequences.
        pairs: (new token, position it attends to) pairs.
    """
    precision, ways = setting.precision, setting.tensor
    weights, full = model.fixed_bytes(precision), 1.0
    if model.moe_layers:
        touched = distinct_experts(model.experts, model.experts_per_token, tokens, setting.routing_skew)
        weights += model.moe_layers * touched * model.expert_bytes(precision)
        if setting.expert_parallel:
            full = fullest_share(model.experts, model.experts_per_token, tokens, ways)
    cache = cached * model.kv_bytes(setting.kv_value_bytes)
    chosen = model.moe_layers * model.experts_per_token * model.expert
    linear = model.matrices + full * chosen
    attention = 4.0 * pairs * model.attention_width * model.layers
    rest = 2.0 * tokens * (model.head + model.other)  # in BF16 whatever the precision of the others
    rate = {
        "bf16": card.bf16_tflops,
        "int4": card.bf16_tflops,  # dequantized to BF16 for the product
        "int8": card.int8_tflops,
    }.get(precision, card.fp8_tflops)
    compute = (2.0 * tokens * linear / rate + (attention + rest) / card.bf16_tflops) / (ways * 1e12)
    memory = (weights + cache) / (ways * card.bandwidth_tb_s * 1e12)
    link = 0.0
    if ways > 1 and card.link_gb_s:
        # Two all-reduces of a BF16 hidden state a layer, each 2 (w - 1) / w of it over a card's link.
        link = 2 * model.layers * 2 * (ways - 1) / ways * tokens * model.hidden * 2 / (card.link_gb_s * 1e9)
    launch = model.layers * setting.launch_us * 1e-6
    return Step(
        seconds=max(memory, compute, link) + launch,
        memory_s=memory,
        compute_s=compute,
        link_s=link,
        launch_s=launch,
        weight_bytes=weights,
        kv_bytes=cache,
        operations=2.0 * tokens * linear + attention + rest,
        limited_by=_limit(memory, compute, link),
    )


def _limit(memory: float, compute: float, link: float) -> Limit:
    longest = max(memory, compute, link)
    if longest == memory:
        return "memory bandwidth"
    return "arithmetic" if longest == compute else "links between cards"
