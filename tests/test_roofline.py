"""Bounds on speed: figures known beforehand, and what must hold whatever the figures."""

from __future__ import annotations

import json
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.layouts import count_parameters, recognise
from packager.serving.plan import shape_of
from validation.errors import MeasurementError
from validation.hardware import hardware_file, measure_here, parse_hardware
from validation.models import known_models, model_named
from validation.roofline import (
    Draft,
    Setting,
    decode_rate,
    distinct_experts,
    fullest_share,
    prefill_step,
)

LING, SEED = model_named("ling-flash-2.0"), model_named("seed-oss-36b")
H20X4 = parse_hardware("4xh20")


def rate(model: str, precision: str, batch: int, context: int = 2048) -> float:
    setting = Setting(precision=precision, tensor=4)  # type: ignore[arg-type]
    found = decode_rate(model_named(model), H20X4, setting, concurrency=batch, context=context)
    return found.tokens_per_s


@pytest.mark.parametrize("name", known_models())
def test_the_shapes_are_those_of_the_published_configs(name: str) -> None:
    """Two countings: the file's numbers, and every tensor of the declared architecture."""
    layout = recognise(json.loads(resources.files("recipes").joinpath(f"{name}.json").read_text()))
    assert shape_of(layout, name) == model_named(name)
    counted = count_parameters(layout)
    assert (counted.total, counted.active) == (
        model_named(name).parameters,
        model_named(name).active_parameters,
    )


def test_parameters_and_cache_are_exact() -> None:
    assert LING.parameters == 102_889_697_280 + 7_936
    assert LING.active_parameters == 6_152_277_760
    assert SEED.parameters == 36_151_104_512
    assert (LING.kv_bytes(), SEED.kv_bytes()) == (65_536, 262_144)


def test_single_streams_on_four_h20() -> None:
    assert rate("ling-flash-2.0", "bf16", 1, 0) == pytest.approx(1452, rel=0.001)
    assert rate("seed-oss-36b", "bf16", 1, 0) == pytest.approx(226, rel=0.002)


@pytest.mark.parametrize(
    ("batch", "bf16", "fp8"),
    [(1, 6.4, 11.3), (8, 1.5, 2.8), (32, 0.64, 1.24), (128, 1.2, 2.2), (512, 3.9, 6.1)],
)
def test_the_mixture_against_the_dense_model_at_2k_tokens(batch: int, bf16: float, fp8: float) -> None:
    """Ratios of the bounds on four H20, as published beside the claim of three times; to two digits."""
    dense = rate("seed-oss-36b", "bf16", batch)
    assert rate("ling-flash-2.0", "bf16", batch) / dense == pytest.approx(bf16, rel=0.02)
    assert rate("ling-flash-2.0", "fp8", batch) / dense == pytest.approx(fp8, rel=0.02)


def test_one_h20_cannot_decode_the_dense_model_at_67_tokens_a_second() -> None:
    one = decode_rate(SEED, parse_hardware("h20"), Setting(), concurrency=1, context=0)
    assert one.tokens_per_s == pytest.approx(4.0e12 / (2 * (SEED.parameters - SEED.embedding)))
    assert one.tokens_per_s < 57


@given(st.integers(1, 4000), st.floats(0, 2))
def test_distinct_experts_lie_between_one_token_s_and_all(tokens: int, skew: float) -> None:
    found = distinct_experts(256, 8, tokens, skew)
    assert 8 - 1e-9 <= found <= 256
    assert found <= distinct_experts(256, 8, tokens + 1, skew) + 1e-9
    assert found <= distinct_experts(256, 8, tokens, 0.0) + 1e-9, "uneven routing repeats experts"


