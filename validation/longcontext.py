"""Retrieval from long records by length and depth, before and after a context extension; what may be claimed."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeVar

from validation.document import Document
from validation.endpoint import REFUSED, Progress, Sampling, Target
from validation.errors import MeasurementError
from validation.statistics import wilson
from validation.tasks.comparison import Paired, paired_outcomes
from validation.tasks.items import Item, items_digest
from validation.tasks.scoring import extract_answer, is_correct, normalise

_TIMEOUT_S = 300.0
"""Until an answer: reading a record of 128K tokens takes its time."""
_MOST_DEPTHS = 11
"""Depths that a grid shows one by one; more are gathered into `_BANDS` equal bands."""
_BANDS = 5
_Key = TypeVar("_Key", bound=Hashable)


class LongResult(Document):
    """One long-record item as one model answered it."""

    id: str
    multiple: int | float
    """Times the trained length."""
    kind: str = ""
    """What was asked for: a dose, an allergy, a laboratory value, the later of two notes."""
    context_tokens: int
    depth: float
    """Where the value stands: 0 start, 1 end of the record."""
    language: str
    expected: str
    extracted: str | None
    correct: bool
    refused: bool
    """The server would not take a prompt this long; counts as not right."""
    superseded: bool = False
    """The answer is what an earlier note says and a later one overrides."""


class LongShare(Document):
    """Retrieval at one multiple of the trained length, with its 95 % Wilson interval."""

    multiple: int | float
    context_tokens: int
    """Median length of the records, in tokens of the items' own count."""
    n: int
    correct: int
    refused: int
    accuracy: float
    low: float
    high: float
    majority_share: float
    """What always giving the commonest answer would score."""


class LongCell(Document):
    """Retrieval at one length and depth, or of one kind at one length, with its 95 % Wilson interval."""

    multiple: int | float
    depth_low: float | None = None
    """0 start, 1 end of the record; equal ends: that depth alone. None: a cell of a kind."""
    depth_high: float | None = None
    kind: str | None = None
    n: int
    correct: int
    superseded: int
    """Answers that took the earlier of two conflicting notes."""
    accuracy: float
    low: float
    high: float


class LongRun(Document):
    """All long-record items as one served model answered them."""

    schema_version: int = 2
    label: str
    subject: str
    items_digest: str
    sampling: Sampling
    trained_length: int
    by_multiple: tuple[LongShare, ...]
    grid: tuple[LongCell, ...] = ()
    """By length, then depth."""
    by_kind: tuple[LongCell, ...] = ()
    """By kind, then length; empty if there is one kind only."""
    results: tuple[LongResult, ...]

    def longest_passing_tokens(self, min_accuracy: float) -> int | None:
        """The longest length in tokens, multiple x trained length, up to which every multiple reaches
        `min_accuracy`; None if the shortest does not. A gap ends the claim: 4x does not count if 2x fails."""
        longest = None
        for share in self.by_multiple:
            if share.accuracy < min_accuracy:
                break
            longest = round(share.multiple * self.trained_length)
        return longest

    @property
    def longest_measured_tokens(self) -> int:
        """The longest length asked at, in tokens, whatever came of it."""
        return round(max(share.multiple for share in self.by_multiple) * self.trained_length)


class LongComparison(Document):
    """The same long-record items before and after a context extension, paired by multiple."""

    schema_version: int = 1
    before: str
    after: str
    before_subject: str
    after_subject: str
    trained_length: int
    by_multiple: tuple[Paired, ...]
    """Scope "1x", "2x", …; the difference is after minus before."""


class ContextClaim(Document):
    """A context length that a release names, against what was measured of it."""

    claimed: int
    """Tokens."""
    min_accuracy: float
    measured: int | None
    """Longest length at which records were read at all, in tokens; None: not measured."""
    held: int | None
    """Longest length up to which every length measured reached `min_accuracy`; None: none did."""

    @property
    def outcome(self) -> Literal["measured", "not held", "not measured"]:
        """`not held`: records as long as claimed were read, and too few answers were right."""
        if (self.held or 0) >= self.claimed:
            return "measured"
        return "not held" if (self.measured or 0) >= self.claimed else "not measured"


def context_claim(claimed: int, runs: Sequence[LongRun], min_accuracy: float) -> ContextClaim:
    """What may be said of `claimed` tokens: the last run is that of the model as it is released."""
    if not runs:
        return ContextClaim(claimed=claimed, min_accuracy=min_accuracy, measured=None, held=None)
    last = runs[-1]
    return ContextClaim(
        claimed=claimed,
        min_accuracy=min_accuracy,
        measured=last.longest_measured_tokens,
        held=last.longest_passing_tokens(min_accuracy),
    )


