"""Claims about speed held to account: verified, merely consistent, unfalsifiable, or impossible.

A claim is a number and the conditions under which it is said to hold. Where a condition that decides the
number is missing, nothing can contradict it: it is unfalsifiable, and the range is given that the bound spans
over what is left open. Where even the most favourable completion cannot reach it, it is impossible all the
same. A ratio of two bounds is no bound on a ratio: beyond it a claim is unexplained, true only if the
baseline was served further below its own bound than the candidate. So it is with the gain of a draft, which
only its acceptance length bounds: measured gains beyond the ratio of bounds are on record (published.yaml),
because neighbouring tokens share experts and plain decoding stays further below its bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from validation.document import Document
from validation.errors import MeasurementError
from validation.hardware import GB, Card, Hardware, hardware_file
from validation.models import ModelShape, Precision, model_named
from validation.roofline import Draft, Rate, Setting, decode_rate

Quantity = Literal["output tokens/s", "ratio of output tokens/s", "gain of a draft", "context in tokens"]
Verdict = Literal[
    "verified", "refuted", "inconclusive", "consistent", "unfalsifiable", "unexplained", "impossible"
]
HERE = "here"
"""As `card`: the machine that a sweep was measured on, by its measured rates."""
CONTEXT_TOLERANCE, CONTEXT_TOKENS = 0.10, 16
"""A cell's mean context is never a round number: it counts as the stated one within 10 % or 16 tokens."""
ACCEPTANCE_TOLERANCE = 0.05

OPEN: dict[str, tuple[Any, ...]] = {
    "card": ("h20", "h20-141"),
    "count": (1, 2, 4, 8),
    "concurrency": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "precision": ("bf16", "fp8", "int4"),
    "baseline_precision": ("bf16", "fp8"),
    "context": (128, 1024, 2048, 8192, 32768, 131072),
}
"""What an unstated condition is tried as, to see what range of figures it leaves open."""
_NEEDS: dict[Quantity, tuple[str, ...]] = {
    "output tokens/s": ("card", "count", "concurrency", "precision", "context"),
    "ratio of output tokens/s": (
        "card",
        "count",
        "concurrency",
        "precision",
        "baseline_precision",
        "context",
    ),
    "gain of a draft": ("card", "count", "concurrency", "precision", "context"),
    "context in tokens": ("card", "count", "precision"),
}
_DRAFT_NEEDS = ("draft_tokens", "acceptance_length")


class Conditions(Document):
    """Under what a figure is said to hold; None: not stated."""

    card: str | None = None
    """Of cards.yaml."""
    count: int | None = Field(default=None, gt=0)
    """Cards, the model split over all of them."""
    concurrency: int | None = Field(default=None, gt=0)
    precision: Precision | None = None
    baseline_precision: Precision | None = None
    context: int | None = Field(default=None, ge=0)
    """Cached tokens of a request."""
    draft_tokens: int | None = Field(default=None, gt=0)
    acceptance_length: float | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _known_card(self) -> Conditions:
        if self.card not in (None, HERE) and self.card not in hardware_file().cards:
            raise ValueError(f"card {self.card!r} is none of {', '.join(hardware_file().cards)}")
        return self

    @property
    def stated(self) -> dict[str, Any]:
        """What is stated."""
        return self.model_dump(exclude_none=True)


class Claim(Document):
    """A published figure."""

    id: str
    says: str
    source: str
    quantity: Quantity
    value: float = Field(gt=0)
    """At least this much; a gain of +45 % is 1.45."""
    model: str
    baseline: str | None = None
    """Of a ratio."""
    conditions: Conditions = Conditions()

    @model_validator(mode="after")
    def _complete(self) -> Claim:
        if (self.quantity == "ratio of output tokens/s") != (self.baseline is not None):
            raise ValueError("a ratio, and only a ratio, has a baseline")
        return self


class Measured(Document):
    """A figure that was measured, to hold claims against."""

    quantity: Quantity
    value: float
    low: float | None = None
    high: float | None = None
    """95 % interval over the repeats; None: not known, or one repeat."""
    repeats: int | None = None
    """None: not said; then the value is taken as it stands."""
    model: str
    baseline: str | None = None
    conditions: Conditions
    source: str
    """The report or command it comes from, and the digest of what was measured."""
    mark: str | None = None
    """What is not real about it, such as `dummy weights`: such a figure decides nothing."""

    def says(self, value: float) -> Literal["at least", "less", "either"]:
        """Whether the figure is at least `value`, as far as its interval tells."""
        if self.repeats is None:
            return "at least" if self.value >= value else "less"
        if self.low is None or self.high is None:
            return "either"
        if self.low >= value:
            return "at least"
        return "less" if self.high < value else "either"


