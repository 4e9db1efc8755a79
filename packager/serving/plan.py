"""Will it fit, and how fast could it be at best: bytes from config.json or shard headers, a roofline bound.

No torch, no weights, no network. The bound is what memory bandwidth and arithmetic allow, never a forecast:
real engines reach a part of it. Method: each decode step reads every weight it needs once, and the whole KV
cache of every sequence; of E experts a step of T tokens touches D(T) = E (1 - (1 - k/E)^T) on average, if
routing is uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Literal

from packager.bailing.config import BailingConfig
from packager.bailing.layout import QUANTIZABLE, Role, count_parameters, model_of
from packager.checkpoint.folder import Folder, LocalFolder
from packager.checkpoint.source import read_json_object
from packager.errors import BadInput, UsageProblem
from packager.serving.hardware import GB, Hardware, hardware_file

Precision = Literal["fp8", "fp8-channel", "int4", "int8", "bf16"]
"""Of quantized weights and their products. fp8: a scale for each 128x128 weights; fp8-channel and int8: one a
row; int4: one for each 128 columns of a row, multiplied in BF16."""
BLOCK = 128
COUNTS = (1, 2, 4, 8)
"""Numbers of cards that are tried, as machines have them."""
SHORT_CONTEXT = 2048
"""Tokens of context at which a bound for short conversations is given."""


@dataclass(frozen=True)
class ModelBytes:
    """What a model weighs, in bytes of the precision it is served in."""

    config: BailingConfig
    precision: Precision
    weights: int
    """All weights, scales included."""
    weights_source: Literal["shard headers", "computed from config.json"]
    embedding: int
    """Of these, the input embedding: a step reads one row a token."""
    expert: float
    """One routed expert, scales included."""
    draft: int
    """The EAGLE3 head; 0: none."""
    draft_source: str
    parameters: int
    active_parameters: int

    @property
    def kv_layer(self) -> int:
        """KV cache of one token in one layer, BF16."""
        return 2 * self.config.num_key_value_heads * self.config.head_dim * 2

    @property
    def kv_target(self) -> int:
        """KV cache of one token in all layers of the target."""
        return self.config.num_hidden_layers * self.kv_layer

    @property
    def kv_per_token(self) -> int:
        """KV cache of one token, the draft's single layer included."""
        return self.kv_target + (self.kv_layer if self.draft else 0)

    @property
    def fixed(self) -> float:
        """Weights that every step reads whatever the routing."""
        experts = self.config.moe_layers * self.config.num_experts * self.expert
        return self.weights - self.embedding - experts

    def touched_experts(self, tokens: int) -> float:
        """Distinct experts of one layer that a step of `tokens` tokens reads on average, D(T)."""
        total, chosen = self.config.num_experts, self.config.num_experts_per_tok
        return total * (1 - (1 - chosen / total) ** tokens)

    def step_bytes(self, sequences: int, context: int, tokens_each: int = 1) -> float:
        """Bytes that one target step reads: `sequences` of `context` tokens, `tokens_each` new ones each."""
        experts = self.config.moe_layers * self.touched_experts(sequences * tokens_each) * self.expert
        return self.fixed + experts + sequences * context * self.kv_target


def model_bytes(
    config: BailingConfig,
    precision: Precision,
    *,
    directory: Path | Folder | None = None,
    draft: Path | Folder | None = None,
    draft_vocab: int | None = None,
) -> ModelBytes:
    """Bytes of a model: from its shard headers where `directory` holds it in that precision, else computed.

    `draft` is an exported head; with `draft_vocab` instead, one of the usual shape is computed (a Llama layer
    as wide as the target's, an output head of that many tokens, embeddings shared). Neither: no draft.
    """
    sizes = {"all": 0, "embedding": 0, "experts": 0}
    for tensor, times in model_of(config).kinds():
        each = tensor.count * (4 if tensor.role is Role.EXPERT_BIAS else 2)
        if tensor.role in QUANTIZABLE:
            each = _matrix_bytes(tensor.shape, precision)
        size = times * each
        sizes["all"] += size
        if tensor.role is Role.EMBEDDING:
            sizes["embedding"] += size
        elif tensor.role is Role.ROUTED_EXPERT:
            sizes["experts"] += size
    held = held_precision(config) == precision
    measured = _weight_bytes(directory) if directory is not None and held else None
    head, head_source = 0, "none"
    if draft is not None:
        head, head_source = _weight_bytes(draft) or 0, "shard headers"
    elif draft_vocab is not None:
        head, head_source = _draft_bytes(config, draft_vocab), f"computed, {draft_vocab} draft tokens"
    parameters = count_parameters(config)
    return ModelBytes(
        config=config,
        precision=precision,
        weights=measured or sizes["all"],
        weights_source="shard headers" if measured else "computed from config.json",
        embedding=sizes["embedding"],
        expert=sizes["experts"] / max(1, config.moe_layers * config.num_experts),
        draft=head,
        draft_source=head_source,
        parameters=parameters.total,
        active_parameters=parameters.active,
    )


