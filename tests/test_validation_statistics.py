"""Statistics against scipy, statsmodels, published values and an independent maximisation; simulation."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm, ttest_rel
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from validation.statistics import (
    Interval,
    beyond_margin_p,
    chance_to_pass,
    clusters_to_decide,
    detectable_difference,
    holm,
    items_to_find,
    loss_p,
    mcnemar_exact,
    n_to_decide,
    non_inferiority,
    normal_quantile,
    paired_difference,
    paired_means,
    paired_score,
    wilson,
)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_scipys_two_sided_binomial_test(lost: int, gained: int) -> None:
    expected = 1.0 if lost + gained == 0 else binomtest(lost, lost + gained, 0.5).pvalue
    assert mcnemar_exact(lost, gained) == pytest.approx(expected, abs=1e-9)
    theirs = mcnemar([[7, lost], [gained, 9]], exact=True).pvalue
    assert mcnemar_exact(lost, gained) == pytest.approx(min(1.0, theirs), abs=1e-9)
    one_sided = (
        1.0 if lost + gained == 0 else binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue
    )
    assert loss_p(lost, gained) == pytest.approx(one_sided, abs=1e-9)


def test_mcnemar_is_exact_beyond_floating_point_factorials() -> None:
    # 3000 to 3200 discordant pairs: binomial coefficients far beyond a float.
    assert mcnemar_exact(3000, 3200) == pytest.approx(binomtest(3000, 6200, 0.5).pvalue, rel=1e-9)


@settings(deadline=None)
@given(st.integers(1, 2000), st.data(), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_is_scipys(n: int, data: st.DataObject, confidence: float) -> None:
    k = data.draw(st.integers(0, n))
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    low, high = wilson(k, n, confidence)
    assert low == pytest.approx(expected.low, abs=1e-9)
    assert high == pytest.approx(expected.high, abs=1e-9)
    theirs = proportion_confint(k, n, 1 - confidence, method="wilson")
    assert (low, high) == (pytest.approx(theirs[0], abs=1e-9), pytest.approx(theirs[1], abs=1e-9))


@pytest.mark.slow
@settings(deadline=None, max_examples=6)  # statsmodels collects garbage at every call: 0.1 s
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels_and_never_looser_than_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert adjusted == pytest.approx(list(multipletests(p_values, method="holm")[1]), abs=1e-9)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p)


def test_wilson_gives_newcombes_published_examples() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (k, n), (low, high) in published.items():
        assert wilson(k, n) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_quantile_is_scipys() -> None:
    for confidence in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999):
        assert normal_quantile(confidence) == pytest.approx(norm.ppf(0.5 + confidence / 2), abs=1e-9)


@pytest.mark.parametrize(
    ("lost", "gained", "n", "delta"),
    [(3, 10, 80, 0.02), (10, 3, 80, -0.2), (0, 0, 50, 0.03), (0, 7, 44, -0.05), (5, 0, 200, 0.01)],
)
def test_score_agrees_with_a_direct_constrained_maximisation(
    lost: int, gained: int, n: int, delta: float
) -> None:
    """The restricted estimate, found numerically from the trinomial likelihood, gives the same statistic."""

    def negative_log_likelihood(q: float) -> float:
        terms = [(gained, q + delta), (lost, q), (n - gained - lost, 1 - 2 * q - delta)]
        return -sum(k * math.log(max(p, 1e-300)) for k, p in terms if k)

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = minimize_scalar(
        negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}
    ).x
    variance = 2 * q + delta - delta * delta
    expected = (gained - lost - n * delta) / math.sqrt(n * variance)
    assert paired_score(lost, gained, n, delta) == pytest.approx(expected, rel=1e-5)


def test_interval_without_discordant_pairs_has_its_closed_form() -> None:
    z2 = normal_quantile(0.95) ** 2
    for n in (10, 100, 1273):
        low, high = paired_difference(0, 0, n)
        assert (low, high) == (pytest.approx(-z2 / (n + z2)), pytest.approx(z2 / (n + z2)))


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 100))
def test_interval_holds_the_estimate_and_mirrors_when_the_roles_swap(
    lost: int, gained: int, rest: int
) -> None:
    n = lost + gained + rest
    low, high = paired_difference(lost, gained, n)
    if n:
        assert -1 <= low <= (gained - lost) / n <= high <= 1
    assert paired_difference(gained, lost, n) == (
        pytest.approx(-high, abs=1e-9),
        pytest.approx(-low, abs=1e-9),
    )


def test_interval_ends_are_where_the_score_test_just_rejects() -> None:
    z = normal_quantile(0.95)
    low, high = paired_difference(4, 9, 120)
    assert paired_score(4, 9, 120, low) == pytest.approx(z, abs=1e-9)
    assert paired_score(4, 9, 120, high) == pytest.approx(-z, abs=1e-9)


def test_interval_gives_published_examples() -> None:
    # Fagerland, Lydersen & Laake 2014, Statistics in Medicine 33:2850-2875: airway reactivity (Bentur et al.
    # 2009) and complete response (Cavo et al. 2012), which R's contingencytables tests itself by.
    for lost, gained, n, low, high in ((7, 1, 21, -0.517, -0.026), (16, 6, 161, -0.1240, -0.0054)):
        digits = 5e-4 if n == 21 else 5e-5
        found = paired_difference(lost, gained, n)
        assert found == (pytest.approx(low, abs=digits), pytest.approx(high, abs=digits))


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(20, 3000))
def test_interval_ends_are_roots_of_the_published_quartic(lost: int, gained: int, rest: int) -> None:
    """Yang, Sun & Hardin 2013, Statistics in Medicine 32:1336: the statistic squared, as a polynomial."""
    n, d, s = lost + gained + rest, gained - lost, gained + lost
    g = normal_quantile(0.95) ** 2
    polynomial = (
        n**2 * (n / g + 1) ** 2,
        -n * d * (n / g + 1) * (4 * n / g + 1),
        2 * n * d**2 * (3 * n / g + 2) / g - n**2 * (s / g + 1),
        n * d * (2 * s / g + 1) - d**3 * (4 * n / g + 1) / g,
        d**2 * (d**2 / g - s) / g,
    )
    for end in paired_difference(lost, gained, n):
        value, slope = np.polyval(polynomial, end), np.polyval(np.polyder(polynomial), end)
        assert abs(value / slope) < 1e-9


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 400), st.floats(0.001, 0.2))
def test_a_p_below_its_level_is_an_interval_beyond_the_margin(
    lost: int, gained: int, rest: int, margin: float
) -> None:
    n = lost + gained + rest + 1
    high = paired_difference(lost, gained, n).high
    if abs(high + margin) > 1e-9:
        assert (beyond_margin_p(lost, gained, n, margin) < 0.025) == (high < -margin)


def test_what_a_sample_can_show() -> None:
    # One-sided 5 %, power 80 %, 5 % discordant: MedQA, and the pooled multimedqa.
    assert detectable_difference(1273, 0.05) == pytest.approx(0.016, abs=5e-4)
    assert detectable_difference(7045, 0.05) == pytest.approx(0.0066, abs=5e-5)
    assert detectable_difference(2, 0.05) is None
    # No discordance is not no doubt: a loss must exceed what so few items could hide.
    assert detectable_difference(240, 0.0) == pytest.approx(0.0255, abs=5e-4)
    needed = items_to_find(0.01, 0.05)
    assert detectable_difference(needed, 0.05) == pytest.approx(0.01, rel=1e-3)
    # The exact test finds that loss about as often as it says; being discrete, it errs on the safe side.
    power = 1 - chance_to_pass(needed, 0.05, 0.01, lambda lost, gained: loss_p(lost, gained) > 0.05)
    assert 0.77 < power < 0.80
    false_alarm = 1 - chance_to_pass(needed, 0.05, 0.0, lambda lost, gained: loss_p(lost, gained) > 0.05)
    assert 0.04 < false_alarm <= 0.05


def test_chances_are_those_of_the_trinomial() -> None:
    from scipy.stats import multinomial

    n, lost, gained = 30, 0.08, 0.03
    expected = sum(
        multinomial.pmf((b, c, n - b - c), n, (lost, gained, 1 - lost - gained))
        for b in range(n + 1)
        for c in range(n + 1 - b)
        if b - c <= 2
    )
    assert chance_to_pass(n, 0.11, 0.05, lambda b, c: b - c <= 2) == pytest.approx(expected, abs=1e-8)


def _scores(n: int, seed: int) -> tuple[list[float], list[float]]:
    draw = np.random.default_rng(seed)
    before = draw.uniform(0, 1, n)
    return before.tolist(), (before + draw.normal(-0.02, 0.1, n)).tolist()


def test_mean_difference_is_scipys_t_and_statsmodels_clustered_one() -> None:
    before, after = _scores(90, 1)
    found = paired_means(before, after)
    theirs = ttest_rel(after, before)
    low, high = theirs.confidence_interval()
    assert found.t_interval == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert found.p_value == pytest.approx(theirs.pvalue, abs=1e-9)
    # The bootstrap agrees where scores are normal.
    assert found.interval == (pytest.approx(low, rel=0.1), pytest.approx(high, rel=0.1))

    clusters = [k // 3 if k < 60 else k for k in range(90)]
    fit = OLS(np.subtract(after, before), np.ones(90)).fit(
        cov_type="cluster", cov_kwds={"groups": np.array(clusters)}, use_t=True
    )
    found = paired_means(before, after, clusters)
    assert (found.clusters, found.items) == (50, 90)
    assert found.standard_error == pytest.approx(fit.bse[0], abs=1e-9)
    assert found.p_value == pytest.approx(fit.pvalues[0], abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 5)), min_size=2, max_size=30))
def test_mean_difference_mirrors_and_cares_for_no_order(rows: list[tuple[float, float, int]]) -> None:
    before, after, clusters = ([row[k] for row in rows] for k in range(3))
    if len(set(clusters)) < 2:
        with pytest.raises(ValueError, match="one conversation"):
            paired_means(before, after, clusters)
        return
    found = paired_means(before, after, clusters, resamples=200)
    assert -1 <= found.interval.low <= found.difference + 1e-9
    assert found.difference - 1e-9 <= found.interval.high <= 1
    mirrored = paired_means(after, before, clusters, resamples=200)
    assert mirrored.interval == (
        pytest.approx(-found.interval.high, abs=1e-6),
        pytest.approx(-found.interval.low, abs=1e-6),
    )
    renamed = paired_means(before, after, [f"c{k}" for k in clusters], resamples=200)
    assert renamed == found


def test_scores_that_never_differ_leave_the_doubt_of_a_share() -> None:
    found = paired_means([0.5] * 60, [0.5] * 60)
    assert found.interval == (pytest.approx(-wilson(0, 60).high), pytest.approx(wilson(0, 60).high))
    assert (found.p_value, found.moved) == (1.0, 0)
    ruined = paired_means([0.9] * 60, [0.2] * 60)
    assert ruined.interval.high < -0.6 and ruined.p_value < 1e-9


def test_the_clusters_that_would_decide() -> None:
    # Half the standard error with four times the clusters: 1.96 * 0.01 is then just below the gap of 0.02.
    assert clusters_to_decide(0.0, 0.02, 100, 0.02) == math.ceil(100 * 1.959964**2)
    assert clusters_to_decide(-0.02, 0.02, 100, 0.02) is None


def _simulation() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "verdict.py"
    spec = importlib.util.spec_from_file_location("benchmarks_verdict", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


def test_intervals_cover_and_the_gate_keeps_its_promises() -> None:
    """A small one of `make bench-verdict`."""
    bench = _simulation()
    draw = np.random.default_rng(7)
    rows = [*bench.wilson_coverage(draw, 2000), *bench.tango_coverage(draw, 1000, bench.TANGO[1:5])]
    rows += bench.score_coverage(draw, 1000, 300, bench.SCORES[:1])
    assert [row for row in rows if not row.explained] == []
    gates = list(bench.gate_rows(draw, 1500, (240,)))
    assert [row for row in gates if not row.held] == []
    for row in gates:
        if row.exact_power is not None:
            assert row.power == pytest.approx(row.exact_power, abs=4 * math.sqrt(0.25 / 1500))
    families = bench.family(draw, 800)
    assert families["different, Holm"] < 0.05 < families["different, p unadjusted"]
    assert families["inferior at the margin, Holm"] < families["inferior at the margin, unadjusted"]


def test_verdict_has_three_ways() -> None:
    assert non_inferiority(Interval(-0.01, 0.02), 0.02) == "non-inferior"
    assert non_inferiority(Interval(-0.08, -0.03), 0.02) == "inferior"
    assert non_inferiority(Interval(-0.03, 0.01), 0.02) == "inconclusive"
    # On the bound itself the loss is not ruled out.
    assert non_inferiority(Interval(-0.02, 0.01), 0.02) == "inconclusive"
    with pytest.raises(ValueError, match="positive"):
        non_inferiority(Interval(0, 0), 0)


def test_the_n_that_would_decide_decides() -> None:
    lost, gained, n, margin = 4, 3, 100, 0.02
    assert non_inferiority(paired_difference(lost, gained, n), margin) == "inconclusive"
    needed = n_to_decide(lost, gained, n, margin)
    assert needed is not None and needed > n
    scale = needed / n
    decided = paired_difference(round(lost * scale), round(gained * scale), needed)
    assert non_inferiority(decided, margin) == "non-inferior"
    half = needed // 2
    undecided = paired_difference(round(lost * half / n), round(gained * half / n), half)
    assert non_inferiority(undecided, margin) == "inconclusive"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.floats(0.005, 0.3))
def test_the_n_that_would_decide_is_found_for_the_smallest_samples(
    lost: int, gained: int, rest: int, margin: float
) -> None:
    n = lost + gained + rest
    needed = n_to_decide(lost, gained, n, margin)
    assert needed is None or needed >= n > 0


def test_no_n_decides_a_difference_that_is_the_margin() -> None:
    assert n_to_decide(4, 2, 100, 0.02) is None


def test_impossible_counts_are_refused() -> None:
    for call in (
        lambda: mcnemar_exact(-1, 2),
        lambda: wilson(5, 4),
        lambda: paired_difference(3, 3, 5),
        lambda: normal_quantile(1.0),
    ):
        with pytest.raises(ValueError):
            call()
