"""How far a changed model's distribution is from the original's, token by token of the same texts.

Kullback-Leibler divergence says how much was changed, not whether it got worse: it is an alarm for damage
that accuracy on a few hundred items may miss, and no ranking of models that pass.

Servers list the likeliest tokens alone. Over the tokens listed by both and one bucket for all others,

    KL_k = sum_listed p log(p/q) + p_rest log(p_rest / q_rest)

is a lower bound of KL(reference || candidate) (the log-sum inequality); what is missing is exactly p_rest
times the divergence within the bucket. `rest_mass`, the mean of p_rest, says how much that can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from validation.document import Document
from validation.errors import MeasurementError
from validation.gates import Gate, at_least, at_most, failed
from validation.panel import Column, Panel, Table
from validation.prompt_logprobs import Position, ScoredRun, Scoring

TOP_K = 5
"""Tokens of the top-k agreement."""
_LEAST_MASS = 1e-6
"""Masses below this are what FP32 sums leave: both sides count as this much."""
_EDGES = tuple(16 * 4**n for n in range(12))
"""Last token positions of the buckets: 16, 64, 256 …"""


class Bounds(Document):
    """Where the alarms go off; named before anything is measured."""

    max_mean_kl_nats: float = Field(default=0.02, gt=0)
    max_p99_kl_nats: float = Field(default=0.5, gt=0)
    min_top1_agreement: float = Field(default=0.97, ge=0, le=1)
    max_perplexity_ratio: float = Field(default=1.02, gt=0)
    """Candidate over reference."""
    min_experts_shared: float = Field(default=0.85, ge=0, le=1)
    """Mean Jaccard index of the experts that a token is sent to. Whole sets that agree are no measure across
    models: of eight experts among 256 one is often nearly tied with the ninth."""


class Divergence(NamedTuple):
    """Two distributions after the same beginning."""

    kl: float
    """Lower bound of KL(reference || candidate), nats."""
    rest: float
    """The reference's mass outside the tokens that both list."""


class FidelitySlice(Document):
    """Figures over some of the tokens."""

    name: str
    tokens: int
    kl_mean: float
    """Nats a token."""
    kl_low: float
    kl_high: float
    """95 % interval of the mean, passages as clusters (linearised ratio, normal)."""
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    """Share of tokens at which both find the same token likeliest."""
    topk_agreement: float
    """Mean share of the reference's `TOP_K` likeliest tokens among the candidate's."""
    perplexity_reference: float
    perplexity_candidate: float
    rest_mass: float
    """Mean mass of the reference outside the tokens that both list."""

    @property
    def perplexity_ratio(self) -> float:
        """Candidate over reference."""
        return self.perplexity_candidate / self.perplexity_reference


class FidelityResult(Document):
    """Two servers on the same texts."""

    schema_version: int = 1
    reference: str
    candidate: str
    reference_subject: str
    candidate_subject: str
    passages: int
    passages_digest: str
    scoring: Scoring
    overall: FidelitySlice
    by_position: tuple[FidelitySlice, ...]
    by_language: tuple[FidelitySlice, ...]
    noise: FidelitySlice | None
    """The reference against itself in another batch."""
    bounds: Bounds
    alarms: tuple[Gate, ...]
    """Each bound; one that failed is an alarm."""

    @property
    def raised(self) -> list[Gate]:
        """The alarms that went off."""
        return failed(self.alarms)


class RoutingLayer(Document):
    """One layer with experts."""

    layer: int
    tokens: int
    same_set: float
    """Share of tokens whose chosen experts are the same set."""
    jaccard: float
    """Mean size of the intersection of both sets over that of their union."""


class RoutingAgreement(Document):
    """Which experts tokens are sent to by two models, on the same texts."""

    schema_version: int = 1
    reference: str
    candidate: str
    reference_subject: str
    candidate_subject: str
    tokens: int
    source: str
    """Where the choices come from: the engine, or a forward of our own."""
    same_set: float
    """Over all (token, layer) pairs."""
    jaccard: float
    layers: tuple[RoutingLayer, ...]
    alarm: Gate


