"""Will it fit, and how fast could it be at best: bytes from config.json or shard headers, a roofline bound.

No torch, no weights, no network. The bound (`validation.roofline`) is what memory, arithmetic and links
allow, never a forecast: real engines reach a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from math import ceil
from pathlib import Path
from typing import Any, Literal

from packager.bailing.config import BailingConfig
from packager.bailing.layout import model_of
from packager.checkpoint.folder import Folder, LocalFolder
from packager.checkpoint.source import read_json_object
from packager.errors import BadInput, UsageProblem
from packager.layouts import QUANTIZABLE, Described, Model, Role, count_parameters
from validation.hardware import GB, Hardware, hardware_file
from validation.models import ModelShape, Precision
from validation.roofline import Draft, Rate, Setting, Step, decode_rate, prefill_step

Config = BailingConfig | Described
BLOCK = 128
COUNTS = (1, 2, 4, 8)
"""Numbers of cards that are tried, as machines have them."""
SHORT_CONTEXT = 2048
"""Tokens of context at which a bound for short conversations is given."""


@dataclass(frozen=True)
class ModelBytes:
    """What a model weighs, in bytes of the precision it is served in."""

    layout: Model
    shape: ModelShape
    precision: Precision
    weights: int
    """All weights, scales included."""
    weights_source: Literal["shard headers", "computed from config.json"]
    draft: int
    """The EAGLE3 head; 0: none."""
    draft_source: str
    parameters: int
    active_parameters: int

    @property
    def kv_layer(self) -> int:
        """KV cache of one token in one layer, BF16."""
        return 2 * self.shape.kv_values

    @property
    def kv_per_token(self) -> int:
        """KV cache of one token, the draft's single layer included."""
        return (self.shape.layers + bool(self.draft)) * self.kv_layer

    def tokens_in(self, space: float) -> int:
        """Tokens whose KV cache takes `space` bytes in all. Engines round down to whole blocks of tokens."""
        return max(0, int(space / self.kv_per_token))


def layout_of(config: Config) -> Model:
    """The declared architecture of a config, with its sizes."""
    return config.model if isinstance(config, Described) else model_of(config)


def shape_of(layout: Model, name: str = "model") -> ModelShape:
    """The counts that a bound on speed is computed from, by role over all layers."""
    counts: dict[Role, int] = {}
    moe_layers = set()
    for want, times in layout.kinds():
        if want.optional:
            continue
        counts[want.role] = counts.get(want.role, 0) + times * want.count
        if want.role is Role.ROUTED_EXPERT:
            moe_layers.add(want.name.split(".experts.")[0])
    routed = counts.pop(Role.ROUTED_EXPERT, 0)
    embedding, head = counts.pop(Role.EMBEDDING), counts.pop(Role.LM_HEAD, 0)
    matrices = sum(count for role, count in counts.items() if role in QUANTIZABLE)
    heads, known = int(layout.value("num_attention_heads")), layout.fields
    if "kv_lora_rank" in known:  # MLA: the latent and the shared rotary key; scores and sums differ in width
        kv_values = int(layout.value("kv_lora_rank + qk_rope_head_dim"))
        attention = heads * int(layout.value("head_dim + v_head_dim")) // 2
    else:
        kv_values = 2 * int(layout.value("kv_heads * head_dim"))
        attention = heads * int(layout.value("head_dim"))
    return ModelShape(
        name=name,
        layers=layout.layers,
        attention_width=attention,
        kv_values=kv_values,
        hidden=int(layout.value("hidden_size")),
        embedding=embedding if head else 0,
        head=head or embedding,
        matrices=matrices,
        other=sum(counts.values()) - matrices,
        moe_layers=len(moe_layers),
        experts=layout.experts if moe_layers else 0,
        experts_per_token=layout.shape["experts_per_token"] if moe_layers else 0,
        expert=routed // (len(moe_layers) * layout.experts) if moe_layers else 0,
    )


