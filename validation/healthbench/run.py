"""A model on a rubric benchmark: its answers, a judgement for each criterion, scores, whether they count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from validation.document import Document
from validation.endpoint import Message, Progress, Sampling, Target
from validation.errors import MeasurementError
from validation.gates import Gate, at_least, at_most
from validation.healthbench.grading import Judge, Judgement, JudgeRecord, Question
from validation.healthbench.qualification import MAX_UNGRADED, Qualification
from validation.healthbench.rows import Example, RubricItem, Rubrics
from validation.healthbench.scoring import (
    Harm,
    Score,
    Why,
    example_score,
    harm_of,
    score_bounds,
    score_of,
    tag_scores,
)
from validation.statistics import mcnemar_exact
from validation.tasks.scores import Score as ItemScore
from validation.tasks.scores import ScoreComparison, compare_scores

ANSWERS = Sampling(max_tokens=2048, top_logprobs=None)
"""Greedy, so that two models differ by their weights alone."""


class Graded(Document):
    """A criterion and what the judge said of it."""

    item: RubricItem
    judgement: Judgement


class ExampleResult(Document):
    """One conversation as one model answered it and one judge graded it."""

    prompt_id: str
    example_tags: tuple[str, ...]
    question: str
    """Content of the last turn before the answer."""
    text: str
    finish_reason: str
    graded: tuple[Graded, ...]
    score: float | None
    """Unclipped; None: left out of the mean."""
    why: Why

    @property
    def items(self) -> tuple[RubricItem, ...]:
        """The criteria."""
        return tuple(g.item for g in self.graded)

    @property
    def met(self) -> tuple[bool | None, ...]:
        """The judgements."""
        return tuple(g.judgement.met for g in self.graded)


class RubricRun(Document):
    """A served model on a rubric benchmark, by one judge."""

    schema_version: int = 1
    benchmark: str
    data_digest: str
    label: str
    subject: str
    model: str
    sampling: Sampling
    judge: JudgeRecord
    qualification: Qualification | None
    """None: the judge was not put to a test, and the score does not count."""
    max_ungraded: float
    results: tuple[ExampleResult, ...]
    overall: Score
    lowest: float | None
    highest: float | None
    """What the mean (clipped) would be with every criterion not graded at its worst and at its best, over all
    examples with positive points."""
    by_example_tag: tuple[Score, ...]
    """Themes, and what other tags examples bear."""
    by_item_tag: tuple[Score, ...]
    """Axes, levels, and what other tags criteria bear."""
    harm: Harm
    criteria: int
    not_graded: int
    without_score: dict[str, int]
    """Examples left out of the score, by why."""
    truncated: int
    """Answers cut off at `max_tokens`."""
    counts: bool
    """Whether the score may be used. Gates read "not measured" where it may not."""
    reasons: tuple[str, ...]
    """Why it may not."""


class HarmFlip(Document):
    """A criterion with negative points that only one of two models meets."""

    prompt_id: str
    direction: Literal["new harm", "harm gone"]
    """From the reference to the candidate."""
    criterion: str
    points: float
    question: str
    reference_text: str
    candidate_text: str
    explanation: str
    """The judge's, where the criterion is met."""


class RubricComparison(Document):
    """A candidate against a reference on the same conversations, by the same judge."""

    schema_version: int = 1
    benchmark: str
    reference: str
    candidate: str
    reference_subject: str
    candidate_subject: str
    scores: ScoreComparison
    """Paired over the conversations that have a score in both runs, and by theme; unclipped scores."""
    new_harm: int
    harm_gone: int
    harm_p_value: float
    """Exact McNemar over the criteria with negative points, two-sided."""
    harm_flips: tuple[HarmFlip, ...]
    counts: bool
    reasons: tuple[str, ...]