class _Token(NamedTuple):
    passage: int
    position: int
    language: str
    divergence: Divergence
    same_top: bool
    overlap: float
    reference: float
    candidate: float


def divergence(reference: Position, candidate: Position) -> Divergence:
    """KL_k of one position; see the head of this module."""
    p, q = dict(reference.top), dict(candidate.top)
    shared = p.keys() & q.keys()
    kl = math.fsum(math.exp(p[t]) * (p[t] - q[t]) for t in shared)
    p_rest = 1.0 - math.fsum(math.exp(p[t]) for t in shared)
    q_rest = 1.0 - math.fsum(math.exp(q[t]) for t in shared)
    p_used, q_used = max(p_rest, _LEAST_MASS), max(q_rest, _LEAST_MASS)
    return Divergence(max(0.0, kl + p_used * math.log(p_used / q_used)), max(0.0, p_rest))


def compare_scores(
    reference: ScoredRun,
    candidate: ScoredRun,
    *,
    again: ScoredRun | None = None,
    bounds: Bounds | None = None,
) -> FidelityResult:
    """Fidelity of `candidate` to `reference`.

    Args:
        again: the reference's second scoring, in another batch: what its own arithmetic leaves.

    Raises:
        MeasurementError: the runs scored other texts, in another way, or cut them into other tokens.
    """
    bounds = bounds or Bounds()
    tokens = _pair(reference, candidate)
    overall = _slice("all", tokens)
    buckets: list[FidelitySlice] = []
    for low, high in zip((1, *(edge + 1 for edge in _EDGES)), _EDGES, strict=False):
        inside = [t for t in tokens if low <= t.position <= high]
        if inside:
            buckets.append(_slice(f"{low}\N{EN DASH}{high}", inside))
    languages = sorted({t.language for t in tokens})
    return FidelityResult(
        reference=reference.label,
        candidate=candidate.label,
        reference_subject=reference.subject,
        candidate_subject=candidate.subject,
        passages=len(reference.passages),
        passages_digest=reference.passages_digest,
        scoring=reference.scoring,
        overall=overall,
        by_position=tuple(buckets),
        by_language=tuple(_slice(one, [t for t in tokens if t.language == one]) for one in languages),
        noise=None if again is None else _slice("noise", _pair(reference, again)),
        bounds=bounds,
        alarms=(
            at_most("mean KL", overall.kl_mean, bounds.max_mean_kl_nats, "nats"),
            at_most("99th percentile of KL", overall.kl_p99, bounds.max_p99_kl_nats, "nats"),
            at_least("same likeliest token", overall.top1_agreement, bounds.min_top1_agreement),
            at_most("perplexity ratio", overall.perplexity_ratio, bounds.max_perplexity_ratio),
        ),
    )


def compare_routing(
    reference: Sequence[Any],
    candidate: Sequence[Any],
    layers: Sequence[int],
    *,
    names: tuple[str, str],
    subjects: tuple[str, str],
    source: str,
    bounds: Bounds | None = None,
) -> RoutingAgreement:
    """Agreement of expert choices.

    Args:
        reference, candidate: for each layer with experts an array [tokens, k] of expert numbers (any order),
            the tokens in the same order.
        layers: the numbers of these layers.

    Raises:
        MeasurementError: the arrays are not of the same shapes, or there are none.
    """
    import numpy as np

    found, sizes = [], set()
    for layer, one, other in zip(layers, reference, candidate, strict=True):
        a, b = np.sort(np.asarray(one), axis=1), np.sort(np.asarray(other), axis=1)
        if a.shape != b.shape or not a.size:
            raise MeasurementError(f"layer {layer}: expert choices of shapes {a.shape} and {b.shape}")
        common = (a[:, :, None] == b[:, None, :]).sum(axis=(1, 2))
        sizes.add(len(a))
        found.append(
            RoutingLayer(
                layer=layer,
                tokens=len(a),
                same_set=float((common == a.shape[1]).mean()),
                jaccard=float((common / (2 * a.shape[1] - common)).mean()),
            )
        )
    if len(sizes) != 1:
        raise MeasurementError("no layer with experts, or layers of different numbers of tokens")
    jaccard = math.fsum(one.jaccard for one in found) / len(found)
    bound = (bounds or Bounds()).min_experts_shared
    return RoutingAgreement(
        reference=names[0],
        candidate=names[1],
        reference_subject=subjects[0],
        candidate_subject=subjects[1],
        tokens=sizes.pop(),
        source=source,
        same_set=math.fsum(one.same_set for one in found) / len(found),
        jaccard=jaccard,
        layers=tuple(found),
        alarm=at_least("experts shared, Jaccard index", jaccard, bound),
    )