class Judged(Document):
    """A claim and what became of it."""

    claim: Claim
    verdict: Verdict
    missing: tuple[str, ...]
    """Conditions that decide the figure and are not stated."""
    measured: float | None
    """The best figure measured under the claim's conditions."""
    evidence: tuple[Measured, ...] = ()
    """All that was measured under the conditions stated; where one is missing, under any."""
    mark: str | None = None
    """Set if all evidence is of something not real: the verdict is then the bound's."""
    bound: float | None
    """The most that hardware allows under the stated conditions; the best completion where some are open."""
    lowest: float | None
    """The least that the bound can be over what is left open."""
    share_of_bound: float | None
    arithmetic: str
    """How the bound, or the verdict, comes about."""


def load_claims(name: str | Path) -> list[Claim]:
    """Claims from a YAML file, or those that come with the package by name (`antangelmed`).

    Raises:
        MeasurementError: no such file or name, or a malformed claim.
    """
    shipped = resources.files("validation.models").joinpath(f"claims-{name}.yaml")
    try:
        known = "/" not in str(name) and shipped.is_file()
        text = shipped.read_text("utf-8") if known else Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise MeasurementError(
            f"cannot read claims from {name}: {getattr(err, 'strerror', None) or err}",
            "Give a YAML file, or the name antangelmed.",
        ) from None
    claims: list[Claim] = _parse(text, TypeAdapter(list[Claim]), str(name))
    if len({claim.id for claim in claims}) != len(claims):
        raise MeasurementError(f"{name}: two claims have the same id")
    return claims


