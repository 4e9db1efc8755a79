"""HealthBench and other rubrics as a report shows them."""

from __future__ import annotations

from collections.abc import Sequence

from validation.endpoint import Sampling
from validation.healthbench.qualification import Qualification
from validation.healthbench.run import RubricComparison, RubricRun
from validation.healthbench.scoring import Score
from validation.healthbench.swap import JudgeSwap
from validation.panel import Column, Panel, Table, Unfolding
from validation.tasks.scores import score_table

LONGEST_LIST = 40
"""Lines that unfold at most; the run's own JSON has all of them."""


def rubric_panel(
    runs: Sequence[RubricRun],
    comparisons: Sequence[RubricComparison] = (),
    swap: JudgeSwap | None = None,
    *,
    key: str = "rubrics",
) -> Panel:
    """What models score on one benchmark by one judge, the judge's qualification, and harm apart.

    Args:
        runs: of the same benchmark; the first is the reference.
    """
    first = runs[0]
    tables = [_scores(runs), _harm(runs)]
    if comparisons:
        tables += [*(score_table(c.scores) for c in comparisons), _new_harm(comparisons)]
    for caption, groups in (
        ("Score by theme and other tags of conversations", [run.by_example_tag for run in runs]),
        ("Score by axis and other tags of criteria", [run.by_item_tag for run in runs]),
    ):
        if any(groups):
            tables.append(_by_tag(caption, runs, groups))
    if first.qualification is not None:
        tables.append(_qualification(first.qualification))
    if swap is not None:
        tables.append(_swap(swap))
    return Panel(
        key=key,
        title=first.benchmark,
        summary=_summary(runs, comparisons),
        tables=tuple(tables),
        unfoldings=_unfoldings(runs, comparisons),
        notes=(
            "A conversation scores the points of the criteria it meets over the sum of the positive points; "
            "the mean is clipped to 0 to 1. A conversation with a criterion that was not graded, or without "
            "positive points, is left out of the score and counted.",
        ),
        conditions=_conditions(first),
        subjects=tuple(dict.fromkeys(run.subject for run in runs)),
    )


def _summary(runs: Sequence[RubricRun], comparisons: Sequence[RubricComparison]) -> str:
    parts = []
    for run in runs:
        said = "no score" if run.overall.score is None else f"{100 * run.overall.score:.1f} of 100"
        parts.append(f"{run.label} {said}")
    text = "; ".join(parts) + "."
    for c in comparisons:
        paired = c.scores.overall
        text += (
            f" {c.candidate} against {c.reference}: {paired.difference_points:+.1f} points, "
            f"{100 * paired.confidence:g} % interval {paired.low_points:+.1f} to {paired.high_points:+.1f}, "
            f"{paired.verdict} at a margin of {paired.margin_points:g}; {c.new_harm} harm criteria newly met."
        )
    reasons = dict.fromkeys(reason for run in runs for reason in run.reasons)
    if reasons:
        text = f"These scores do not count: {'; '.join(reasons)}. {text}"
    return text


def _conditions(run: RubricRun) -> tuple[tuple[str, str], ...]:
    judge, found = run.judge, run.qualification
    rows = [
        ("Rows", f"{run.benchmark}, {len(run.results)} conversations, {run.data_digest}"),
        ("Answers", _sampling(run.sampling)),
        ("Judge", f"{judge.name}: {judge.model} ({judge.subject})"),
        ("Judge's sampling", f"{_sampling(judge.sampling)}; {judge.rounds} rounds at most"),
        ("Grader prompt", judge.prompt_digest),
    ]
    if found is not None:
        rows.append(("Meta-evaluation", f"{found.data}, {found.rows} rows, {found.data_digest}"))
    return tuple(rows)


def _sampling(sampling: Sampling) -> str:
    return (
        f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, seed {sampling.seed}, "
        f"{sampling.max_tokens} tokens at most"
    )


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _number(name: str, digits: int = 1, unit: str = "") -> Column:
    return Column(name=name, digits=digits, unit=unit)


def _scores(runs: Sequence[RubricRun]) -> Table:
    columns = (
        Column(name="model", kind="text"),
        _number("conversations", 0),
        _number("score"),
        _number("bootstrap std"),
        _number("lowest possible"),
        _number("highest possible"),
        _number("criteria", 0),
        _number("not graded", 0),
        _number("left out: not graded", 0),
        _number("left out: no positive points", 0),
        _number("cut off", 0),
        Column(name="counts", kind="text"),
    )
    return Table(
        caption="Score, of 100",
        brief=True,
        columns=columns,
        rows=tuple(
            (
                run.label,
                run.overall.n,
                _points(run.overall.score),
                _points(run.overall.bootstrap_std),
                _points(run.lowest),
                _points(run.highest),
                run.criteria,
                run.not_graded,
                run.without_score.get("not graded", 0),
                run.without_score.get("no positive points", 0),
                run.truncated,
                "yes" if run.counts else "no",
            )
            for run in runs
        ),
    )


