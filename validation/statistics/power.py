"""What a number of items can show: the smallest loss that would be found, and how often a rule passes.

Discordance is the share of items that one model gets right and the other wrong. A loss needs discordant
pairs to show itself in, so where a loss exceeds the discordance given, the loss itself is taken for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

Passes = Callable[[int, int], bool]
"""Whether a rule passes at (lost, gained) discordant pairs. With their sum held, more losses never help."""


def detectable_difference(
    n: int, discordance: float, *, power: float = 0.8, alpha: float = 0.05
) -> float | None:
    """Smallest true loss, as a proportion, that a one-sided McNemar test of n pairs finds with `power`.

    Solves d sqrt(n) = z(1-alpha) sqrt(psi) + z(power) sqrt(psi - d^2), psi = max(discordance, d): the test's
    spread where nothing is lost, and where d is. Source: Connor 1987, Biometrics 43:207-211.

    Returns:
        None if not even losing every item would be found.
    """
    if n < 0 or not 0 <= discordance <= 1:
        raise ValueError(f"n = {n}, discordance = {discordance}")
    z_test, z_power = NormalDist().inv_cdf(1 - alpha), NormalDist().inv_cdf(power)

    def found(d: float) -> bool:
        psi = max(discordance, d)
        return d * math.sqrt(n) >= z_test * math.sqrt(psi) + z_power * math.sqrt(max(0.0, psi - d * d))

    if not found(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high


def items_to_find(difference: float, discordance: float, *, power: float = 0.8, alpha: float = 0.05) -> int:
    """Pairs with which a one-sided McNemar test finds a loss of `difference` with `power`; same source."""
    if not 0 < difference <= 1 or not 0 <= discordance <= 1:
        raise ValueError(f"difference = {difference}, discordance = {discordance}")
    psi = max(discordance, difference)
    z_test, z_power = NormalDist().inv_cdf(1 - alpha), NormalDist().inv_cdf(power)
    root = z_test * math.sqrt(psi) + z_power * math.sqrt(max(0.0, psi - difference**2))
    return math.ceil((root / difference) ** 2)


def chance_to_pass(n: int, discordance: float, loss: float, passes: Passes) -> float:
    """Probability that a rule on discordant pairs passes a model whose true loss is `loss`.

    Exact up to 1e-9: sums the trinomial of (lost, gained) among n independent pairs. For each number of
    discordant pairs the most losses that still pass are found by bisection, so `passes` is asked some ten
    times each.
    """
    from scipy.stats import binom

    if n < 1 or not 0 <= discordance <= 1 or not -1 <= loss <= 1:
        raise ValueError(f"n = {n}, discordance = {discordance}, loss = {loss}")
    psi = max(discordance, abs(loss))
    share = 0.5 if psi == 0 else (psi + loss) / (2 * psi)
    first, last = (int(k) for k in binom.ppf((5e-10, 1 - 5e-10), n, psi))
    sizes = list(range(max(0, first), last + 1))
    worst = []
    for size in sizes:
        low, high = -1, size
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if passes(middle, size - middle) else (low, middle - 1)
        worst.append(low)
    return float((binom.pmf(sizes, n, psi) * binom.cdf(worst, sizes, share)).sum())
