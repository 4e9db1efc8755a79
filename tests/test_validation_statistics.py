"""Statistics against scipy, published values and an independent maximisation; coverage by simulation."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from validation.statistics import (
    Interval,
    mcnemar_exact,
    n_to_decide,
    non_inferiority,
    normal_quantile,
    paired_difference,
    paired_score,
    wilson,
)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_scipys_two_sided_binomial_test(lost: int, gained: int) -> None:
    expected = 1.0 if lost + gained == 0 else binomtest(lost, lost + gained, 0.5).pvalue
    assert mcnemar_exact(lost, gained) == pytest.approx(expected, abs=1e-9)


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


@pytest.mark.parametrize(("lost", "gained", "n"), [(0.03, 0.03, 200), (0.06, 0.02, 200), (0.02, 0.01, 400)])
def test_interval_covers_the_true_difference_as_often_as_it_says(lost: float, gained: float, n: int) -> None:
    draw = random.Random(7)
    runs, covered = 4000, 0
    known: dict[tuple[int, int], bool] = {}
    for _ in range(runs):
        b = sum(draw.random() < lost for _ in range(n))
        c = sum(draw.random() < gained / (1 - lost) for _ in range(n - b))
        if (b, c) not in known:
            low, high = paired_difference(b, c, n)
            known[b, c] = low <= gained - lost <= high
        covered += known[b, c]
    assert 0.935 <= covered / runs <= 0.975


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