def measure_rubrics(
    target: Target,
    judge: Judge,
    rubrics: Rubrics,
    *,
    qualification: Qualification | None,
    sampling: Sampling | None = None,
    concurrency: int = 8,
    timeout_s: float = 600.0,
    max_ungraded: float = MAX_UNGRADED,
    progress: Progress | None = None,
) -> RubricRun:
    """Ask the model, grade each criterion, score; what was answered or judged before is not asked again.

    Raises:
        MeasurementError, ServerUnreachable: the model does not answer (`Endpoint.complete`), the judge
            refuses (`Judge.grade`), or the qualification is another judge's.
    """
    if qualification is not None and qualification.judge != judge.record:
        raise MeasurementError(
            f"the qualification is of {qualification.judge.name} as asked then, not of "
            f"{judge.record.name} as asked now",
            "Qualify the judge that grades, with the settings it grades with.",
        )
    sampling = sampling or ANSWERS
    answers = target.ask(
        [e.request for e in rubrics.examples],
        sampling,
        concurrency=concurrency,
        timeout_s=timeout_s,
        progress=progress,
    )
    pairs = list(zip(rubrics.examples, answers, strict=True))
    questions = [
        Question((*example.prompt, Message(role="assistant", content=answer.text)), item.text)
        for example, answer in pairs
        for item in example.rubrics
    ]
    said = iter(judge.grade(questions, progress))
    results = []
    for example, answer in pairs:
        graded = tuple(Graded(item=item, judgement=next(said)) for item in example.rubrics)
        results.append(_result(example, answer.text, answer.finish_reason, graded))
    return summarise(
        results,
        rubrics=rubrics,
        target=target,
        sampling=sampling,
        judge=judge.record,
        qualification=qualification,
        max_ungraded=max_ungraded,
    )


def _result(example: Example, text: str, finish_reason: str, graded: tuple[Graded, ...]) -> ExampleResult:
    score, why = example_score([g.item for g in graded], [g.judgement.met for g in graded])
    return ExampleResult(
        prompt_id=example.prompt_id,
        example_tags=example.example_tags,
        question=example.prompt[-1].content,
        text=text,
        finish_reason=finish_reason,
        graded=graded,
        score=score,
        why=why,
    )


def summarise(
    results: Sequence[ExampleResult],
    *,
    rubrics: Rubrics,
    target: Target,
    sampling: Sampling,
    judge: JudgeRecord,
    qualification: Qualification | None,
    max_ungraded: float,
) -> RubricRun:
    """The scores that follow from graded examples, and whether they count."""
    scored = [(r, r.score) for r in results if r.score is not None]
    by_example: dict[str, list[float]] = {}
    by_item: dict[str, list[float]] = {}
    for r, score in scored:
        for tag in r.example_tags:
            by_example.setdefault(tag, []).append(score)
        for tag, value in tag_scores(r.items, r.met).items():
            by_item.setdefault(tag, []).append(value)
    bounds = [b for b in (score_bounds(r.items, r.met) for r in results) if b is not None]
    criteria = sum(len(r.graded) for r in results)
    not_graded = sum(m is None for r in results for m in r.met)
    reasons = []
    if qualification is None:
        reasons.append("the judge was not qualified on a meta-evaluation")
    elif not qualification.qualified:
        reasons += [f"the judge is not qualified: {reason}" for reason in qualification.reasons]
    if not_graded > max_ungraded * criteria:
        reasons.append(f"{not_graded} of {criteria} criteria are not graded, more than {max_ungraded:.1%}")
    if not scored:
        reasons.append("no example has a score")
    return RubricRun(
        benchmark=rubrics.name,
        data_digest=rubrics.digest,
        label=target.label,
        subject=target.subject,
        model=target.model,
        sampling=sampling,
        judge=judge,
        qualification=qualification,
        max_ungraded=max_ungraded,
        results=tuple(results),
        overall=score_of("all", [score for _, score in scored]),
        lowest=score_of("lowest", [low for low, _ in bounds]).score,
        highest=score_of("highest", [high for _, high in bounds]).score,
        by_example_tag=_scores(by_example),
        by_item_tag=_scores(by_item),
        harm=harm_of((r.items, r.met) for r in results),
        criteria=criteria,
        not_graded=not_graded,
        without_score=dict(sorted(Counter(r.why for r in results if r.why).items())),
        truncated=sum(r.finish_reason == "length" for r in results),
        counts=not reasons,
        reasons=tuple(reasons),
    )


def _scores(groups: dict[str, list[float]]) -> tuple[Score, ...]:
    return tuple(score_of(name, groups[name]) for name in sorted(groups))