def load_measured(path: Path) -> list[Measured]:
    """Measured figures from a YAML or JSON list. Raises MeasurementError: unreadable or malformed."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise MeasurementError(f"cannot read {path}: {getattr(err, 'strerror', None) or err}") from None
    figures: list[Measured] = _parse(text, TypeAdapter(list[Measured]), str(path))
    return figures


def _parse(text: str, kind: TypeAdapter[Any], name: str) -> Any:
    try:
        return kind.validate_python(yaml.safe_load(text))
    except yaml.YAMLError as err:
        raise MeasurementError(f"{name} is not YAML: {' '.join(str(err).split())}") from None
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "(file)"
        raise MeasurementError(f"{name}: {where}: {first['msg']}") from None


def judge(
    claim: Claim,
    measured: Sequence[Measured] = (),
    *,
    card: Card | None = None,
    models: Mapping[str, ModelShape] | None = None,
) -> Judged:
    """Hold one claim against measurements and the bound.

    It is verified if every real figure under its conditions is at least as high with its whole interval,
    refuted if every one is lower with its whole interval, and else inconclusive. A claim with a condition
    missing is decided by no figure: its evidence is shown all the same. Neither is one decided by figures on
    dummy weights or with synthetic acceptance.

    Args:
        card: what `card: here` means; None: such claims have no bound.
        models: shapes besides the published ones, by name.

    Raises:
        MeasurementError: the claim's model is not known.
    """
    stated = claim.conditions.stated
    drafted = claim.quantity == "gain of a draft" or bool(set(_DRAFT_NEEDS) & set(stated))
    needs = _NEEDS[claim.quantity] + (_DRAFT_NEEDS if drafted else ())
    missing = tuple(name for name in needs if name not in stated)
    evidence = tuple(m for m in measured if _same(claim, m))
    real = [m for m in evidence if m.mark is None]
    said = {m.says(claim.value) for m in real}
    bare = set(_DRAFT_NEEDS) & set(missing) or (stated.get("card") == HERE and card is None)
    bounds = [] if bare else list(_bounds(claim, card, models or {}))
    best = max(bounds, key=lambda b: b[0]) if bounds else None
    lowest = min(bounds, key=lambda b: b[0])[0] if bounds else None
    bound = best[0] if best else None
    verdict: Verdict
    if real and not missing:
        verdict = "inconclusive"
        if said == {"at least"}:
            verdict = "verified"
        elif said == {"less"}:
            verdict = "refuted"
    elif bound is not None and claim.value > bound:
        length = claim.conditions.acceptance_length
        gained = claim.quantity == "gain of a draft" and length is not None and claim.value <= length
        verdict = "unexplained" if claim.baseline or gained else "impossible"
    elif missing:
        verdict = "unfalsifiable"
    else:
        verdict = "consistent"
    return Judged(
        claim=claim,
        verdict=verdict,
        missing=missing,
        measured=max((m.value for m in evidence), default=None),
        evidence=evidence,
        mark=" and ".join(dict.fromkeys(m.mark for m in evidence if m.mark))
        if evidence and not real
        else None,
        bound=bound,
        lowest=lowest,
        share_of_bound=claim.value / bound if bound else None,
        arithmetic=best[1] if best else _NO_BOUND["draft" if missing else "here"],
    )


def _same(claim: Claim, measured: Measured) -> bool:
    """Whether a figure was measured under all that the claim states."""
    known, stated = measured.conditions.stated, claim.conditions.stated
    if claim.quantity != "gain of a draft" and "draft_tokens" in known and "draft_tokens" not in stated:
        return False  # the claim names no draft, and its bound has none
    for name in ("context", "acceptance_length"):
        if name in stated and name in known and _near(name, known[name], stated[name]):
            known[name] = stated[name]
    return (claim.quantity, claim.model, claim.baseline) == (
        measured.quantity,
        measured.model,
        measured.baseline,
    ) and all(known.get(name) == value for name, value in stated.items())


def _near(name: str, value: float, stated: float) -> bool:
    if name == "context":
        return abs(value - stated) <= max(CONTEXT_TOLERANCE * stated, CONTEXT_TOKENS)
    return abs(value - stated) <= ACCEPTANCE_TOLERANCE * stated


_NO_BOUND = {
    "draft": "No bound: the draft's length or acceptance is not stated.",
    "here": "No bound: the rates of this machine are not known without a sweep that has them.",
}


def _bounds(claim: Claim, card: Card | None, models: Mapping[str, ModelShape]) -> Iterator[tuple[float, str]]:
    """The bound, and how it comes about, under every completion of what is stated that fits in memory."""
    stated, names = claim.conditions.stated, _NEEDS[claim.quantity]
    model = models.get(claim.model) or model_named(claim.model)
    baseline = models.get(claim.baseline) or model_named(claim.baseline) if claim.baseline else None
    found = False
    for values in product(*((stated[name],) if name in stated else OPEN[name] for name in names)):
        at = dict(zip(names, values, strict=True))
        known = hardware_file().cards | ({HERE: card} if card else {})
        cards = Hardware(key=at["card"], count=at["count"], card=known[at["card"]])
        room = cards.memory - model.weight_bytes(at["precision"])
        if room < at.get("concurrency", 0) * at.get("context", 0) * model.kv_bytes():
            continue
        if baseline and not _holds(baseline, cards, at):
            continue
        found = True
        if claim.quantity == "context in tokens":
            yield _context(model, cards, at, room)
        else:
            yield _speed(claim, model, baseline, cards, at)
    if not found:
        yield 0.0, "Under no completion of the stated conditions do weights and cache fit in memory."


def _context(model: ModelShape, cards: Hardware, at: dict[str, Any], room: float) -> tuple[float, str]:
    tokens = room / model.kv_bytes()
    weights = model.weight_bytes(at["precision"]) / GB
    return tokens, (
        f"{cards.label}: {cards.memory / GB:.0f} GB hold {weights:.0f} GB of weights "
        f"({at['precision'].upper()}) and the cache of {tokens:,.0f} tokens. Whether the model reads "
        "that far is no matter of arithmetic: measure it."
    )


def _speed(
    claim: Claim, model: ModelShape, baseline: ModelShape | None, cards: Hardware, at: dict[str, Any]
) -> tuple[float, str]:
    setting = Setting(precision=at["precision"], tensor=at["count"])
    plain = fast = _rate(model, cards, setting, at)
    shown = _step(model, cards, at, plain)
    tokens, length = claim.conditions.draft_tokens, claim.conditions.acceptance_length
    if tokens is not None and length is not None:
        # The draft's own size is no condition of such claims: its steps are counted as free.
        draft = Draft(weight_bytes=0.0, kv_bytes=0.0, tokens=tokens, acceptance_length=length)
        fast = _rate(model, cards, setting.model_copy(update={"draft": draft}), at)
        shown += (
            f" Verifying {tokens + 1} tokens a sequence takes {1e3 * fast.step.seconds:.2f} ms and "
            f"yields {length:g}; drafting is counted as free."
        )
    if baseline is not None:
        theirs = Setting(precision=at["baseline_precision"], tensor=at["count"])
        other = _rate(baseline, cards, theirs, at)
        return fast.tokens_per_s / other.tokens_per_s, f"{shown} {_step(baseline, cards, at, other)}"
    if claim.quantity == "output tokens/s":
        return fast.tokens_per_s, shown
    # A verifying step is no shorter than a plain one, so the acceptance length is never passed.
    return min(fast.tokens_per_s / plain.tokens_per_s, length or 1.0), shown


def _holds(model: ModelShape, cards: Hardware, at: dict[str, Any]) -> bool:
    needed = model.weight_bytes(at["baseline_precision"])
    return bool(cards.memory >= needed + at["concurrency"] * at["context"] * model.kv_bytes())


def _rate(model: ModelShape, cards: Hardware, setting: Setting, at: dict[str, Any]) -> Rate:
    return decode_rate(model, cards, setting, concurrency=at["concurrency"], context=at["context"])


def _step(model: ModelShape, cards: Hardware, at: dict[str, Any], rate: Rate) -> str:
    step = rate.step
    bandwidth = cards.count * cards.card.bandwidth_tb_s
    return (
        f"{model.name} on {cards.label}, concurrency {at['concurrency']}, {at['context']} tokens of context: "
        f"a step reads {step.weight_bytes / GB:.1f} GB of weights and {step.kv_bytes / GB:.2f} GB of cache "
        f"at {bandwidth:g} TB/s, {1e3 * step.memory_s:.2f} ms, and computes {1e3 * step.compute_s:.2f} ms: "
        f"at most {rate.tokens_per_s:,.1f} tokens/s."
    )
