"""The synthetic acceptance that our plugin gives vLLM's CPU build."""

from __future__ import annotations

import pytest

from packager.bailing.vllm_synthetic import rejection_greedy_sample_kernel

torch = pytest.importorskip("torch")


def _run(
    counts: list[int],
    drafts: list[int],
    wanted: list[int],
    *,
    chances: list[float] | None = None,
    rates: list[float] | None = None,
    greedy: list[bool] | None = None,
) -> list[list[int]]:
    out = torch.full((len(counts), max(counts) + 1), -1, dtype=torch.int32)
    rejection_greedy_sample_kernel(
        out,
        torch.tensor(counts).cumsum(0),
        torch.tensor(drafts),
        torch.tensor(wanted),
        torch.arange(100, 100 + len(counts)).unsqueeze(1),
        None if greedy is None else torch.tensor(greedy),
        max(counts),
        None if chances is None else torch.tensor(chances, dtype=torch.float64),
        None if rates is None else torch.tensor(rates),
        rates is not None,
    )
    return [[token for token in row if token != -1] for row in out.tolist()]


def test_tokens_are_accepted_by_chance_not_by_the_target() -> None:
    found = _run([2, 2], [5, 6, 7, 8], [1, 2, 3, 4], chances=[0.1, 0.9, 0.1, 0.1], rates=[0.5, 0.5])
    assert found == [[5, 2], [7, 8, 101]]  # the second draft of the first request is refused


def test_padded_drafts_are_never_accepted() -> None:
    assert _run([1], [-1], [9], chances=[0.0], rates=[1.0]) == [[9]]


def test_without_rates_it_is_greedy_verification() -> None:
    assert _run([2, 0, 1], [5, 6, 8], [5, 7, 8]) == [[5, 7], [101], [8, 102]]


def test_other_than_greedy_requests_are_left_alone() -> None:
    found = _run([1, 1], [5, 6], [5, 6], greedy=[False, True])
    assert found == [[], [6, 101]]


def test_mean_length_is_the_one_asked_for() -> None:
    """3 draft tokens, each accepted with 0.5 after the one before: 1 + 0.5 + 0.25 + 0.125."""
    many = 4000
    chances = torch.rand(3 * many, generator=torch.Generator().manual_seed(0)).tolist()
    found = _run([3] * many, [1] * 3 * many, [2] * 3 * many, chances=chances, rates=[0.5] * 3)
    assert sum(map(len, found)) / many == pytest.approx(1.875, abs=0.05)