def _harm(runs: Sequence[RubricRun]) -> Table:
    columns = (
        Column(name="model", kind="text"),
        _number("criteria", 0),
        _number("met", 0),
        _number("not graded", 0),
        _number("points lost", 0),
        _number("of possible", 0),
        _number("conversations with harm", 0),
    )
    return Table(
        caption="Harm: criteria with negative points",
        brief=True,
        columns=columns,
        rows=tuple(
            (
                run.label,
                run.harm.criteria,
                run.harm.met,
                run.harm.not_graded,
                run.harm.points_lost,
                run.harm.points_possible,
                run.harm.examples_with_harm,
            )
            for run in runs
        ),
    )


def _new_harm(comparisons: Sequence[RubricComparison]) -> Table:
    columns = (
        Column(name="comparison", kind="text"),
        _number("new harm", 0),
        _number("harm gone", 0),
        _number("p, exact", 3),
    )
    return Table(
        caption="Harm criteria that only one of two models meets",
        columns=columns,
        rows=tuple(
            (f"{c.candidate} against {c.reference}", c.new_harm, c.harm_gone, c.harm_p_value)
            for c in comparisons
        ),
    )


def _by_tag(caption: str, runs: Sequence[RubricRun], groups: Sequence[Sequence[Score]]) -> Table:
    columns = [Column(name="tag", kind="text"), _number("conversations", 0)]
    for run in runs:
        columns += [_number(f"{run.label}"), _number(f"{run.label} std")]
    found = [{score.name: score for score in group} for group in groups]
    rows = []
    for name in sorted({name for group in found for name in group}):
        scores = [group.get(name) for group in found]
        cells = [
            value
            for s in scores
            for value in ((None, None) if s is None else (_points(s.score), _points(s.bootstrap_std)))
        ]
        rows.append((name, max(s.n for s in scores if s is not None), *cells))
    return Table(caption=caption, columns=tuple(columns), rows=tuple(rows))


def _qualification(found: Qualification) -> Table:
    columns = (
        Column(name="category", kind="text"),
        _number("pairs", 0),
        _number("F1 met", 3),
        _number("F1 not met", 3),
        _number("balanced F1", 3),
    )
    lines = (found.overall, *found.by_category, found.physicians)
    outcome = "qualified" if found.qualified else f"not qualified: {'; '.join(found.reasons)}"
    return Table(
        caption=f"The judge against physicians' labels ({found.data}, {found.rows} rows, {found.not_graded} "
        f"not graded): {outcome}; bound {found.min_balanced_f1:g}, named beforehand",
        columns=columns,
        rows=tuple((a.name, a.pairs, a.f1_met, a.f1_unmet, a.balanced_f1) for a in lines),
    )


def _swap(swap: JudgeSwap) -> Table:
    columns = (
        Column(name="criteria", kind="text"),
        _number("both graded", 0),
        _number("agreement", unit="%"),
        _number("kappa", 3),
        _number("only first met", 0),
        _number("only second met", 0),
    )
    change = "no example has a score of both"
    if swap.difference_points is not None and swap.low_points is not None and swap.high_points is not None:
        change = (
            f"score by the second {swap.difference_points:+.1f} points "
            f"({swap.low_points:+.1f} to {swap.high_points:+.1f})"
        )
    return Table(
        caption=f"Judge swap on the answers of {swap.label}: {swap.first}, then {swap.second}; {change}",
        columns=columns,
        rows=tuple(
            (k.scope, k.n, _points(k.agreement), k.kappa, k.only_first, k.only_second)
            for k in (swap.overall, swap.positive, swap.negative)
        ),
    )


def _unfoldings(runs: Sequence[RubricRun], comparisons: Sequence[RubricComparison]) -> tuple[Unfolding, ...]:
    lines = [
        Unfolding(
            line=f"{flip.direction}: {flip.criterion} ({flip.points:g}), {flip.prompt_id}",
            text=(
                ("Question", flip.question),
                (comparison.reference, flip.reference_text),
                (comparison.candidate, flip.candidate_text),
                ("Judge", flip.explanation),
            ),
        )
        for comparison in comparisons
        for flip in comparison.harm_flips
    ]
    lines += [
        Unfolding(
            line=f"not graded: {graded.item.criterion} ({run.label}, {result.prompt_id})",
            text=(("Why", graded.judgement.fault), ("Answer", result.text)),
        )
        for run in runs
        for result in run.results
        for graded in result.graded
        if graded.judgement.met is None
    ]
    return tuple(lines[:LONGEST_LIST])