def measure_long(
    target: Target,
    items: Sequence[Item],
    *,
    trained_length: int,
    concurrency: int = 4,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> LongRun:
    """Ask every long-record item; `meta` must name `multiple`, `context_tokens` and `depth`.

    Raises:
        MeasurementError: an item lacks those, or see `Endpoint.complete`. ServerUnreachable: likewise.
    """
    if not items:
        raise MeasurementError("no long-record items to measure")
    for item in items:
        lacking = [k for k in ("multiple", "context_tokens", "depth") if k not in item.meta]
        if lacking:
            raise MeasurementError(f"the long-record item {item.id!r} lacks meta {', '.join(lacking)}")
    sampling = sampling or Sampling(max_tokens=64, top_logprobs=None)
    completions = target.ask(
        [i.request for i in items],
        sampling,
        concurrency=concurrency,
        timeout_s=_TIMEOUT_S,
        refusals=True,
        progress=progress,
    )
    results = []
    for item, completion in zip(items, completions, strict=True):
        extracted = extract_answer(completion.text)
        results.append(
            LongResult(
                id=item.id,
                multiple=_plain_number(item.meta["multiple"]),
                kind=str(item.meta.get("kind", "")),
                context_tokens=int(item.meta["context_tokens"]),
                depth=float(item.meta["depth"]),
                language=item.language,
                expected=normalise(item.answer),
                extracted=extracted,
                correct=_found(extracted, item.answer),
                refused=completion.finish_reason == REFUSED,
                superseded="superseded" in item.meta and _found(extracted, str(item.meta["superseded"])),
            )
        )
    multiples = sorted({r.multiple for r in results})
    kinds = list(dict.fromkeys(r.kind for r in results))
    bands = _bands([r.depth for r in results])

    def band(result: LongResult) -> tuple[float, float]:
        return next((b for b in bands if b[0] <= result.depth <= b[1]), bands[-1])

    return LongRun(
        label=target.label,
        subject=target.subject,
        items_digest=items_digest(items),
        sampling=sampling,
        trained_length=trained_length,
        by_multiple=tuple(_share(m, [r for r in results if r.multiple == m]) for m in multiples),
        grid=tuple(
            _cell(rows, multiple=multiple, depth_low=ends[0], depth_high=ends[1])
            for (multiple, ends), rows in _grouped(results, lambda r: (r.multiple, band(r)))
        ),
        by_kind=tuple(
            _cell(rows, multiple=multiple, kind=kinds[at])
            for (at, multiple), rows in _grouped(results, lambda r: (kinds.index(r.kind), r.multiple))
        )
        if len(kinds) > 1
        else (),
        results=tuple(results),
    )


def compare_long(before: LongRun, after: LongRun, *, margin_points: float = 5.0) -> LongComparison:
    """Pair two runs over the same items. At 1x the verdict says whether short records got worse.

    Raises:
        MeasurementError: the runs answered different items.
    """
    if before.items_digest != after.items_digest:
        raise MeasurementError(f"{before.label} and {after.label} answered different items; they do not pair")
    pairs = list(zip(before.results, after.results, strict=True))
    multiples = sorted({a.multiple for a, _ in pairs})
    return LongComparison(
        before=before.label,
        after=after.label,
        before_subject=before.subject,
        after_subject=after.subject,
        trained_length=before.trained_length,
        by_multiple=tuple(
            paired_outcomes(
                f"{m:g}x", [(a.correct, b.correct) for a, b in pairs if a.multiple == m], margin_points
            )
            for m in multiples
        ),
    )


def _plain_number(value: Any) -> int | float:
    number = float(value)
    return int(number) if number.is_integer() else number


def _found(extracted: str | None, expected: str) -> bool:
    """Whether the value was found: emphasis, quotes, spaces and case around it are no matter, digits are."""
    if extracted is None:
        return False
    return is_correct(extracted, expected) or _bare(extracted) == _bare(expected)


def _bare(answer: str) -> str:
    return re.sub(r"[\s*_`\"'“”‘’]", "", answer).casefold().rstrip(".。")


def _bands(depths: Sequence[float]) -> list[tuple[float, float]]:
    """The depths themselves if they are few, else equal bands; each as (from, to)."""
    distinct = sorted(set(depths))
    if len(distinct) <= _MOST_DEPTHS:
        return [(d, d) for d in distinct]
    return [(k / _BANDS, (k + 1) / _BANDS) for k in range(_BANDS)]


def _grouped(
    results: Sequence[LongResult], key: Callable[[LongResult], _Key]
) -> list[tuple[_Key, list[LongResult]]]:
    """Results by key, in the keys' order."""
    groups: dict[_Key, list[LongResult]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return sorted(groups.items(), key=lambda group: group[0])  # type: ignore[arg-type, return-value]


def _cell(results: Sequence[LongResult], **place: Any) -> LongCell:
    n, correct = len(results), sum(r.correct for r in results)
    low, high = wilson(correct, n)
    return LongCell(
        **place,
        n=n,
        correct=correct,
        superseded=sum(r.superseded for r in results),
        accuracy=correct / n,
        low=low,
        high=high,
    )


def _share(multiple: int | float, results: Sequence[LongResult]) -> LongShare:
    n, correct = len(results), sum(r.correct for r in results)
    low, high = wilson(correct, n)
    answers = [r.expected for r in results]
    lengths = sorted(r.context_tokens for r in results)
    return LongShare(
        multiple=multiple,
        context_tokens=lengths[(n - 1) // 2],
        n=n,
        correct=correct,
        refused=sum(r.refused for r in results),
        accuracy=correct / n,
        low=low,
        high=high,
        majority_share=max(answers.count(a) for a in set(answers)) / n,
    )
