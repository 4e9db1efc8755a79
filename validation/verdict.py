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

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from validation.gates import Gate, at_least
from validation.panel import Column, Panel, Table
from validation.statistics import (
    beyond_margin_p,
    chance_to_pass,
    holm,
    loss_p,
    normal_quantile,
    paired_score,
)
from validation.tasks.comparison import AccuracyComparison, Paired

Rule = Literal["non-inferior", "not inferior", "no loss shown"]
RULES: tuple[Rule, ...] = get_args(Rule)


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


def verdict_gates(
    rule: Rule | None, comparison: AccuracyComparison, tasks: Collection[str] = ()
) -> tuple[Gate, ...]:
    """A gate over all items, and one for each of the named tasks.

    Rules that fail on what is shown gate on p-values adjusted by Holm over these gates, so that all together
    fail an unchanged model with at most 2.5 %. Ruling a loss out needs no adjustment: all must hold.

    Args:
        rule: named beforehand; None: the intervals are reported, not gated.
        comparison: of the candidate with the reference.
        tasks: those with a margin of their own.
    """
    rows = [(f"accuracy of {comparison.candidate} against {comparison.reference}", comparison.overall)]
    for row in comparison.by_task:
        if row.scope in tasks:
            rows.append((f"accuracy of {comparison.candidate} on {row.scope}", row))
    if rule == "no loss shown":
        p_values = holm([loss_p(row.only_reference, row.only_candidate) for _, row in rows])
    else:
        p_values = holm(
            [beyond_margin_p(row.only_reference, row.only_candidate, row.n, row.margin) for _, row in rows]
        )
    gates = []
    for (name, row), p in zip(rows, p_values, strict=True):
        if rule is None or rule == "non-inferior":
            bound = None if rule is None else -row.margin_points
            gates.append(
                at_least(f"{name}: {rule or 'low end'}", row.low_points, bound, "points", _said(row))
            )
        else:
            level = round((1 - row.confidence) / 2, 12)  # 0.025, not its nearest neighbour
            gates.append(at_least(f"{name}: {rule}, p", p, level, "", _said(row)))
    return tuple(gates)


def _said(row: Paired) -> str:
    """Interval and verdict; an inconclusive one says with how many items it would be decided."""
    said = f"interval {row.low_points:+.1f} to {row.high_points:+.1f} points; {row.verdict}"
    if row.verdict != "inconclusive":
        return said
    if row.n_to_decide is None:
        return f"{said}; no number of items would decide at this difference"
    return f"{said}; about {row.n_to_decide:,} items would decide"


def verdict_panel(comparisons: Sequence[AccuracyComparison], rules: Sequence[Rule | None] = ()) -> Panel:
    """Verdicts by task, what each could have shown, and how often the rules pass by chance.

    Args:
        comparisons: candidates against one reference.
        rules: of each; None: reported only. Left out: none was named.

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
    named = [(c, rule) for c, rule in zip(comparisons, rules, strict=False) if rule is not None]
    ruled = "; ".join(f"{each.candidate}: {rule}" for each, rule in named)
    return Panel(
        key="verdicts",
        title="Verdicts",
        summary=" ".join(f"{_sentence(each)}." for each in comparisons),
        tables=(*tables, _chances(named[0][0] if named else comparisons[0])),
        notes=(
            "p: exact McNemar test, two-sided. p, Holm: adjusted over the tasks of the table. Low and high: "
            "Tango's 95 % interval of the difference.",
            "Detectable loss: what so many items find with 80 % power by a one-sided 5 % test at the "
            "discordance observed. Items to decide: with which an inconclusive verdict would fall, if "
            "difference and discordance stayed as they are.",
            "A task is called inferior only where that survives Holm's adjustment over the tasks.",
            f"Rules named beforehand: {ruled}. Other verdicts are reported, not gated."
            if ruled
            else "No rule was named beforehand: these verdicts are reported, not gated.",
        ),
        subjects=tuple(
            dict.fromkeys(s for each in comparisons for s in (each.reference_subject, each.candidate_subject))
        ),
    )


def _sentence(comparison: AccuracyComparison) -> str:
    """The verdict in words that need no statistics."""
    row = comparison.overall
    loss = f"a loss of more than {row.margin_points:g} points"
    if row.verdict == "non-inferior":
        found = f"is non-inferior to {comparison.reference}: {loss} is ruled out"
    elif row.verdict == "inferior":
        found = f"is inferior to {comparison.reference}: {loss} is shown"
    else:
        found = f"against {comparison.reference} is inconclusive: {loss} is neither ruled out nor shown"
    interval = f"({row.difference_points:+.1f} points, {row.low_points:+.1f} to {row.high_points:+.1f})"
    needed = f", about {row.n_to_decide:,} items would decide" if row.n_to_decide else ""
    worse = [t.scope for t in comparison.by_task if t.verdict == "inferior"]
    tasks = f"; inferior on {', '.join(worse)}" if worse else ""
    return f"{comparison.candidate} {found} by {row.n:,} items {interval}{needed}{tasks}"


def _chances(comparison: AccuracyComparison) -> Table:
    """How often each rule passes, at this run's items and discordance (at least one pair in n)."""
    row = comparison.overall
    discordance = max(1, row.only_reference + row.only_candidate) / row.n
    losses = tuple(dict.fromkeys((0.0, 0.01, row.margin)))
    return Table(
        caption=f"Chance that a rule alone passes, with {row.n:,} items at the {100 * discordance:.1f} % "
        f"discordance of {comparison.candidate} and a margin of {row.margin_points:g} points",
        columns=(
            Column(name="Rule", kind="text"),
            *(
                Column(
                    name="Unchanged model" if loss == 0 else f"True loss, {100 * loss:g} points",
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
            for rule in RULES
        ),
    )
