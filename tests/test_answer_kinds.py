"""Kinds of answers: choices, quantities in clinical units, and what stays as it was for exact text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from validation.document import digest_of
from validation.errors import MeasurementError
from validation.tasks import items_digest, items_from, load_items
from validation.tasks.comparison import paired_outcomes
from validation.tasks.quantities import parse_quantity
from validation.tasks.scoring import Scoring, parse_choice, score

EXACT = {
    "id": "q1",
    "task": "dose",
    "language": "en",
    "messages": [{"role": "user", "content": "How much?"}],
    "answer": "20 mg",
    "meta": {},
}


def test_choices_are_read_in_the_ways_that_models_write_them() -> None:
    for said in (
        "B",
        "(b)",
        "B. aspirin",
        "**B**",
        "<B>",
        "\\boxed{B}",
        "Ｂ",
        "B)",
        "B、阿司匹林",
        " b. ",
        "选B",
        "B选项",
        "Option B",
    ):
        assert parse_choice(said) == "B", said
    for said in ("<A, C>", "ACD"[:2], "C和A", "A, C", "A、C", "A and C", "C;A"):
        assert parse_choice(said) == "A, C", said
    for said in ("", "Aspirin", "none", "A or maybe", "AA", "I think B"):
        assert parse_choice(said) is None, said
    assert score("choice", "A,C", "They differ.\nAnswer: C, A") == ("A, C", True)
    assert score("choice", "A,C", "答案：<A>") == ("A", False)
    assert score("choice", "B", "B") == ("B", True), "a bare letter needs no marker"
    assert score("choice", "B", "It could be B, but I would ask.") == (None, False)


@pytest.mark.parametrize(
    ("expected", "said", "right"),
    [
        ("0.5 mg", "500 µg", True),
        ("0.5 mg", "500 μg", True),  # the Greek letter, not the micro sign
        ("0.5 mg", "500 mcg", True),
        ("0.5 mg", "0.5", False),  # a dose without a unit
        ("0.5 mg", "0.5 g", False),
        ("0.5 mg", "0.5 ml", False),
        ("20 mg", "20-30 mg", False),
        ("20 mg", "20 mg twice daily", False),
        ("5.0×10⁹/L", "5000/µL", True),
        ("5.0×10⁹/L", "5*10^9/L", True),
        ("1,250 mg", "1.25 g", True),
        ("90 mg/dL", "0.9 g/L", True),
        ("5 mmol/L", "90 mg/dL", False),  # needs the molar mass
        ("10 mg/kg/d", "10 毫克/公斤/天", True),
        ("3 MIU", "3000000 IU", True),
        ("3 mIU", "3 MIU", False),
        ("120 mmHg", "15.9986864898 kPa", True),
        ("36.5 ℃", "36.5 °C", True),
        ("60 mL/min/1.73m²", "1 mL/s/1.73m2", True),
        ("25 %", "0.25", True),
        ("-5 mmol/L", "−5 mmol/L", True),
        ("7", "7", True),
        ("20 mg", "**20 mg**.", True),
        ("7", "7 mg", False),
    ],
)
def test_quantities_are_compared_exactly_across_units(expected: str, said: str, right: bool) -> None:
    assert score("numeric", expected, f"Answer: {said}")[1] is right


def test_both_ends_of_a_tolerance_are_right_and_nothing_beyond() -> None:
    percent, absolute = Scoring(tolerance="5%"), Scoring(tolerance="0.1")
    cases = [("20 mg", percent, "19 mg", "18.999 mg"), ("0.3 g", absolute, "400 mg", "400.1 mg")]
    for expected, scoring, end, beyond in cases:
        assert score("numeric", expected, f"Answer: {end}", scoring)[1]
        assert not score("numeric", expected, f"Answer: {beyond}", scoring)[1]
    lax = Scoring(unit="mg", unit_optional=True)
    assert score("numeric", "20", "Answer: 20", lax)[1] and score("numeric", "20", "20000 µg", lax)[1]
    assert not score("numeric", "20", "Answer: 20 mL", lax)[1]
    assert parse_quantity("0.1 g") == parse_quantity("0.1 g") and parse_quantity("1 stone") is None
    assert score("exact", "aspirin", "Answer: ASA", Scoring(accept=("ASA",)))[1]
    assert score("exact", "Aspirin", "Answer: aspirin", Scoring(ignore_case=True))[1]


def test_the_digest_of_exact_items_is_what_it_was_before_there_were_kinds() -> None:
    assert items_digest(items_from([EXACT])) == digest_of([EXACT])
    choice = items_from([EXACT | {"kind": "choice", "answer": "B"}])
    assert choice[0].model_dump(mode="json")["kind"] == "choice"
    assert items_from([choice[0].model_dump(mode="json")]) == choice


def test_a_row_that_cannot_be_scored_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    cases: list[tuple[dict[str, object], str]] = [
        ({"answer": ""}, "right answer"),
        ({"kind": "choice", "answer": "aspirin"}, "not letters"),
        ({"kind": "numeric", "answer": "20 stone"}, "not a number with a unit known"),
        ({"kind": "numeric", "answer": "20 mg", "scoring": {"tolerance": "some"}}, "tolerance 'some'"),
        ({"kind": "rubric", "answer": ""}, "scoring.rubrics"),
        ({"kind": "essay"}, "kind"),
    ]
    for change, message in cases:
        path.write_text(json.dumps(EXACT) + "\n\n" + json.dumps(EXACT | {"id": "q2"} | change) + "\n")
        with pytest.raises(MeasurementError, match=message) as raised:
            load_items(path)
        assert f"{path}, line 3:" in raised.value.message
    rubric = {"kind": "rubric", "answer": "", "scoring": {"rubrics": [{"criterion": "warns", "points": 5}]}}
    path.write_text(json.dumps(EXACT | rubric) + "\n")
    assert load_items(path)[0].kind == "rubric"
    with pytest.raises(MeasurementError, match="judge"):
        score("rubric", "", "text")


@pytest.mark.parametrize("n", range(1, 8))
def test_a_task_of_few_items_gets_a_verdict_too(n: int) -> None:
    # The n that would decide scales what was seen: of few items it must not see more pairs than there are.
    for lost in range(n + 1):
        row = paired_outcomes("few", [(True, k >= lost) for k in range(n)], 2.0)
        assert row.verdict in ("inconclusive", "inferior")