def test_distinct_experts_of_one_and_two_tokens() -> None:
    assert distinct_experts(256, 8, 1) == pytest.approx(8)
    assert distinct_experts(256, 8, 1, 1.0) == pytest.approx(8)
    assert distinct_experts(256, 8, 2) == pytest.approx(8 + 8 * (1 - 8 / 256))
    # The likeliest experts are certain to be chosen: with a steep law the second token adds few.
    assert distinct_experts(256, 8, 2, 3.0) < 10


def test_expert_parallelism_costs_the_fullest_card_and_never_more_than_all_on_one() -> None:
    assert fullest_share(256, 8, 1, 4) <= 4
    assert fullest_share(256, 8, 4096, 4) == pytest.approx(1.02, abs=0.01)
    assert fullest_share(256, 8, 64, 1) == 1
    whole = Setting(precision="fp8", tensor=4, expert_parallel=True)
    split = whole.model_copy(update={"expert_parallel": False})
    at = {"concurrency": 2048, "context": 1}
    assert (
        decode_rate(LING, H20X4, whole, **at).tokens_per_s
        < decode_rate(LING, H20X4, split, **at).tokens_per_s
    )


def test_pipeline_stages_help_many_sequences_and_not_one() -> None:
    one, two = (Setting(precision="fp8", pipeline=stages) for stages in (1, 2))
    card = parse_hardware("h200")
    alone = [decode_rate(LING, card, s, concurrency=1, context=1024).tokens_per_s for s in (one, two)]
    assert alone[0] == alone[1]
    many = [decode_rate(LING, card, s, concurrency=256, context=1024).tokens_per_s for s in (one, two)]
    assert many[0] < many[1] < 2 * many[0]


def test_slow_links_are_named_where_they_bound() -> None:
    slow, fast = (
        decode_rate(SEED, parse_hardware(f"4x{card}"), Setting(tensor=4), concurrency=512, context=128)
        for card in ("l40s", "h200")
    )
    assert slow.limited_by == "links between cards"
    assert fast.limited_by != "links between cards"


def test_a_draft_gains_less_than_its_acceptance_length_and_launches_cost_time() -> None:
    draft = Draft(weight_bytes=0.8e9, kv_bytes=2048, tokens=3, acceptance_length=3.1)
    plain, drafted, late = (
        decode_rate(LING, H20X4, setting, concurrency=1, context=2048).tokens_per_s
        for setting in (
            Setting(precision="fp8", tensor=4),
            Setting(precision="fp8", tensor=4, draft=draft),
            Setting(precision="fp8", tensor=4, draft=draft, launch_us=10),
        )
    )
    assert 1 < drafted / plain < 3.1
    assert late < drafted
    # 32 layers and three draft layers of 10 microseconds.
    assert 3.1 / late - 3.1 / drafted == pytest.approx(350e-6)


def test_prefill_is_arithmetic_and_its_attention_grows_with_the_square() -> None:
    short, long = (
        prefill_step(LING, H20X4.card, Setting(precision="fp8", tensor=4), prompts=1, length=length)
        for length in (16384, 131072)
    )
    assert short.limited_by == long.limited_by == "arithmetic"
    assert long.seconds > 8 * short.seconds
    causal = 4 * (131072 * 131073 / 2) * 4096 * 32
    linear = 2 * 131072 * (LING.active_parameters - LING.embedding)
    assert long.operations == pytest.approx(causal + linear)


@pytest.mark.slow
def test_every_card_has_sane_figures_and_this_machine_can_be_measured() -> None:
    for card in hardware_file().cards.values():
        assert card.fp8_tflops >= card.bf16_tflops > 0
        assert 0.3 < card.bandwidth_tb_s < 20
    here = measure_here(seconds=0.01)
    assert here.bandwidth_tb_s > 0
    assert here.bf16_tflops > 0


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(MeasurementError, match="2xabacus") as caught:
        parse_hardware("2xabacus")
    assert "h20" in caught.value.remedy
    with pytest.raises(MeasurementError) as caught:
        model_named("gpt-9")
    assert "seed-oss-36b" in caught.value.remedy
