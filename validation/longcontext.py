"""Retrieval from long records by multiple of the trained length, before and after a context extension."""

from __future__ import annotations

from collections.abc import Sequence

from validation.document import Document
from validation.endpoint import REFUSED, Progress, Sampling, Target
from validation.errors import MeasurementError
from validation.statistics import wilson
from validation.tasks.comparison import Paired, paired_outcomes
from validation.tasks.items import Item, items_digest
from validation.tasks.scoring import extract_answer, is_correct, normalise

_TIMEOUT_S = 300.0
"""Until an answer: reading a record of 128K tokens takes its time."""


class LongResult(Document):
    """One long-record item as one model answered it."""

    id: str
    multiple: int
    """Times the trained length."""
    context_tokens: int
    depth: float
    """Where the value stands: 0 start, 1 end of the record."""
    language: str
    expected: str
    extracted: str | None
    correct: bool
    refused: bool
    """The server would not take a prompt this long; counts as not right."""


class LongShare(Document):
    """Retrieval at one multiple of the trained length, with its 95 % Wilson interval."""

    multiple: int
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


class LongRun(Document):
    """All long-record items as one served model answered them."""

    schema_version: int = 1
    label: str
    subject: str
    items_digest: str
    sampling: Sampling
    trained_length: int
    by_multiple: tuple[LongShare, ...]
    results: tuple[LongResult, ...]

    def longest_passing_tokens(self, min_accuracy: float) -> int | None:
        """The longest length in tokens, multiple x trained length, up to which every multiple reaches
        `min_accuracy`; None if the shortest does not. A gap ends the claim: 4x does not count if 2x fails."""
        longest = None
        for share in self.by_multiple:
            if share.accuracy < min_accuracy:
                break
            longest = share.multiple * self.trained_length
        return longest


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
                multiple=int(item.meta["multiple"]),
                context_tokens=int(item.meta["context_tokens"]),
                depth=float(item.meta["depth"]),
                language=item.language,
                expected=normalise(item.answer),
                extracted=extracted,
                correct=is_correct(extracted, item.answer),
                refused=completion.finish_reason == REFUSED,
            )
        )
    multiples = sorted({r.multiple for r in results})
    return LongRun(
        label=target.label,
        subject=target.subject,
        items_digest=items_digest(items),
        sampling=sampling,
        trained_length=trained_length,
        by_multiple=tuple(_share(m, [r for r in results if r.multiple == m]) for m in multiples),
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
                f"{m}x", [(a.correct, b.correct) for a, b in pairs if a.multiple == m], margin_points
            )
            for m in multiples
        ),
    )


def _share(multiple: int, results: Sequence[LongResult]) -> LongShare:
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