def fidelity_panel(results: Sequence[FidelityResult], routing: Sequence[RoutingAgreement] = ()) -> Panel:
    """The panel of a report: figures, slices, routing and alarms."""
    raised = [f"{r.candidate}: {g.name}" for r in results for g in r.raised]
    raised += [f"{r.candidate}: {r.alarm.name}" for r in routing if r.alarm.outcome == "fail"]
    lines = [f"{r.candidate} is {r.overall.kl_mean:.2g} nats a token from {r.reference}" for r in results]
    summary = "; ".join(lines) + (f". Alarms: {'; '.join(raised)}." if raised else ". No alarm went off.")
    rows: list[tuple[str | int | float | None, ...]] = []
    for result in results:
        slices = [result.overall, *result.by_language, *result.by_position]
        rows += [_row(f"{result.candidate} / {result.reference}", one) for one in slices]
    noise = {r.reference: r.noise for r in results if r.noise is not None}
    rows += [_row(f"{name} / itself", one.model_copy(update={"name": "all"})) for name, one in noise.items()]
    tables = [Table(caption="The same texts, token by token", columns=_COLUMNS, rows=tuple(rows))]
    if routing:
        routed: list[tuple[str | int | float | None, ...]] = []
        for one in routing:
            pair = f"{one.candidate} / {one.reference}"
            routed.append((pair, "all", one.tokens, 100 * one.same_set, one.jaccard))
            routed += [(pair, str(at.layer), at.tokens, 100 * at.same_set, at.jaccard) for at in one.layers]
        tables.append(Table(caption="Experts that tokens are sent to", columns=_ROUTING, rows=tuple(routed)))
    judged = [(f"{r.candidate} / {r.reference}", gate) for r in results for gate in r.alarms]
    judged += [(f"{r.candidate} / {r.reference}", r.alarm) for r in routing]
    tables.append(
        Table(
            caption="Alarms, bounds named beforehand",
            columns=_ALARMS,
            rows=tuple(
                (
                    pair,
                    g.name,
                    g.measured,
                    f"{g.comparison} {g.bound:g}",
                    "yes" if g.outcome == "fail" else "no",
                )
                for pair, g in judged
            ),
        )
    )
    notes = [
        "KL divergence says how much was changed, not whether it got worse: an alarm, no ranking.",
        "KL is a lower bound: tokens that a server does not list count as one; the bucket column is the "
        "reference's mass in it, by which the divergence within it would have to be weighted.",
    ]
    notes += [f"Expert choices: {source}." for source in dict.fromkeys(r.source for r in routing)]
    subjects = [s for r in results for s in (r.reference_subject, r.candidate_subject)]
    subjects += [s for r in routing for s in (r.reference_subject, r.candidate_subject)]
    return Panel(
        key="fidelity",
        title="Fidelity" if results else "Expert routing",
        summary=summary,
        tables=tuple(tables),
        notes=tuple(notes),
        subjects=tuple(dict.fromkeys(subjects)),
    )


def _text(name: str) -> Column:
    return Column(name=name, kind="text")