def _matrix_bytes(shape: tuple[int, ...], precision: Precision) -> int:
    """A matrix [N, K] with its scales."""
    rows, columns = shape
    if precision == "bf16":
        return 2 * rows * columns
    if precision == "int4":
        return rows * columns // 2 + 2 * rows * ceil(columns / BLOCK) + 16
    scales = ceil(rows / BLOCK) * ceil(columns / BLOCK) if precision == "fp8" else rows
    return rows * columns + 4 * scales


def held_precision(config: BailingConfig) -> Precision:
    """What a checkpoint with this config holds; of a quantization that is not known here, `fp8`."""
    stated = config.quantization_config
    if not stated:
        return "bf16"
    groups = stated.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = group.get("weights") if isinstance(group, dict) else None
    kind = weights if isinstance(weights, dict) else {}
    if kind.get("type") == "int":
        return "int4" if kind.get("num_bits") == 4 else "int8"
    return "fp8-channel" if kind.get("strategy") == "channel" else "fp8"


def _weight_bytes(where: Path | Folder) -> int | None:
    """Data bytes of all shards in a folder; None if it has none."""
    folder = LocalFolder(where) if isinstance(where, Path) else where
    total = 0
    for header in folder.headers(name for name in folder.sizes() if name.endswith(".safetensors")).values():
        if isinstance(header, BadInput):
            raise header
        total += header.size - header.data_start
    return total or None


def _draft_bytes(config: BailingConfig, vocab: int) -> int:
    """An EAGLE3 head over three auxiliary states (`LlamaForCausalLMEagle3`): BF16, int64 vocabulary map."""
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    weights = (
        3 * hidden * hidden
        + 2 * hidden * (queries + 2 * keys)
        + queries * hidden
        + 3 * hidden * config.intermediate_size
        + vocab * hidden
        + 4 * hidden
    )
    return 2 * weights + 8 * vocab + config.vocab_size


def split_problem(config: BailingConfig, ways: int, precision: Precision) -> str | None:
    """Why the model cannot be split `ways` ways by tensor parallelism in vLLM; None: it can."""
    if config.num_attention_heads % ways:
        return f"{config.num_attention_heads} attention heads do not divide by {ways}"
    keys = config.num_key_value_heads
    if keys % ways and ways % keys:
        return f"{keys} KV heads do not divide by {ways}"
    for what, width in (
        ("expert width", config.moe_intermediate_size),
        ("shared-expert width", config.shared_width),
        ("dense width", config.intermediate_size),
    ):
        unit = BLOCK if precision in ("fp8", "int4") else 1
        if width % (ways * unit):
            kind = "groups" if precision == "int4" else "blocks"
            blocks = f" into {kind} of {BLOCK}" if unit > 1 else ""
            return f"{what} {width} does not divide by {ways}{blocks}"
    return None


@dataclass(frozen=True)
class Bound:
    """The fastest decoding that the hardware allows at one concurrency and context."""

    concurrency: int
    context: int
    tokens_per_s: float
    """Output tokens/s of all sequences together."""
    limited_by: Literal["memory bandwidth", "arithmetic"]

    @property
    def each(self) -> float:
        """Output tokens/s of one sequence."""
        return self.tokens_per_s / self.concurrency


def decode_bound(
    model: ModelBytes,
    hardware: Hardware,
    concurrency: int,
    context: int,
    *,
    acceptance_length: float | None = None,
    draft_tokens: int = 3,
) -> Bound:
    """Roofline of decoding.

    With `acceptance_length` (tokens a target step yields, an assumption here) the target verifies
    `draft_tokens` + 1 tokens a sequence and the draft runs `draft_tokens` times; without, one token a step.
    """
    tokens = 1 if acceptance_length is None else draft_tokens + 1
    gain = 1.0 if acceptance_length is None else acceptance_length
    moved = model.step_bytes(concurrency, context, tokens)
    work = 2.0 * (model.active_parameters - model.config.vocab_size * model.config.hidden_size)
    work *= concurrency * tokens
    if acceptance_length is not None:
        moved += draft_tokens * (model.draft + concurrency * context * model.kv_layer)
        work += draft_tokens * concurrency * model.draft  # 2 operations a parameter of 2 bytes
    card = hardware.card
    tflops = {"bf16": card.bf16_tflops, "int4": card.bf16_tflops, "int8": card.int8_tflops}
    flops = tflops.get(model.precision, card.fp8_tflops) * 1e12
    reading = moved / (hardware.count * card.bandwidth_tb_s * 1e12)
    computing = work / (hardware.count * flops)
    return Bound(
        concurrency=concurrency,
        context=context,
        tokens_per_s=concurrency * gain / max(reading, computing),
        limited_by="memory bandwidth" if reading >= computing else "arithmetic",
    )


