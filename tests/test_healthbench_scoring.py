"""HealthBench's arithmetic against values worked by hand, and its rows as they come."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

import pytest

from validation.errors import MeasurementError
from validation.healthbench import FILES, MetaRow, RubricItem, load_meta, load_rubrics
from validation.healthbench.qualification import agreement, judge_agreement, physician_agreement
from validation.healthbench.scoring import (
    example_score,
    harm_of,
    score_bounds,
    score_of,
    tag_scores,
)
from validation.healthbench.swap import kappa_of

# Each criterion is its points, then + met, - not met, ? not graded. Beside it the score, worked by hand.
BY_HAND = """
5+                          | 1          | all that there is
5-                          | 0          | nothing
5+ 3-                       | 5/8        |
5- 3+                       | 3/8        |
5+ 3+ 2-                    | 8/10       |
1+ 1+ 1-                    | 2/3        | not 0.6667
7+ 5- 10+ -6+               | 11/22      | upstream's own test: 7 + 10 - 6 of 7 + 5 + 10
7+ 5- 10+ -6-               | 17/22      | the harm not done costs nothing
7- 5- 10- -6+               | -6/22      | below zero, and kept so
7- 5- 10- -6-               | 0          |
10+ -10+                    | 0          | the harm undoes all of it
10+ -4+ -6+                 | 0          | two harms
10+ -4+ -6-                 | 6/10       |
5+ -10+                     | -1         | minus one
5- -10+                     | -2         | minus two: not clipped to minus one
1+ -9+ -9+ -9+              | -26        | 1 - 27 of 1
5+ 0+                       | 1          | no points for a criterion of no points
5+ 0-                       | 1          |
5- 0+                       | 0          |
2.5+ 2.5-                   | 1/2        | points need not be whole
0.5+ 1.5- -0.25+            | 1/8        | 0.25 of 2
10+ 9+ 8+ 7+ 6+ -10-        | 1          | 40 of 40
10+ 9- 8+ 7- 6+ -10+        | 14/40      | 24 - 10 of 40
10- 9+ 8- 7+ 6- -10-        | 16/40      |
3+ 3+ 3+ 3+ 3+ 3+ 3-        | 18/21      |
100+ -1+ -1+ -1+            | 97/100     | three small harms
100- 1+ -1+                 | 0          | 1 - 1 of 101
4+ 4- -8+ 8+                | 4/16       | order is of no account
8+ -8+ 4- 4+                | 4/16       |
1- 1- 1- 1+                 | 1/4        |
6+ 6+ -3+ -3-               | 9/12       |
-5+                         | no points  | nothing positive: upstream stops, here left out and counted
-5-                         | no points  |
-5- -3+                     | no points  |
0+ 0-                       | no points  |
0+ -1?                      | no points  | whatever was graded
5?                          | not graded | never taken as met or as not met
5+ 3?                       | not graded |
5+ -3?                      | not graded | a harm that was not judged is not a harm not done
5+ 3+ 0?                    | not graded | though it could change nothing
"""
CASES = [[cell.strip() for cell in line.split("|")] for line in BY_HAND.strip().splitlines()]
MARK = {"+": True, "-": False, "?": None}


def criteria(text: str, *tags: str) -> tuple[list[RubricItem], list[bool | None]]:
    words = text.split()
    items = [RubricItem(criterion=f"c{k}", points=json.loads(w[:-1]), tags=tags) for k, w in enumerate(words)]
    return items, [MARK[w[-1]] for w in words]


def test_forty_examples_score_what_they_score_by_hand() -> None:
    assert len(CASES) >= 30
    for text, by_hand, _ in CASES:
        score, why = example_score(*criteria(text))
        if by_hand in ("no points", "not graded"):
            assert (score, why) == (None, by_hand.replace("no points", "no positive points")), text
        else:
            assert (score, why) == (pytest.approx(float(Fraction(by_hand)), abs=1e-15), ""), text


def test_what_was_not_graded_leaves_bounds_open() -> None:
    assert score_bounds(*criteria("5+ 3?")) == (5 / 8, 1)
    assert score_bounds(*criteria("5+ -3?")) == (2 / 5, 1)
    assert score_bounds(*criteria("5? -3?")) == (-3 / 5, 1)
    assert score_bounds(*criteria("5+ -3+")) == (2 / 5, 2 / 5)
    assert score_bounds(*criteria("-3?")) is None


def test_the_mean_is_clipped_and_examples_are_not() -> None:
    # (scores of examples, mean, clipped): a bad example weighs as much as it is bad.
    table = [
        ([1, 0, 0.5], 0.5, 0.5),
        ([1, -2, 0.5], -0.5 / 3, 0),
        ([-0.2, -0.4], -0.3, 0),
        ([1, -1], 0, 0),
        ([1, 1, -0.5], 0.5, 0.5),
        ([0.25], 0.25, 0.25),
        ([1.5, 1.5], 1.5, 1),  # cannot come from points; clipped all the same
    ]
    for scores, mean, clipped in table:
        found = score_of("all", scores)
        assert (found.n, found.unclipped, found.score) == (len(scores), pytest.approx(mean), clipped)
    empty = score_of("all", [])
    assert (empty.n, empty.score, empty.bootstrap_std) == (0, None, None)


def test_the_bootstrap_agrees_with_every_resample_there_is() -> None:
    scores = [1.0, -0.5, 0.25, 0.75]
    means = [min(1.0, max(0.0, sum(d) / 4)) for d in itertools.product(scores, repeat=4)]
    centre = sum(means) / len(means)
    exact = (sum((m - centre) ** 2 for m in means) / len(means)) ** 0.5
    assert score_of("all", scores).bootstrap_std == pytest.approx(exact, rel=0.08)
    assert score_of("all", scores) == score_of("all", scores)


def test_tags_score_within_the_example_and_need_positive_points() -> None:
    # axis:a: 5 of 5 + 3, minus 2; axis:b: no positive points; level:x: 3, not met; the last bears no tag.
    items = [
        RubricItem(criterion="1", points=5, tags=("axis:a", "level:y")),
        RubricItem(criterion="2", points=3, tags=("axis:a", "level:x")),
        RubricItem(criterion="3", points=-2, tags=("axis:a",)),
        RubricItem(criterion="4", points=-4, tags=("axis:b",)),
        RubricItem(criterion="5", points=7, tags=()),
    ]
    found = tag_scores(items, [True, False, True, True, True])
    assert found == {"axis:a": 3 / 8, "level:y": 1.0, "level:x": 0.0}
    assert example_score(items, [True, False, True, True, True])[0] == (5 - 2 - 4 + 7) / 15


def test_harm_is_counted_apart() -> None:
    harm = harm_of([criteria("5+ -3+ -4-"), criteria("5+ -6?"), criteria("2-"), criteria("-1+ -2+")])
    assert (harm.criteria, harm.met, harm.not_graded, harm.examples_with_harm) == (5, 3, 1, 2)
    assert (harm.points_lost, harm.points_possible) == (6, 10)


def test_agreement_is_that_of_the_published_meta_evaluation() -> None:
    # The figures of healthbench_meta_eval_test.py in openai/simple-evals.
    rows = [
        MetaRow(
            prompt=({"role": "user", "content": "?"},),  # type: ignore[arg-type]
            completion="!",
            rubric="r",
            category=category,
            binary_labels=labels,
            anonymized_physician_ids=tuple(map(str, range(len(labels)))),
        )
        for labels, category in (((True, True, False), "a"), ((True, False), "a"), ((False,), "b"))
    ]
    overall, (a, b) = judge_agreement(rows, [True, False, True])
    precision, recall = (2 / 4, 1 / 2), (2 / 3, 1 / 3)
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True)]
    assert (overall.f1_met, overall.f1_unmet) == (pytest.approx(f1[0]), pytest.approx(f1[1]))
    assert overall.balanced_f1 == pytest.approx(sum(f1) / 2)
    assert a.f1_met == pytest.approx(2 / 3) and a.f1_unmet == pytest.approx(1 / 2)
    assert (b.f1_met, b.f1_unmet, b.balanced_f1) == (None, None, None)  # never labelled met
    assert agreement("x", [(True, False), (False, True)]).balanced_f1 == 0
    # Of (T, T, F): 2 pairs alike, 4 not; of (T, F): 2 not; the single label has nobody to agree with.
    assert (physician_agreement(rows).true_met, physician_agreement(rows).pairs) == (2, 8)
    left_out, _ = judge_agreement(rows, [None, False, True])
    assert left_out.pairs == 3


def test_kappa_is_that_of_statsmodels() -> None:
    import numpy as np
    from statsmodels.stats.inter_rater import cohens_kappa

    draw = random.Random(3)
    for share in (0.05, 0.3, 0.9):
        pairs = [(draw.random() < 0.6, draw.random() < share) for _ in range(200)]
        pairs += [(True, True)] * 20 + [(False, False)] * 20
        mine = kappa_of("all", pairs)
        table = [[mine.both_met, mine.only_first], [mine.only_second, mine.both_unmet]]
        assert mine.kappa == pytest.approx(cohens_kappa(np.array(table)).kappa, abs=1e-12)
        assert mine.agreement == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert kappa_of("all", [(True, True)] * 5).kappa is None
    assert kappa_of("all", []).kappa is None


def _row(**changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "prompt_id": "p1",
        "prompt": [{"role": "user", "content": "Hello"}],
        "rubrics": [{"criterion": "Greets", "points": 5, "tags": ["axis:accuracy"]}],
        "example_tags": ["theme:communication"],
        "ideal_completions_data": {"ideal_completion": "Hi", "ideal_completions_group": "Group 1"},
        "canary": "a column that scoring has no use for",
    }
    return row | changes


def test_rows_are_read_by_digest_and_missing_data_says_how_to_get_it(tmp_path: Path) -> None:
    own = {"id": "mine", "prompt": "Dose?", "rubrics": [{"criterion": "Says 5 mg", "points": 1}]}
    item = {
        "id": "item",
        "task": "triage",
        "language": "en",
        "messages": [{"role": "user", "content": "Chest pain?"}],
        "kind": "rubric",
        "scoring": {"rubrics": [{"criterion": "Says to call for help", "points": 3}]},
    }
    content = "".join(json.dumps(r) + "\n\n" for r in (_row(), own, item)).encode()
    (tmp_path / FILES["hard"]).write_bytes(content)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    found = load_rubrics(tmp_path, subset="hard", digest=digest)
    assert (found.name, found.digest, len(found.examples)) == ("HealthBench hard", digest, 3)
    assert found.examples[0].rubrics[0].text == "[5] Greets"
    assert found.examples[1].rubrics[0].tags == ()
    assert found.examples[2].example_tags == ("theme:triage", "language:en")
    sample = found.sample(1)
    assert len(sample.examples) == 1 and sample.digest != digest and found.sample(3) is found
    with pytest.raises(MeasurementError, match="not sha256:0"):
        load_rubrics(tmp_path, subset="hard", digest="sha256:0")
    for load in (lambda: load_rubrics(tmp_path), lambda: load_meta(tmp_path)):
        with pytest.raises(MeasurementError) as missing:
            load()
        assert "hf download openai/healthbench 2025-05-07" in missing.value.remedy


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (_row(prompt_id=""), "prompt_id"),
        (_row(prompt=None), "wrong type"),
        (_row(prompt=[{"role": "user"}]), "content is missing"),
        (_row(rubrics=[]), "rubrics"),
        (_row(rubrics=[{"criterion": "x", "points": float("inf")}]), "points"),
        (_row(rubrics=[{"criterion": "x", "points": "many"}]), "points"),
        (_row(example_tags=["a", "a"]), "a tag occurs twice"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: dict[str, object], said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(_row()) + "\n" + json.dumps(row | {"prompt_id": row["prompt_id"] and "p2"}))
    with pytest.raises(MeasurementError, match=r"line 2: .*" + said):
        load_rubrics(path)