def model_bytes(
    config: Config,
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
    layout, size = layout_of(config), 0
    for tensor, times in layout.kinds():
        if tensor.optional:
            continue
        each = tensor.count * (4 if tensor.role is Role.EXPERT_BIAS else 2)
        if tensor.role in QUANTIZABLE:
            each = _matrix_bytes(tensor.shape, precision)
        size += times * each
    held = held_precision(config) == precision
    measured = _weight_bytes(directory) if directory is not None and held else None
    head, head_source = 0, "none"
    if draft is not None:
        head, head_source = _weight_bytes(draft) or 0, "shard headers"
    elif draft_vocab is not None:
        head, head_source = _draft_bytes(layout, draft_vocab), f"computed, {draft_vocab} draft tokens"
    parameters = count_parameters(layout)
    return ModelBytes(
        layout=layout,
        shape=shape_of(layout),
        precision=precision,
        weights=measured or size,
        weights_source="shard headers" if measured else "computed from config.json",
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


def held_precision(config: Config) -> Precision:
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


def _draft_bytes(layout: Model, vocab: int) -> int:
    """An EAGLE3 head over three auxiliary states (`LlamaForCausalLMEagle3`): BF16, int64 vocabulary map."""
    hidden, queries, keys, width, tokens = (
        int(layout.value(text))
        for text in (
            "hidden_size",
            "num_attention_heads * head_dim",
            "kv_heads * head_dim",
            "intermediate_size",
            "vocab_size",
        )
    )
    weights = (
        3 * hidden * hidden
        + 2 * hidden * (queries + 2 * keys)
        + queries * hidden
        + 3 * hidden * width
        + vocab * hidden
        + 4 * hidden
    )
    return 2 * weights + 8 * vocab + tokens


def split_problem(config: Config | Model, ways: int, precision: Precision) -> str | None:
    """Why the model cannot be split `ways` ways by tensor parallelism in vLLM; None: it can."""
    layout = config if isinstance(config, Model) else layout_of(config)
    heads, keys = layout.shape["heads"], layout.shape["kv_heads"]
    if heads % ways:
        return f"{heads} attention heads do not divide by {ways}"
    if keys % ways and ways % keys:
        return f"{keys} KV heads do not divide by {ways}"
    widths: dict[str, int] = {}
    for want, _ in layout.kinds():
        what = _SPLIT.get(want.role)
        # Up and gate are split by their rows, down by its columns: the width is the side that is not hidden.
        if what and want.name.endswith(("up_proj.weight", "w3.weight")):
            widths[what] = want.shape[0]
    unit = BLOCK if precision in ("fp8", "int4") else 1
    for what in _SPLIT.values():
        width = widths.get(what, 0)
        if width % (ways * unit):
            kind = "groups" if precision == "int4" else "blocks"
            blocks = f" into {kind} of {BLOCK}" if unit > 1 else ""
            return f"{what} {width} does not divide by {ways}{blocks}"
    return None


_SPLIT = {
    Role.ROUTED_EXPERT: "expert width",
    Role.SHARED_EXPERT: "shared-expert width",
    Role.DENSE_MLP: "dense width",
}


def decode_bound(
    model: ModelBytes,
    hardware: Hardware,
    concurrency: int,
    context: int,
    *,
    acceptance_length: float | None = None,
    draft_tokens: int = 3,
) -> Rate:
    """Roofline of decoding, the model split over all cards.

    With `acceptance_length` (tokens a target step yields, an assumption here) the target verifies
    `draft_tokens` + 1 tokens a sequence and the draft runs `draft_tokens` times; without, one token a step.
    """
    draft = None
    if acceptance_length is not None:
        draft = Draft(
            weight_bytes=model.draft,
            kv_bytes=model.kv_layer,
            tokens=draft_tokens,
            acceptance_length=acceptance_length,
        )
    setting = Setting(precision=model.precision, tensor=hardware.count, draft=draft)
    return decode_rate(model.shape, hardware, setting, concurrency=concurrency, context=context)


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
    keys = model.layout.shape["kv_heads"]
    heads = max(1, keys // ways)
    room = hardware.usable_per_card - per_card
    tokens = model.tokens_in(room * keys / heads)
    problem = split_problem(model.layout, ways, model.precision)
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
    choices = [Hardware(key=name, count=count, card=cards[name]) for name in keys for count in COUNTS]
    for choice in sorted(choices, key=lambda hardware: (hardware.memory, hardware.count)):
        found = fit(model, choice, context)
        if found.problem is None:
            return found
    return None


@dataclass(frozen=True)
class Split:
    """A number of cards, and how the model lies on them."""

    fit: Fit
    expert_parallel: bool
    """Whether its experts can be spread whole over the cards instead of each being split."""


def splits(model: ModelBytes, hardware: Hardware, context: int) -> tuple[Split, ...]:
    """One card to eight of a kind: what fits, and whether experts can be kept whole."""
    experts = model.layout.experts
    return tuple(
        Split(
            fit(model, hardware.with_count(count), context),
            bool(experts) and experts % count == 0 < count - 1,
        )
        for count in COUNTS
    )


@dataclass(frozen=True)
class Plan:
    """The answer of `packager plan`."""

    model: ModelBytes
    fit: Fit
    context: int
    concurrency: int
    bounds: tuple[Rate, ...]
    draft_bounds: tuple[Rate, ...]
    """The same with a draft at the assumed acceptance length; empty: none assumed."""
    splits: tuple[Split, ...]
    """Ways to use one card to eight of the kind."""
    prefill: Step | None
    """Reading one prompt that fills the context; None: it does not fit."""
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


def over_concurrency(plan: Plan, most: int = 512) -> tuple[Rate, ...]:
    """The bound at 1, 2, 4, ... requests of the short context, as far as their cache fits."""
    context = min(SHORT_CONTEXT, plan.context)
    room = plan.fit.kv_tokens // max(1, context)
    counts = [1 << power for power in range(most.bit_length()) if 1 << power <= min(most, room)]
    return tuple(decode_bound(plan.model, plan.fit.hardware, count, context) for count in counts)


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
    bounds: tuple[Rate, ...] = ()
    drafted: tuple[Rate, ...] = ()
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
    setting = Setting(precision=model.precision, tensor=found.hardware.count)
    return Plan(
        model=model,
        fit=found,
        context=context,
        concurrency=concurrency,
        bounds=bounds,
        draft_bounds=drafted,
        splits=splits(model, found.hardware, context),
        prefill=None
        if failed
        else prefill_step(model.shape, found.hardware.card, setting, prompts=1, length=context),
        alternative=smallest(model, context) if failed else None,
        same_card=smallest(model, context, found.hardware.key) if failed else None,
    )


def shape_file(name: str) -> dict[str, Any]:
    """config.json of a published architecture. Raises UsageProblem: unknown (the known ones are listed)."""
    folder = resources.files("recipes")
    names = [entry.name for entry in folder.iterdir()]
    known = sorted(entry.removesuffix(".json") for entry in names if entry.endswith(".json"))
    if name not in known:
        raise UsageProblem(f"no shape named {name!r}", f"Known: {', '.join(known) or 'none'}.")
    with resources.as_file(folder.joinpath(f"{name}.json")) as path:
        return read_json_object(path)


def shape_config(name: str) -> Described:
    """A published architecture by name. Raises UsageProblem: unknown (the known ones are listed)."""
    return Described.parse(shape_file(name), name)