_COLUMNS = (
    _text("models"),
    _text("tokens at"),
    Column(name="tokens"),
    Column(name="KL, mean", unit="nats", digits=6),
    Column(name="KL, 95 % low", unit="nats", digits=6),
    Column(name="KL, 95 % high", unit="nats", digits=6),
    Column(name="KL, median", unit="nats", digits=6),
    Column(name="KL, p99", unit="nats", digits=4),
    Column(name="KL, max", unit="nats", digits=3),
    Column(name="top-1 same", unit="%", digits=2),
    Column(name=f"top-{TOP_K} shared", unit="%", digits=2),
    Column(name="perplexity, reference", digits=4),
    Column(name="perplexity, candidate", digits=4),
    Column(name="bucket", unit="%", digits=3),
)
_ROUTING = (
    _text("models"),
    _text("layer"),
    Column(name="tokens"),
    Column(name="same experts", unit="%", digits=2),
    Column(name="Jaccard", digits=4),
)


_ALARMS = (
    _text("models"),
    _text("figure"),
    Column(name="measured", digits=4),
    _text("bound"),
    _text("alarm"),
)


def _row(pair: str, one: FidelitySlice) -> tuple[str | int | float | None, ...]:
    return (
        pair, one.name, one.tokens,
        one.kl_mean, one.kl_low, one.kl_high, one.kl_median, one.kl_p99, one.kl_max,
        100 * one.top1_agreement, 100 * one.topk_agreement,
        one.perplexity_reference, one.perplexity_candidate, 100 * one.rest_mass,
    )  # fmt: skip


def _pair(reference: ScoredRun, candidate: ScoredRun) -> list[_Token]:
    same = {"repetition"}
    if reference.passages_digest != candidate.passages_digest or reference.scoring.model_dump(
        exclude=same
    ) != candidate.scoring.model_dump(exclude=same):
        raise MeasurementError(f"{reference.label} and {candidate.label} did not score the same texts")
    found = []
    rows = zip(reference.passages, candidate.passages, reference.languages, strict=True)
    for number, (a, b, language) in enumerate(rows):
        if a.tokens != b.tokens:
            raise MeasurementError(
                f"{reference.label} and {candidate.label} cut {a.id!r} into other tokens",
                "Fidelity compares models with the same tokenizer and chat template.",
            )
        for position, (x, y) in enumerate(zip(a.positions, b.positions, strict=True), len(a.context)):
            ours, theirs = ([t for t, _ in at.top[:TOP_K]] for at in (x, y))
            found.append(
                _Token(
                    passage=number,
                    position=position,
                    language=language,
                    divergence=divergence(x, y),
                    same_top=ours[0] == theirs[0],
                    overlap=len(set(ours) & set(theirs)) / len(ours),
                    reference=x.logprob,
                    candidate=y.logprob,
                )
            )
    return found


def _slice(name: str, tokens: Sequence[_Token]) -> FidelitySlice:
    kl = sorted(t.divergence.kl for t in tokens)
    n = len(kl)

    def mean(pick: Callable[[_Token], float]) -> float:
        return math.fsum(map(pick, tokens)) / n

    average = math.fsum(kl) / n
    half = 1.96 * _clustered_error(((t.passage, t.divergence.kl) for t in tokens), average, n)
    return FidelitySlice(
        name=name,
        tokens=n,
        kl_mean=average,
        kl_low=max(0.0, average - half),
        kl_high=average + half,
        kl_median=kl[round(0.5 * (n - 1))],
        kl_p90=kl[round(0.9 * (n - 1))],
        kl_p99=kl[round(0.99 * (n - 1))],
        kl_max=kl[-1],
        top1_agreement=mean(lambda t: t.same_top),
        topk_agreement=mean(lambda t: t.overlap),
        perplexity_reference=math.exp(-mean(lambda t: t.reference)),
        perplexity_candidate=math.exp(-mean(lambda t: t.candidate)),
        rest_mass=mean(lambda t: t.divergence.rest),
    )


def _clustered_error(values: Iterable[tuple[int, float]], average: float, n: int) -> float:
    """Standard error of a mean over n values in clusters of unequal size (linearised ratio estimator)."""
    excess: dict[int, float] = {}
    for cluster, value in values:
        excess[cluster] = excess.get(cluster, 0.0) + value - average
    clusters = len(excess)
    if clusters < 2:
        return 0.0
    return math.sqrt(math.fsum(e * e for e in excess.values()) * clusters / (clusters - 1)) / n