def compare_rubrics(
    reference: RubricRun,
    candidate: RubricRun,
    *,
    margin_points: float,
    confidence: float = 0.95,
    seed: int = 0,
) -> RubricComparison:
    """Two models on the same conversations against a loss margin in points of 100.

    Scores are not clipped: clipping the mean would hide a loss below zero, and is the same for every mean
    within [0, 1].

    Raises:
        MeasurementError: other data, another judge, other sampling, or fewer than two conversations scored
            in both.
    """
    for what, one, other in (
        ("data", reference.data_digest, candidate.data_digest),
        ("judges", reference.judge, candidate.judge),
        ("sampling", reference.sampling, candidate.sampling),
    ):
        if one != other:
            raise MeasurementError(
                f"{reference.label} and {candidate.label} differ in {what}; their scores do not pair"
            )
    both = list(zip(reference.results, candidate.results, strict=True))
    scored = [(a, a.score, b.score) for a, b in both if a.score is not None and b.score is not None]
    themes = _themes([a for a, _, _ in scored])
    before, after = (
        [
            ItemScore(id=a.prompt_id, task=theme, conversation=a.prompt_id, score=pair[which])
            for (a, *pair), theme in zip(scored, themes, strict=True)
        ]
        for which in (0, 1)
    )
    flips = tuple(_harm_flips(both))
    new = sum(f.direction == "new harm" for f in flips)
    return RubricComparison(
        benchmark=reference.benchmark,
        reference=reference.label,
        candidate=candidate.label,
        reference_subject=reference.subject,
        candidate_subject=candidate.subject,
        scores=compare_scores(
            before,
            after,
            labels=(reference.label, candidate.label),
            margin_points=margin_points,
            confidence=confidence,
            span=max((_span(a) for a, _, _ in scored), default=1.0),
            seed=seed,
        ),
        new_harm=new,
        harm_gone=len(flips) - new,
        harm_p_value=mcnemar_exact(len(flips) - new, new),
        harm_flips=flips,
        counts=reference.counts and candidate.counts,
        reasons=tuple(f"{run.label}: {why}" for run in (reference, candidate) for why in run.reasons),
    )


def _span(result: ExampleResult) -> float:
    """From the lowest score of an example, all that harms and nothing else, to the highest, 1."""
    points = [graded.item.points for graded in result.graded]
    return 1.0 - sum(p for p in points if p < 0) / sum(p for p in points if p > 0)


def _themes(results: Sequence[ExampleResult]) -> list[str]:
    """The theme of each example; all the same if a theme has one example alone, of which nothing follows."""
    themes = [next((t for t in r.example_tags if t.startswith("theme:")), "no theme") for r in results]
    return themes if min(Counter(themes).values(), default=0) > 1 else ["all themes"] * len(themes)


def _harm_flips(both: Iterable[tuple[ExampleResult, ExampleResult]]) -> Iterable[HarmFlip]:
    for a, b in both:
        for before, after in zip(a.graded, b.graded, strict=True):
            one, other = before.judgement.met, after.judgement.met
            if before.item.points < 0 and None not in (one, other) and one != other:
                yield HarmFlip(
                    prompt_id=a.prompt_id,
                    direction="new harm" if other else "harm gone",
                    criterion=before.item.criterion,
                    points=before.item.points,
                    question=a.question,
                    reference_text=a.text,
                    candidate_text=b.text,
                    explanation=(after if other else before).judgement.explanation,
                )


def rubric_gates(
    run: RubricRun,
    comparison: RubricComparison | None = None,
    *,
    min_score: float | None = None,
    max_loss_points: float | None = None,
    max_new_harm: int | None = None,
) -> tuple[Gate, ...]:
    """Score, loss and new harm against their bounds; not measured where the score does not count."""
    gates = [
        at_least(
            f"{run.benchmark}: score of {run.label}",
            run.overall.score if run.counts else None,
            min_score,
            note="; ".join(run.reasons),
        )
    ]
    if comparison is not None:
        counts, why = comparison.counts, "; ".join(comparison.reasons)
        overall = comparison.scores.overall
        interval = f"interval {overall.low_points:+.1f} to {overall.high_points:+.1f}"
        gates += [
            at_most(
                f"{run.benchmark}: loss of {comparison.candidate} against {comparison.reference}",
                0.0 - overall.difference_points if counts else None,
                max_loss_points,
                "points",
                why or f"{interval}; {overall.verdict}",
            ),
            at_most(
                f"{run.benchmark}: harm criteria newly met by {comparison.candidate}",
                comparison.new_harm if counts else None,
                max_new_harm,
                note=why,
            ),
        ]
    return tuple(gates)
