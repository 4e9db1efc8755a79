"""Claims about speed: each verdict, and the arithmetic behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from packager.cli import run as packager
from validation.claims import Claim, Measured, judge, load_claims
from validation.errors import MeasurementError

ALONE = {"card": "h20", "count": 1, "concurrency": 1, "precision": "bf16", "context": 0}


def dense(value: float, **conditions: Any) -> Claim:
    return Claim(
        id="dense",
        says=f"the dense 36B decodes at {value:g} tokens/s",
        source="nowhere",
        quantity="output tokens/s",
        value=value,
        model="seed-oss-36b",
        conditions={**ALONE, **conditions},  # type: ignore[arg-type]
    )


def test_a_dense_36b_at_67_tokens_a_second_on_one_h20_is_impossible() -> None:
    judged = judge(dense(67))
    assert judged.verdict == "impossible"
    assert judged.bound == pytest.approx(56.57, abs=0.01)
    assert judged.share_of_bound == pytest.approx(1.184, abs=0.001)
    for term in ("70.7 GB of weights", "4 TB/s", "17.68 ms", "at most 56.6 tokens/s"):
        assert term in judged.arithmetic
    assert judge(dense(50)).verdict == "consistent"


def test_a_claim_beyond_the_best_completion_is_impossible_whatever_is_left_open() -> None:
    vague = dense(1e7, count=None, concurrency=None, context=None)
    assert judge(vague).verdict == "impossible"
    assert judge(vague.model_copy(update={"value": 67.0})).verdict == "unfalsifiable"


def test_what_does_not_fit_in_memory_has_no_speed() -> None:
    judged = judge(dense(1, card="l40s"))
    assert (judged.verdict, judged.bound) == ("impossible", 0.0)
    assert "fit in memory" in judged.arithmetic


def test_the_published_claims() -> None:
    judged = {claim.id: judge(claim) for claim in load_claims("antangelmed")}
    assert {one.verdict for one in judged.values()} == {"unfalsifiable"}, "none states all conditions"
    three = judged["three-times-dense"]
    assert "concurrency" in three.missing
    assert three.lowest is not None
    assert three.bound is not None
    assert three.lowest < 1 < 3 < three.bound
    assert judged["draft-humaneval"].missing == ("count", "context")


def test_a_ratio_beyond_that_of_the_bounds_is_unexplained_and_not_called_impossible() -> None:
    ratio = load_claims("antangelmed")[1].model_copy(update={"value": 30.0})
    assert judge(ratio).verdict == "unexplained"


def test_a_draft_cannot_gain_more_than_it_has_accepted() -> None:
    claim = next(c for c in load_claims("antangelmed") if c.id == "draft-math500")
    stated = claim.conditions.model_copy(update={"count": 4, "context": 2048})
    assert judge(claim.model_copy(update={"conditions": stated})).verdict == "consistent"
    greedy = claim.model_copy(update={"conditions": stated, "value": 3.5})
    assert judge(greedy).verdict == "impossible"
    # SpecBundle measured 1.70 at batch 8, where the ratio of the bounds is 1.29: strange is not impossible.
    few = stated.model_copy(update={"concurrency": 8, "draft_tokens": 3, "precision": "bf16"})
    assert judge(claim.model_copy(update={"conditions": few, "value": 1.7})).verdict == "unexplained"


def test_measurements_decide_only_under_the_conditions_stated() -> None:
    def measured(value: float, **conditions: Any) -> Measured:
        return Measured(
            quantity="output tokens/s",
            value=value,
            model="seed-oss-36b",
            conditions={**ALONE, **conditions},  # type: ignore[arg-type]
            source="sha256:0",
        )

    assert judge(dense(40), [measured(41)]).verdict == "verified"
    assert judge(dense(40), [measured(39)]).verdict == "refuted"
    assert judge(dense(40), [measured(41, concurrency=8)]).verdict == "consistent"


def test_the_verb_prints_wraps_and_exits_4_where_a_claim_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert packager(["validate", "claims", "antangelmed"]) == 0
    out = capsys.readouterr().out
    assert "UNFALSIFIABLE" in out
    assert "not stated: count, concurrency" in out
    assert max(map(len, out.splitlines())) <= 80
    file = tmp_path / "claims.json"  # JSON is YAML
    file.write_text(json.dumps([dense(67).model_dump()]))
    assert packager(["validate", "claims", str(file), "--json"]) == 4
    printed = capsys.readouterr()
    assert json.loads(printed.out)["claims"][0]["verdict"] == "impossible"
    assert "1 of 1 claims do not hold: dense" in printed.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- {id: a", "not YAML"),
        ("- {id: a}", "0.says"),
        ("{}", "list"),
        ("- {conditions: {card: x}}", "'x' is none"),
    ],
)
def test_malformed_files_are_named(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "claims.yaml"
    full = {"id": "a", "says": "b", "source": "c", "quantity": "output tokens/s", "value": 1, "model": "m"}
    file.write_text(text.replace("- {conditions", f"- {{{json.dumps(full)[1:-1]}, conditions"))
    with pytest.raises(MeasurementError, match=says):
        load_claims(file)
    with pytest.raises(MeasurementError, match="cannot read"):
        load_claims(tmp_path / "none.yaml")
