"""Predictions: what a fit finds again, what it says of cells and cards it has not seen."""

from __future__ import annotations

import random
from itertools import product

import pytest

from validation.errors import MeasurementError
from validation.hardware import parse_hardware
from validation.models import model_named
from validation.predict import Cell, calibrate, predict
from validation.roofline import Setting, decode_step

LING, SEED = model_named("ling-flash-2.0"), model_named("seed-oss-36b")
SETTING = Setting(precision="fp8")


def cells(card: str, noise: float = 0.0) -> list[Cell]:
    """70 % of the bandwidth for weights, 40 % for the cache, half the arithmetic, 2 ms a step."""
    generator, found = random.Random(0), []
    for model, batch, context in product((LING, SEED), (1, 8, 64, 256), (1024, 8192)):
        bound = decode_step(model, parse_hardware(card).card, SETTING, sequences=batch, context=context)
        weights = bound.memory_s * bound.weight_bytes / (bound.weight_bytes + bound.kv_bytes)
        seconds = (
            weights / 0.7 + (bound.memory_s - weights) / 0.4 + bound.compute_s / 0.5 + 2e-3 + 1e-5 * batch
        )
        found.append(
            Cell(
                label=f"{model.name} {batch} x {context}",
                model=model,
                card=parse_hardware(card).card,
                setting=SETTING,
                concurrency=batch,
                context=context,
                seconds=seconds * (1 + noise * generator.gauss(0, 1)),
            )
        )
    return found


def test_the_efficiencies_of_a_known_engine_are_found_again() -> None:
    found = calibrate(cells("h200"))
    assert found.efficiency("weights") == pytest.approx(0.7, rel=1e-6)
    assert found.efficiency("cache") == pytest.approx(0.4, rel=1e-6)
    assert found.efficiency("arithmetic") == pytest.approx(0.5, rel=1e-6)
    assert found.efficiency("links") is None
    assert found.coefficients[4:] == pytest.approx((2e-3, 1e-5), rel=1e-5)
    assert found.median_error < 1e-6


def test_another_card_is_predicted_from_measured_ones_with_an_interval_that_holds() -> None:
    found = calibrate(cells("h200", noise=0.05))
    assert 0.01 < found.median_error < 0.15
    inside = 0
    for truth in cells("h20-141"):
        said = predict(
            found, truth.model, truth.card, SETTING, concurrency=truth.concurrency, context=truth.context
        )
        assert said.seconds == pytest.approx(truth.seconds, rel=0.15)
        assert said.share_of_bound < 1
        inside += said.low_s <= truth.seconds <= said.high_s
    assert inside >= 14, "of 16; the interval is meant for nine in ten"


def test_a_prediction_never_beats_the_bound_and_too_few_cells_are_refused() -> None:
    measured = cells("h200")
    fast = [cell.model_copy(update={"seconds": cell.bound.seconds / 10}) for cell in measured]
    said = predict(calibrate(fast), LING, parse_hardware("h20").card, SETTING, concurrency=1, context=1024)
    assert said.seconds == said.bound.seconds
    with pytest.raises(MeasurementError, match="3 measured cells are too few"):
        calibrate(measured[:3])
