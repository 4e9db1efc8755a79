"""Accuracy of a served model on items with known answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from validation.document import Document
from validation.endpoint import Progress, Sampling, Target
from validation.errors import MeasurementError
from validation.statistics import wilson
from validation.tasks.items import Item, items_digest
from validation.tasks.scoring import normalise, refuse_rubrics, score


class ItemResult(Document):
    """One item as one model answered it."""

    id: str
    task: str
    language: str
    question: str
    """Content of the last turn, to read a flip by."""
    expected: str
    extracted: str | None
    """None: the answer held no marker."""
    correct: bool
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    safety: bool = False
    """Whether the item's `meta` says `safety: true`: losing it counts by itself."""


class Share(Document):
    """A share of items answered rightly, with its 95 % Wilson interval and the majority-answer baseline."""

    name: str
    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    majority_answer: str
    """The commonest right answer; a model that always gives it scores `majority_share`."""
    majority_share: float


class AccuracyRun(Document):
    """All items as one served model answered them."""

    schema_version: int = 1
    label: str
    subject: str
    model: str
    items_digest: str
    sampling: Sampling
    results: tuple[ItemResult, ...]
    overall: Share
    by_task: tuple[Share, ...]
    by_language: tuple[Share, ...]
    truncated: int
    """Answers cut off at `max_tokens`."""
    unmarked: int
    """Answers without an answer marker."""
    seconds: float
    """Sum of the requests' own times."""


def measure_accuracy(
    target: Target,
    items: Sequence[Item],
    *,
    concurrency: int = 8,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> AccuracyRun:
    """Ask every item and score the answers; answers already in the target's cache are not asked for again.

    Raises:
        MeasurementError, ServerUnreachable: see `Endpoint.complete`.
    """
    if not items:
        raise MeasurementError("no items to measure accuracy on")
    refuse_rubrics(item.kind for item in items)
    sampling = sampling or Sampling()
    completions = target.ask([i.request for i in items], sampling, concurrency=concurrency, progress=progress)
    results = []
    for item, completion in zip(items, completions, strict=True):
        extracted, correct = score(item.kind, item.answer, completion.text, item.scoring)
        results.append(
            ItemResult(
                id=item.id,
                task=item.task,
                language=item.language,
                question=item.messages[-1].content,
                expected=normalise(item.answer),
                extracted=extracted,
                correct=correct,
                text=completion.text,
                finish_reason=completion.finish_reason,
                prompt_tokens=completion.prompt_tokens,
                completion_tokens=completion.completion_tokens,
                safety=item.meta.get("safety") is True,
            )
        )
    seconds = sum(c.seconds for c in completions)
    return accuracy_of(target, results, items_digest(items), sampling, seconds)


def accuracy_of(
    target: Target, results: Sequence[ItemResult], digest: str, sampling: Sampling, seconds: float
) -> AccuracyRun:
    """The run that scored items make.

    Args:
        digest: of the items in their order; two runs pair only if these agree.
        seconds: sum of the requests' own times.
    """
    return AccuracyRun(
        label=target.label,
        subject=target.subject,
        model=target.model,
        items_digest=digest,
        sampling=sampling,
        results=tuple(results),
        overall=share_of("all", results),
        by_task=_shares(results, lambda r: r.task),
        by_language=_shares(results, lambda r: r.language),
        truncated=sum(r.finish_reason == "length" for r in results),
        unmarked=sum(r.extracted is None for r in results),
        seconds=seconds,
    )


def share_of(name: str, results: Sequence[ItemResult]) -> Share:
    """The share of right answers among `results` and what always giving the commonest answer would score.

    The baseline gives each task, in each language, its own commonest answer.
    """
    n, correct = len(results), sum(r.correct for r in results)
    low, high = wilson(correct, n)
    answers: dict[tuple[str, str], Counter[str]] = {}
    for r in results:
        answers.setdefault((r.task, r.language), Counter())[r.expected] += 1
    # Ties go to the answer that sorts first, so that the same items give the same report.
    best = {kind: min(c.items(), key=lambda kv: (-kv[1], kv[0])) for kind, c in answers.items()}
    return Share(
        name=name,
        n=n,
        correct=correct,
        accuracy=correct / n,
        low=low,
        high=high,
        majority_answer=" / ".join(dict.fromkeys(a for a, _ in best.values()))
        if len({task for task, _ in best}) == 1
        else "(per task and language)",
        majority_share=sum(count for _, count in best.values()) / n,
    )


def _shares(results: Sequence[ItemResult], key: Callable[[ItemResult], str]) -> tuple[Share, ...]:
    groups: dict[str, list[ItemResult]] = {}
    for r in results:
        groups.setdefault(key(r), []).append(r)
    return tuple(share_of(name, groups[name]) for name in sorted(groups))
