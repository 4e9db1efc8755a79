"""Predictions: what a fit finds again, what it says of cells and cards it has not seen."""

from __future__ import annotations

import random
from itertools import product

import pytest

from validation.errors import MeasurementError
from validation.hardware import parse_hardware
from validation.models import model_named
from validation.predict import Cell, calibrate, predict, transfer
from validation.published import compare_published, published_cells, published_file
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


@pytest.mark.parametrize(
    ("here", "there"), [("h200", "h20"), ("h200", "h20-141"), ("h20", "h100"), ("a100", "b200")]
)
def test_cells_go_to_another_card_by_the_ratio_of_bounds_within_their_interval(here: str, there: str) -> None:
    said = transfer(cells(here, noise=0.05), parse_hardware(there).card)
    inside = 0
    for one, truth in zip(said, cells(there), strict=True):
        assert one.low_s <= one.seconds <= one.high_s
        assert one.bound.seconds <= one.low_s
        inside += one.low_s <= truth.seconds <= one.high_s
    assert inside >= 14, "of 16; the interval is meant for nine in ten"
    same = transfer(cells(here), parse_hardware(here).card)
    assert [one.seconds for one in same] == pytest.approx([one.measured_s for one in same])


def test_cells_of_several_cards_or_split_ones_without_links_are_not_transferred() -> None:
    with pytest.raises(MeasurementError, match="several cards"):
        transfer([*cells("h200"), *cells("h20")], parse_hardware("h100").card)
    split = [
        one.model_copy(update={"setting": SETTING.model_copy(update={"tensor": 2})}) for one in cells("h200")
    ]
    alone = parse_hardware("h20").card.model_copy(update={"link_gb_s": 0.0})
    with pytest.raises(MeasurementError, match="links are not known"):
        transfer(split, alone)
    with pytest.raises(MeasurementError, match="no measured cell"):
        transfer([], alone)


def test_no_published_measurement_is_above_the_bound() -> None:
    compared = compare_published()
    assert len(compared) >= 25
    assert {one.row.id for one in compared if one.share > 1} == set()
    # A bound that nothing comes near would be as wrong, only less visibly.
    assert max(one.share for one in compared) > 0.6
    drafts = {one.row.id: one for one in compared if one.roofline_gain}
    assert drafts["draft-gsm8k"].roofline_gain == pytest.approx(1.293, abs=0.001)
    assert "github.com/ai-dynamo/aiconfigurator" in published_file().sources["aiconfigurator"]


def test_shapes_of_the_published_models_have_their_parameters() -> None:
    known = {name: shape.parameters / 1e9 for name, shape in published_file().shapes.items()}
    said = {
        "qwen3-235b-a22b": 235.1,
        "qwen3-32b": 32.8,
        "deepseek-v3": 671.0,
        "minimax-m2.5": 228.7,
        "llama-3-70b": 70.6,
    }
    assert known == pytest.approx(said, abs=0.05)
    assert published_file().shapes["deepseek-v3"].active_parameters / 1e9 == pytest.approx(37.6, abs=0.1)


def test_a_measured_cell_of_one_card_says_the_same_engine_on_another_within_its_interval() -> None:
    """DeepSeek-R1, FP8, 16 at once under SGLang 0.5.9: measured on eight H200 and on eight B200."""
    measured = {cell.label.split()[0]: cell for cell in published_cells()}
    h200 = [cell for cell in measured.values() if cell.card == parse_hardware("h200").card]
    truth = measured["dsr1-b200-sglang-c16"].seconds
    said = next(
        t for t in transfer(h200, parse_hardware("b200").card) if t.label.startswith("dsr1-h200-sglang")
    )
    assert said.low_s < truth < said.high_s
    assert said.seconds == pytest.approx(truth, rel=0.2)


def test_published_cells_of_many_engines_say_each_other_to_within_a_quarter() -> None:
    assert calibrate(published_cells()).median_error < 0.25
