"""What speed measurements mean: break-even, the draft length by batch, the acceptance needed."""

from __future__ import annotations

import math

import pytest

from packager.draft.speedup import (
    Agreement,
    agreement,
    best_tokens,
    break_even,
    needed_acceptance,
    paying_context,
    schedule,
)
from packager.recipe import SpeculationRange


def test_break_even_lies_where_the_speed_up_crosses_one() -> None:
    found = break_even({1: 1.5, 16: 0.5})
    assert found.concurrency == pytest.approx(4.0)  # halfway in the logarithm
    assert found.text == "about 4.0"


def test_break_even_takes_the_first_crossing() -> None:
    found = break_even({1: 1.4, 2: 1.2, 4: 0.8, 8: 1.1})
    assert found.concurrency is not None
    assert 2 < found.concurrency < 4


@pytest.mark.parametrize(
    ("speedups", "text"),
    [
        ({1: 1.4, 16: 1.1}, "none up to 16"),
        ({1: 0.9, 16: 0.8}, "does not pay at 1"),
        ({2: 0.9, 16: 1.2}, "does not pay at 2"),
        ({4: 1.0}, "does not pay at 4"),
    ],
)
def test_no_crossing_is_said_so(speedups: dict[int, float], text: str) -> None:
    found = break_even(speedups)
    assert (found.concurrency, found.text) == (None, text)


def test_best_draft_length_falls_with_the_batch_and_is_none_where_none_pays() -> None:
    speedups = {1: {1: 1.2, 16: 1.1, 64: 0.9}, 5: {1: 1.8, 16: 0.9, 64: 0.7}}
    best = best_tokens(speedups)
    assert best == {1: (5, 1.8), 16: (1, 1.1), 64: (0, 1.0)}
    assert schedule({level: tokens for level, (tokens, _) in best.items()}) == (
        SpeculationRange(max_concurrency=4, num_speculative_tokens=5),
        SpeculationRange(max_concurrency=32, num_speculative_tokens=1),
        SpeculationRange(num_speculative_tokens=0),
    )


def test_one_best_length_needs_no_ranges() -> None:
    assert schedule({1: 3, 16: 3}) == (SpeculationRange(num_speculative_tokens=3),)


def test_speculation_stops_at_the_first_length_that_does_not_pay() -> None:
    assert paying_context({512: 1.4, 1024: 1.1, 2048: 0.9, 4096: 1.2}) == 1024
    assert paying_context({512: 1.4, 2048: 1.1}) is None
    assert paying_context({512: 0.9, 2048: 1.1}) == 0


def test_needed_acceptance_is_read_off_the_line_through_the_points() -> None:
    line = needed_acceptance([(1.0, 80.0), (2.5, 200.0), (4.0, 320.0)])
    assert line.worst_residual < 1e-9
    assert line.length_for(100.0) == pytest.approx(1.25)
    assert line.length_for(150.0) == pytest.approx(1.875)


def test_a_bent_line_says_how_far_it_is_off() -> None:
    assert needed_acceptance([(1.0, 80.0), (2.5, 260.0), (4.0, 320.0)]).worst_residual > 0.1


def test_speed_that_does_not_grow_needs_no_acceptance_that_exists() -> None:
    assert needed_acceptance([(1.0, 90.0), (4.0, 90.0)]).length_for(100.0) is None
    with pytest.raises(ValueError, match="two acceptance lengths"):
        needed_acceptance([(2.0, 90.0), (2.0, 91.0)])


@pytest.mark.parametrize(("served", "alarm"), [(3.0, False), (2.87, False), (2.84, True), (3.2, True)])
def test_predicted_and_served_part_with_an_alarm(served: float, alarm: bool) -> None:
    metrics = {"predicted_acceptance": {"by_tokens": {"3": [0.8, 0.7, 0.5]}, "length": 3.0}}
    found = agreement(metrics, 3, served)
    assert isinstance(found, Agreement)
    assert math.isclose(found.predicted, 3.0)
    assert found.alarm is alarm


def test_a_prediction_is_for_the_tasks_that_were_served() -> None:
    """One task in four drafts is hard; training saw as many of either."""
    sealed = {
        "by_tokens": {"2": [0.7, 0.5]},
        "by_task": {"easy": {"2": [0.9, 0.8]}, "hard": {"2": [0.5, 0.2]}},
    }
    metrics = {"predicted_acceptance": sealed}
    mixed = agreement(metrics, 2, 2.5, {"easy": 300, "hard": 100})
    assert mixed is not None
    assert mixed.predicted == pytest.approx(1 + 0.75 * 1.7 + 0.25 * 0.7)
    unknown = agreement(metrics, 2, 2.5, {"easy": 300, "new": 100})
    assert unknown is not None
    assert unknown.predicted == pytest.approx(2.2), "no prediction for one of them: that of all counts"


def test_what_was_not_predicted_is_not_compared() -> None:
    """A prediction is for one length: a shorter draft starts from other tokens than a longer one."""
    metrics = {"predicted_acceptance": {"by_tokens": {"2": [0.9, 0.7], "3": [0.8, 0.7, 0.5]}}}
    assert agreement(metrics, 5, 3.0) is None
    assert agreement({}, 3, 3.0) is None
    shorter = agreement(metrics, 2, 2.5)
    assert shorter is not None
    assert shorter.predicted == pytest.approx(2.6)
