"""The verdict on accuracy: rules named beforehand, what each would do by chance, and the panel that says so.

Three rules, by what a failure means:

    non-inferior      passes only if a loss beyond the margin is ruled out: the whole interval lies above it.
                      A model that lost the margin passes with at most 2.5 %; too few items fail a good one.
    not inferior      fails only if a loss beyond the margin is shown: the whole interval lies below it. An
                      unchanged model practically never fails; too few items pass a bad one.
    no loss shown     fails if any loss at all is shown by the exact one-sided test at 2.5 %. An unchanged
                      model fails with at most 2.5 %; more items find smaller losses.

Both chances of each rule, at the number of items and the discordance of a run, are computed exactly and stand
in the report beside the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from validation.gates import Gate, at_least
from validation.panel import Column, Panel, Table
from validation.statistics import chance_to_pass, loss_p, normal_quantile, paired_score
from validation.tasks.comparison import AccuracyComparison, Paired

Rule = Literal["non-inferior", "not inferior", "no loss shown"]


def passes(rule: Rule, lost: int, gained: int, n: int, margin: float, confidence: float = 0.95) -> bool:
    """Whether a rule passes so many discordant pairs among n; `margin` is a proportion.

    By the score test, which holds exactly where the interval's end lies on the same side of the margin.
    """
    if rule == "no loss shown":
        return loss_p(lost, gained) > (1 - confidence) / 2
    z = normal_quantile(confidence)
    score = paired_score(lost, gained, n, -margin)
    return score > z if rule == "non-inferior" else score >= -z


def rule_passes_with(
    rule: Rule, n: int, discordance: float, loss: float, margin: float, confidence: float = 0.95
) -> float:
    """Probability that a rule passes a model whose true loss is `loss` (proportions throughout)."""
    return chance_to_pass(
        n, discordance, loss, lambda lost, gained: passes(rule, lost, gained, n, margin, confidence)
    )


def verdict_gate(rule: Rule | None, paired: Paired, name: str) -> Gate:
    """The gate of a rule on a paired comparison; without a rule the figure is reported only.

    An inconclusive comparison says with how many items it would be decided.
    """
    said: str = paired.verdict
    if paired.verdict == "inconclusive":
        said += (
            "; no number of items would decide at this difference"
            if paired.n_to_decide is None
            else f"; about {paired.n_to_decide:,} items would decide"
        )
    interval = f"interval {paired.low_points:+.1f} to {paired.high_points:+.1f} points; {said}"
    if rule == "no loss shown":
        p = loss_p(paired.only_reference, paired.only_candidate)
        return at_least(f"{name}: no loss shown, p", p, (1 - paired.confidence) / 2, "", interval)
    if rule == "not inferior":
        figure, end = paired.high_points, "best that the interval allows"
    else:
        figure, end = paired.low_points, "worst that the interval allows"
    bound = None if rule is None else -paired.margin_points
    return at_least(f"{name}: {rule or 'verdict'}, {end}", figure, bound, "points", interval)


def verdict_gates(
    rule: Rule | None, comparisons: Sequence[AccuracyComparison], tasks: Sequence[str] = ()
) -> tuple[Gate, ...]:
    """A gate for each comparison over all items, and for each of the named tasks of the last one.

    Args:
        rule: named beforehand; None: reported only.
        comparisons: candidates against the reference; the last is what is served in the end.
        tasks: those with a margin of their own.
    """
    gates = [
        verdict_gate(rule, each.overall, f"accuracy of {each.candidate} against {each.reference}")
        for each in comparisons
    ]
    if comparisons:
        last = comparisons[-1]
        gates += [
            verdict_gate(rule, row, f"accuracy of {last.candidate} on {row.scope}")
            for row in last.by_task
            if row.scope in tasks
        ]
    return tuple(gates)


def verdict_panel(comparisons: Sequence[AccuracyComparison], rule: Rule | None = None) -> Panel:
    """Verdicts by task, what each could have shown, and how often the rules pass by chance.

    Raises:
        ValueError: nothing was compared.
    """
    if not comparisons:
        raise ValueError("no comparison to give a verdict on")
    tables = [
        Table(
            caption=f"{each.candidate} against {each.reference}",
            columns=(
                Column(name="Task", kind="text"),
                Column(name="Items", digits=0),
                Column(name="Difference", unit="points", digits=2),
                Column(name="Low", unit="points", digits=2),
                Column(name="High", unit="points", digits=2),
                Column(name="Lost", digits=0),
                Column(name="Gained", digits=0),
                Column(name="p", digits=4),
                Column(name="p, Holm", digits=4),
                Column(name="Margin", unit="points", digits=1),
                Column(name="Detectable loss", unit="points", digits=2),
                Column(name="Verdict", kind="text"),
                Column(name="Items to decide", digits=0),
            ),
            rows=tuple(
                (
                    "All" if row is each.overall else row.scope,
                    row.n,
                    row.difference_points,
                    row.low_points,
                    row.high_points,
                    row.only_reference,
                    row.only_candidate,
                    row.p_value,
                    row.p_holm,
                    row.margin_points,
                    row.detectable_points,
                    row.verdict,
                    row.n_to_decide,
                )
                for row in (each.overall, *each.by_task)
            ),
        )
        for each in comparisons
    ]
    last = comparisons[-1]
    return Panel(
        key="verdicts",
        title="Verdicts",
        summary="; ".join(_sentence(each) for each in comparisons) + ".",
        tables=(*tables, _chances(last.overall)),
        notes=(
            "p: exact McNemar test, two-sided. p, Holm: adjusted over the tasks of the table. Low and high: "
            "Tango's 95 % interval of the difference.",
            "Detectable loss: what so many items find with 80 % power by a one-sided 5 % test at the "
            "discordance observed. Items to decide: with which an inconclusive verdict would fall, if "
            "difference and discordance stayed as they are.",
            "A task is called inferior only where that survives Holm's adjustment over the tasks.",
            f"The rule of this gate: {rule}." if rule else "No rule was named for these verdicts: reported.",
        ),
        subjects=tuple(
            dict.fromkeys(s for each in comparisons for s in (each.reference_subject, each.candidate_subject))
        ),
    )


def _sentence(comparison: AccuracyComparison) -> str:
    row = comparison.overall
    needed = f" (about {row.n_to_decide:,} items would decide)" if row.n_to_decide else ""
    worse = [t.scope for t in comparison.by_task if t.verdict == "inferior"]
    tasks = f", inferior on {', '.join(worse)}" if worse else ""
    return (
        f"{comparison.candidate} is {row.verdict} at a margin of {row.margin_points:g} points{needed}{tasks}"
    )


def _chances(row: Paired) -> Table:
    """How often each rule passes, at this run's items and discordance (at least one pair in n)."""
    discordance = max(1, row.only_reference + row.only_candidate) / row.n
    losses = tuple(dict.fromkeys((0.0, 0.01, row.margin)))
    rules: tuple[Rule, ...] = ("non-inferior", "not inferior", "no loss shown")
    return Table(
        caption=f"Chance that a rule passes {row.n:,} items at {100 * discordance:.1f} % discordance, margin "
        f"{row.margin_points:g} points",
        columns=(
            Column(name="Rule", kind="text"),
            *(
                Column(
                    name="Unchanged model" if loss == 0 else f"True loss of {100 * loss:g} points",
                    unit="%",
                    digits=1,
                )
                for loss in losses
            ),
        ),
        rows=tuple(
            (
                rule,
                *(
                    100 * rule_passes_with(rule, row.n, discordance, loss, row.margin, row.confidence)
                    for loss in losses
                ),
            )
            for rule in rules
        ),
    )