@dataclass(frozen=True)
class Fit:
    """How a model lies on some hardware."""

    hardware: Hardware
    weights_per_card: float
    """Bytes, the draft included (each card holds its part of the target, and the whole draft's share)."""
    kv_tokens: int
    """Tokens that the KV cache holds beside the weights; 0: not even the weights fit."""
    problem: str | None
    """Why it cannot be served so; None: it can."""

    def sequences(self, context: int) -> int:
        """Requests of `context` tokens that are in the cache at once."""
        return self.kv_tokens // context


def fit(model: ModelBytes, hardware: Hardware, context: int) -> Fit:
    """Lay a model on hardware. It fits if one request of `context` tokens does."""
    ways = hardware.count
    per_card = (model.weights + model.draft) / ways
    # A KV head is not split: with more cards than KV heads each card still holds one.
    heads = max(1, model.config.num_key_value_heads // ways)
    kv_per_card = model.kv_per_token * heads / model.config.num_key_value_heads
    room = hardware.usable_per_card - per_card
    tokens = max(0, int(room / kv_per_card))
    problem = split_problem(model.config, ways, model.precision)
    if problem is None and room <= 0:
        problem = (
            f"the weights take {per_card / GB:.0f} GB of each card, "
            f"{hardware.usable_per_card / GB:.0f} GB are usable"
        )
    elif problem is None and tokens < context:
        problem = f"beside the weights the KV cache holds {tokens} tokens, one request needs {context}"
    return Fit(hardware, per_card, tokens, problem)


def smallest(model: ModelBytes, context: int, key: str | None = None) -> Fit | None:
    """The least total memory (then the fewest cards) that the model fits, of one kind of card or of all."""
    cards = hardware_file().cards
    keys = [key] if key is not None else list(cards)
    choices = [Hardware(name, count, cards[name]) for name in keys for count in COUNTS]
    for choice in sorted(choices, key=lambda hardware: (hardware.memory, hardware.count)):
        found = fit(model, choice, context)
        if found.problem is None:
            return found
    return None


@dataclass(frozen=True)
class Plan:
    """The answer of `packager plan`."""

    model: ModelBytes
    fit: Fit
    context: int
    concurrency: int
    bounds: tuple[Bound, ...]
    draft_bounds: tuple[Bound, ...]
    """The same with a draft at the assumed acceptance length; empty: none assumed."""
    alternative: Fit | None
    """The smallest hardware that fits, if this does not."""
    same_card: Fit | None
    """The same with the cards asked for."""

    @property
    def fits(self) -> bool:
        """Whether one request of the whole context can be served."""
        return self.fit.problem is None

    @property
    def context_at_concurrency(self) -> int:
        """Tokens each of `concurrency` requests can have at once."""
        return min(self.context, self.fit.kv_tokens // self.concurrency)


def make_plan(
    model: ModelBytes,
    hardware: Hardware | None,
    *,
    context: int,
    concurrency: int,
    acceptance_length: float | None = None,
    draft_tokens: int = 3,
) -> Plan:
    """Plan serving; `hardware` None: the smallest that fits.

    Raises:
        UsageProblem: no hardware given, and none of those known is large enough.
    """
    if hardware is None:
        found = smallest(model, context)
        if found is None:
            raise UsageProblem("no hardware that the plan knows is large enough", "Give --hardware.")
    else:
        found = fit(model, hardware, context)
    bounds: tuple[Bound, ...] = ()
    drafted: tuple[Bound, ...] = ()
    if found.problem is None:
        short = min(SHORT_CONTEXT, context)
        together = min(context, max(1, found.kv_tokens // concurrency))
        points = dict.fromkeys(
            [(1, short), (1, context), (concurrency, min(short, together)), (concurrency, together)]
        )
        bounds = tuple(decode_bound(model, found.hardware, n, length) for n, length in points)
        if acceptance_length is not None and model.draft:
            drafted = tuple(
                decode_bound(
                    model,
                    found.hardware,
                    n,
                    length,
                    acceptance_length=acceptance_length,
                    draft_tokens=draft_tokens,
                )
                for n, length in points
            )
    failed = found.problem is not None
    return Plan(
        model=model,
        fit=found,
        context=context,
        concurrency=concurrency,
        bounds=bounds,
        draft_bounds=drafted,
        alternative=smallest(model, context) if failed else None,
        same_card=smallest(model, context, found.hardware.key) if failed else None,
    )


def shape_config(name: str) -> BailingConfig:
    """A published architecture by name. Raises UsageProblem: unknown (the known ones are listed)."""
    folder = resources.files("recipes")
    names = [entry.name for entry in folder.iterdir()]
    known = sorted(entry.removesuffix(".json") for entry in names if entry.endswith(".json"))
    if name not in known:
        raise UsageProblem(f"no shape named {name!r}", f"Known: {', '.join(known) or 'none'}.")
    with resources.as_file(folder.joinpath(f"{name}.json")) as path:
        return BailingConfig.parse(read_json_object(path), name)
