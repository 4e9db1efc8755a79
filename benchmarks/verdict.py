"""Does the verdict keep its word? Coverage of intervals, false alarms and power of the gate, simulated.

    python benchmarks/verdict.py [--runs 20000] [--seed 0] [--json FILE]

Runs the functions that `packager validate` and a release run, on data of which the truth is known:

- Coverage: how often each 95 % interval holds the true value, which should be 94 to 96 %. Counts are
  discrete, so coverage moves in steps: the grain is the probability of the two outcomes at the 2.5 % and
  97.5 % quantiles, what a hair's breadth of the truth can add or take. Where the grain exceeds the room that
  94 to 96 % leaves, no interval on counts keeps inside it everywhere, and the row says so.
- Rubric scores: the plain percentile bootstrap and Student's interval beside the symmetric studentised
  bootstrap that is used, in conversations of one to three items. A "limit" is a setting, marked after trial
  runs, in which it misses 94 to 96 %: too wide where few conversations move (Student's keeps inside there),
  too narrow, as all three are, where rare large losses decide the mean and most samples hold too few of them.
- Gate: the share of runs in which each rule fails a model that lost nothing (false alarm) and one that lost
  one point (power), beside the exact value that reports print; and a bound on the point estimate alone.
- Family: how often any of six unchanged tasks is called different or inferior, with and without Holm.

Exits 1 if a figure is not what it must be. Half a minute on one core; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from validation.statistics import mcnemar_exact, paired_difference, wilson
from validation.statistics.scores import bootstrap_t
from validation.tasks.comparison import looked_at_together, paired_outcomes
from validation.verdict import RULES, Rule, passes, rule_passes_with

ALPHA = 0.025
MARGIN = 0.01
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Coverage:
    """How often one interval held the truth."""

    method: str
    setting: str
    runs: int
    coverage: float
    grain: float
    """0: the data are continuous."""
    used: bool = True
    """False: shown for comparison, no verdict rests on it."""
    limit: bool = False
    """Beyond what the method can do: marked after trial runs had missed the band there."""

    @property
    def inside(self) -> bool:
        return 0.94 <= self.coverage <= 0.96

    @property
    def explained(self) -> bool:
        """Inside, or no further outside than the grain (and four standard errors) accounts for."""
        slack = self.grain + 4 * math.sqrt(0.05 * 0.95 / self.runs)
        return self.inside or not self.used or self.limit or abs(self.coverage - 0.95) <= slack


@dataclass(frozen=True)
class GateRow:
    """How often one rule failed."""

    rule: str
    items: int
    discordance: float
    runs: int
    false_alarm: float
    """Share of runs of an unchanged model that fail."""
    power: float
    """Share of runs of a model that lost a point that fail."""
    exact_false_alarm: float | None
    exact_power: float | None
    nominal: str

    @property
    def held(self) -> bool:
        """The promise of the rule, with four standard errors for the simulation."""
        bound = ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / self.runs)
        if self.rule == "non-inferior":
            # The score test is approximate where a handful of pairs decide: up to 3.5 % may pass, not 2.5.
            return 1 - self.power <= bound + 0.01
        return self.rule not in RULES or self.false_alarm <= bound


def per_outcome(counts: Array, function: Callable[..., Any]) -> Array:
    """`function(*row)` for each row of counts, called once for each distinct row."""
    rows, back = np.unique(counts, axis=0, return_inverse=True)
    values = np.array([function(*(int(x) for x in row)) for row in rows])
    return values[back.reshape(-1)]


def edge_mass(values: Array) -> float:
    """Probability of the outcomes at the 2.5 % and 97.5 % quantiles."""
    ends = np.quantile(values, (0.025, 0.975), method="inverted_cdf")
    return float(sum((values == end).mean() for end in np.unique(ends)))


def pairs(draw: np.random.Generator, n: int, discordance: float, loss: float, runs: int) -> Array:
    """(runs, 2): lost and gained among n pairs."""
    lost = (discordance + loss) / 2
    return draw.multinomial(n, (lost, discordance - lost, 1 - discordance), size=runs)[:, :2]


def wilson_coverage(draw: np.random.Generator, runs: int) -> Iterable[Coverage]:
    for n, p in ((40, 0.5), (40, 0.9), (240, 0.9), (240, 0.97), (1273, 0.85), (1273, 0.99), (7045, 0.8)):
        right = draw.binomial(n, p, size=(runs, 1))
        held = per_outcome(right, lambda k, n=n, p=p: wilson(k, n).low <= p <= wilson(k, n).high)
        yield Coverage("Wilson", f"{n} items, {p:.0%} right", runs, held.mean(), edge_mass(right[:, 0]))


TANGO = (
    (240, 0.005, 0.0), (240, 0.02, 0.0), (240, 0.05, 0.01), (240, 0.1, 0.02), (1273, 0.01, 0.0),
    (1273, 0.05, 0.0), (1273, 0.05, 0.01), (1273, 0.1, 0.02), (7045, 0.02, 0.0), (7045, 0.05, 0.0),
    (7045, 0.05, 0.01),
)  # fmt: skip
"""Items, discordance and loss, as proportions."""


def tango_coverage(
    draw: np.random.Generator, runs: int, settings: Sequence[tuple[int, float, float]] = TANGO
) -> Iterable[Coverage]:
    for n, discordance, loss in settings:
        counts = pairs(draw, n, discordance, loss, runs)

        def holds(lost: int, gained: int, n: int = n, loss: float = loss) -> bool:
            low, high = paired_difference(lost, gained, n)
            return low <= -loss <= high

        held = per_outcome(counts, holds)
        setting = f"{n} items, {100 * discordance:g} % discordant, {100 * loss:g} points lost"
        yield Coverage("Tango", setting, runs, held.mean(), edge_mass(counts[:, 1] - counts[:, 0]))


def score_data(draw: np.random.Generator, clusters: int, runs: int, kind: str) -> tuple[Array, Array, float]:
    """(clusters, runs) sums and sizes of conversations of one to three items, and the true mean difference.

    `normal`: every item moves, items of a conversation together. `sparse`: three in ten conversations move,
    six of these ten down. `lopsided`: three in ten move; losses are rare and three times as large as gains.
    """
    shape = (clusters, runs)
    sizes = draw.integers(1, 4, size=shape).astype(float)
    if kind == "normal":
        own = draw.normal(0, 0.1, shape) / np.sqrt(sizes)
        return sizes * (-0.01 + draw.normal(0, 0.1, shape) + own), sizes, -0.01
    moved = draw.random(shape) < 0.3
    if kind == "sparse":
        amount = draw.uniform(0.05, 0.5, shape) * np.where(draw.random(shape) < 0.6, -1, 1)
        return sizes * moved * amount, sizes, 0.3 * 0.275 * -0.2
    lost = draw.random(shape) < 0.3
    amount = np.where(lost, -draw.exponential(0.3, shape), draw.exponential(0.1, shape))
    return sizes * moved * amount, sizes, 0.3 * (0.3 * -0.3 + 0.7 * 0.1)


SCORES = (
    ("normal", 25, False), ("normal", 100, False), ("sparse", 40, True), ("sparse", 100, False),
    ("sparse", 400, False), ("lopsided", 100, True), ("lopsided", 400, False),
)  # fmt: skip


def score_coverage(
    draw: np.random.Generator,
    runs: int,
    resamples: int = 1000,
    settings: Sequence[tuple[str, int, bool]] = SCORES,
) -> Iterable[Coverage]:
    for kind, clusters, limit in settings:
        held = {"bootstrap": 0, "percentile": 0, "Student": 0}
        done = 0
        while done < runs:
            size = min(1000, runs - done)
            sums, sizes, truth = score_data(draw, clusters, size, kind)
            low, high = bootstrap_t(sums, sizes, 0.95, draw, resamples=resamples)
            held["bootstrap"] += int(((low <= truth) & (truth <= high)).sum())
            weights = draw.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(
                float
            )
            low, high = np.quantile((weights @ sums) / (weights @ sizes), (0.025, 0.975), axis=0)
            held["percentile"] += int(((low <= truth) & (truth <= high)).sum())
            mean = sums.sum(0) / sizes.sum(0)
            error = np.sqrt(((sums - mean * sizes) ** 2).sum(0) * clusters / (clusters - 1)) / sizes.sum(0)
            held["Student"] += int((abs(mean - truth) <= student.ppf(0.975, clusters - 1) * error).sum())
            done += size
        for method, count in held.items():
            setting = f"{clusters} conversations, {kind} scores"
            yield Coverage(method, setting, runs, count / runs, 0.0, method == "bootstrap", limit)


def gate_rows(
    draw: np.random.Generator, runs: int, sizes: Sequence[int] = (240, 1273, 7045)
) -> Iterable[GateRow]:
    for n in sizes:
        for discordance in (0.02, 0.05):
            same, worse = (pairs(draw, n, discordance, loss, runs) for loss in (0.0, 0.01))
            for rule in RULES:

                def fails(lost: int, gained: int, rule: Rule = rule, n: int = n) -> bool:
                    return not passes(rule, lost, gained, n, MARGIN)

                yield GateRow(
                    rule,
                    n,
                    discordance,
                    runs,
                    float(per_outcome(same, fails).mean()),
                    float(per_outcome(worse, fails).mean()),
                    1 - rule_passes_with(rule, n, discordance, 0.0, MARGIN),
                    1 - rule_passes_with(rule, n, discordance, 0.01, MARGIN),
                    "power at least 97.5 %" if rule == "non-inferior" else "false alarm at most 2.5 %",
                )
            bound = [float(((c[:, 0] - c[:, 1]) / n > MARGIN).mean()) for c in (same, worse)]
            yield GateRow("point estimate", n, discordance, runs, *bound, None, None, "none")


def family(draw: np.random.Generator, runs: int) -> dict[str, float]:
    """Share of runs in which any of six unchanged tasks of 200 items is called different, or inferior."""
    counts = pairs(draw, 200, 0.1, 0.0, runs * 6)
    p = per_outcome(counts, mcnemar_exact).reshape(runs, 6)
    # At the margin itself, where an unadjusted "inferior" errs most often.
    edge = pairs(draw, 200, 0.1, MARGIN, runs * 6).reshape(runs, 6, 2)
    inferior = {"plain": 0, "Holm": 0}
    some = min(runs, 4000)
    made: dict[tuple[int, int], Any] = {}
    for run in edge[:some]:
        rows = []
        for lost, gained in ((int(a), int(b)) for a, b in run):
            if (lost, gained) not in made:
                outcome = [(True, False)] * lost + [(False, True)] * gained
                outcome += [(True, True)] * (200 - lost - gained)
                made[lost, gained] = paired_outcomes("task", outcome, 100 * MARGIN)
            rows.append(made[lost, gained])
        if any(row.verdict == "inferior" for row in rows):
            inferior["plain"] += 1
            inferior["Holm"] += any(row.verdict == "inferior" for row in looked_at_together(rows))
    return {
        "different, p unadjusted": float((p.min(1) <= 0.05).mean()),
        "different, Holm": float((6 * p.min(1) <= 0.05).mean()),
        "inferior at the margin, unadjusted": inferior["plain"] / some,
        "inferior at the margin, Holm": inferior["Holm"] / some,
    }


def simulate(runs: int, seed: int) -> tuple[list[Coverage], list[GateRow], dict[str, float]]:
    """All of it, from one seed."""
    draw = np.random.default_rng(seed)
    coverage = [*wilson_coverage(draw, runs), *tango_coverage(draw, runs)]
    coverage += score_coverage(draw, min(runs, 10_000))
    return coverage, list(gate_rows(draw, runs)), family(draw, runs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    coverage, gates, families = simulate(options.runs, options.seed)

    print(f"Coverage of 95 % intervals over {options.runs:,} runs each (scores: at most 10,000), in %\n")
    for c in coverage:
        why = "compared only" if not c.used else "limit" if c.limit else "grain" if c.explained else "WRONG"
        remark = "" if c.inside else why
        grain = f"{100 * c.grain:5.1f}" if c.grain else "    –"
        print(f"{c.method:12} {c.setting:50} {100 * c.coverage:6.2f}  grain {grain}  {remark}".rstrip())
    print(
        f"\nShare of runs that the gate fails, in % (exact value in brackets); margin and loss 1 point\n\n"
        f"{'rule':16}{'items':>6}{'discordant':>12}{'no loss':>18}{'1 point lost':>18}  promise"
    )
    for g in gates:

        def cell(found: float, exact: float | None) -> str:
            return f"{100 * found:.2f}" + (f" ({100 * exact:.2f})" if exact is not None else "")

        print(
            f"{g.rule:16}{g.items:>6}{100 * g.discordance:>10.0f} %"
            f"{cell(g.false_alarm, g.exact_false_alarm):>18}"
            f"{cell(g.power, g.exact_power):>18}  {g.nominal}{'' if g.held else '  BROKEN'}"
        )
    print("\nAny of six unchanged tasks (200 items, 10 % discordant), in %\n")
    for name, share in families.items():
        print(f"{name:36}{100 * share:6.2f}")
    if options.json:
        document = {
            "coverage": [asdict(c) for c in coverage],
            "gates": [asdict(g) for g in gates],
            "family": families,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    right = all(c.explained for c in coverage) and all(g.held for g in gates)
    return 0 if right and families["different, Holm"] <= 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
