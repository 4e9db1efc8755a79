"""Is a judge fit to grade? Its judgements against physicians' labels, by a bound named beforehand.

As upstream's meta-evaluation computes it (`compute_metrics_for_rater_by_class` of healthbench_meta_eval.py in
openai/simple-evals): the judge is compared with each physician's label in turn; precision, recall and F1 are
taken for "met" and for "not met", and balanced F1 is the mean of the two F1; overall and by category, which
is a criterion. Where a class has no label or no judgement, its F1 is not defined, nor is the balanced one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from validation.document import Document
from validation.endpoint import Message, Progress
from validation.healthbench.grading import Judge, JudgeRecord, Question
from validation.healthbench.rows import MetaRow, MetaRows

MIN_BALANCED_F1 = 0.7
"""Bound on overall balanced F1 if the user names none."""
MAX_UNGRADED = 0.01
"""Share of criteria that may be left without a judgement before a result stops to count."""


class Agreement(Document):
    """A rater against the labels of others, over pairs of one judgement and one label."""

    name: str
    pairs: int
    true_met: int
    false_met: int
    """The rater says met, the label does not."""
    false_unmet: int
    true_unmet: int
    f1_met: float | None
    f1_unmet: float | None
    balanced_f1: float | None


class Qualification(Document):
    """A judge on a meta-evaluation."""

    judge: JudgeRecord
    data: str
    data_digest: str
    rows: int
    not_graded: int
    overall: Agreement
    by_category: tuple[Agreement, ...]
    physicians: Agreement
    """Each physician's labels against those of the others on the same row."""
    min_balanced_f1: float
    min_category_f1: float | None
    max_ungraded: float
    qualified: bool
    reasons: tuple[str, ...]
    """Why it is not."""


def agreement(name: str, pairs: Iterable[tuple[bool, bool]]) -> Agreement:
    """Agreement over (rater, label) pairs."""
    counts = Counter(pairs)
    tp, fp = counts[True, True], counts[True, False]
    fn, tn = counts[False, True], counts[False, False]
    met, unmet = _f1(tp, fp, fn), _f1(tn, fn, fp)
    return Agreement(
        name=name,
        pairs=tp + fp + fn + tn,
        true_met=tp,
        false_met=fp,
        false_unmet=fn,
        true_unmet=tn,
        f1_met=met,
        f1_unmet=unmet,
        balanced_f1=None if met is None or unmet is None else (met + unmet) / 2,
    )


def _f1(hits: int, false: int, missed: int) -> float | None:
    """F1 of one class; None unless it is both judged and labelled at least once, as upstream has it."""
    if hits + false == 0 or hits + missed == 0:
        return None
    return 2 * hits / (2 * hits + false + missed)


def judge_agreement(
    rows: Sequence[MetaRow], met: Sequence[bool | None]
) -> tuple[Agreement, tuple[Agreement, ...]]:
    """A judge's agreement with physicians, overall and by category; rows not graded are left out."""
    pairs: list[tuple[bool, bool]] = []
    by_category: dict[str, list[tuple[bool, bool]]] = {row.category: [] for row in rows}
    for row, said in zip(rows, met, strict=True):
        if said is not None:
            found = [(said, label) for label in row.binary_labels]
            pairs += found
            by_category[row.category] += found
    return agreement("all", pairs), tuple(agreement(k, by_category[k]) for k in sorted(by_category))


def physician_agreement(rows: Sequence[MetaRow]) -> Agreement:
    """Physicians against one another: each label against each other label of its row."""
    return agreement(
        "physicians",
        (
            (one, other)
            for row in rows
            for k, one in enumerate(row.binary_labels)
            for m, other in enumerate(row.binary_labels)
            if k != m
        ),
    )


def qualify(
    judge: Judge,
    meta: MetaRows,
    *,
    min_balanced_f1: float = MIN_BALANCED_F1,
    min_category_f1: float | None = None,
    max_ungraded: float = MAX_UNGRADED,
    progress: Progress | None = None,
) -> Qualification:
    """Let a judge grade the meta-evaluation and say whether its scores may count.

    Args:
        min_balanced_f1: bound on the overall balanced F1.
        min_category_f1: bound on each category whose balanced F1 is defined; None: not bounded.
        max_ungraded: share of rows that may be left without a judgement.

    Raises:
        MeasurementError: see `Judge.grade`.
    """
    questions = [
        Question((*row.prompt, Message(role="assistant", content=row.completion)), row.rubric)
        for row in meta.rows
    ]
    met = [found.met for found in judge.grade(questions, progress)]
    overall, by_category = judge_agreement(meta.rows, met)
    missing = sum(m is None for m in met)
    reasons = []
    if missing > max_ungraded * len(met):
        reasons.append(f"{missing} of {len(met)} rows are not graded, more than {max_ungraded:.1%}")
    if overall.balanced_f1 is None:
        reasons.append("balanced F1 is not defined: one class is never judged or never labelled")
    elif overall.balanced_f1 < min_balanced_f1:
        reasons.append(f"balanced F1 {overall.balanced_f1:.3f} is below {min_balanced_f1:g}")
    if min_category_f1 is not None:
        reasons += [
            f"balanced F1 of {c.name} {c.balanced_f1:.3f} is below {min_category_f1:g}"
            for c in by_category
            if c.balanced_f1 is not None and c.balanced_f1 < min_category_f1
        ]
    return Qualification(
        judge=judge.record,
        data=meta.name,
        data_digest=meta.digest,
        rows=len(met),
        not_graded=missing,
        overall=overall,
        by_category=by_category,
        physicians=physician_agreement(meta.rows),
        min_balanced_f1=min_balanced_f1,
        min_category_f1=min_category_f1,
        max_ungraded=max_ungraded,
        qualified=not reasons,
        reasons=tuple(reasons),
    )
