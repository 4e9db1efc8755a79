"""Verdict rules, noise floor, safety items, the matrix and scores, on servers that answer by rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_chat import LoopbackChat

from packager.cli import run as command
from packager.recipe import GatesSpec
from packager.release.verdicts import check_tasks, conclude, margin_points
from validation.endpoint import Target
from validation.errors import MeasurementError
from validation.matrix import Variant, build_matrix, matrix_panel
from validation.noise import NoiseFloor, measure_noise, noise_panel
from validation.safety import check_safety, safety_gate, safety_panel
from validation.statistics import non_inferiority, paired_difference
from validation.tasks import AccuracyRun, Item, compare_accuracy, items_from, measure_accuracy
from validation.tasks.comparison import looked_at_together, paired_outcomes
from validation.tasks.scores import Score, compare_scores, score_table
from validation.verdict import RULES, passes, rule_passes_with, verdict_gates, verdict_panel

TASKS = ("allergy", "choice", "contraindication", "dose", "lookup", "triage")


def _items(per_task: int = 40) -> list[Item]:
    rows = [
        {
            "id": f"{task}-{k}",
            "task": task,
            "language": "en",
            "messages": [{"role": "user", "content": f"{task}-{k}"}],
            "answer": "yes",
            "meta": {"safety": True} if task == "allergy" else {},
        }
        for task in TASKS
        for k in range(per_task)
    ]
    return items_from(rows)


def _measure(cache: Path, items: list[Item], label: str, wrong: Callable[[str], bool]) -> AccuracyRun:
    with LoopbackChat(lambda m: "Answer: no" if wrong(m) else "Answer: yes") as server:
        return measure_accuracy(Target(server.url, "model", f"sha256:{label}", label, cache), items)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def runs(cache: Path) -> tuple[AccuracyRun, ...]:
    """BF16 and three variants: FP8 loses two safety items, YaRN six doses, the draft nothing."""
    items = _items()
    fp8 = {"triage-1", "allergy-3", "allergy-4"}
    yarn = fp8 | {f"dose-{k}" for k in range(6)}
    wrong = {"BF16": {"triage-1", "triage-2"}, "FP8": fp8, "FP8+YaRN": yarn, "FP8+YaRN+EAGLE3": yarn}
    return tuple(_measure(cache, items, label, ids.__contains__) for label, ids in wrong.items())


@pytest.fixture(scope="module")
def noise(cache: Path, runs: tuple[AccuracyRun, ...]) -> NoiseFloor:
    """BF16 asked twice: the second time allergy-3 and choice-0 come out otherwise."""
    first, items = runs[0], _items()
    asked: list[str] = []

    def answer(message: str) -> str:
        asked.append(message)
        return "Answer: no" if message in ("triage-1", "triage-2", "allergy-3", "choice-0") else "Answer: yes"

    with LoopbackChat(answer) as server:
        target = Target(server.url, "model", "sha256:BF16", "BF16", cache)
        found = measure_noise(target, items, first, margin_points=2, again_concurrency=1)
        assert asked == [item.id for item in items[::-1]]  # asked anew, in another order
        assert measure_noise(target, items, first, margin_points=2, again_concurrency=1) == found
        assert len(asked) == len(items)  # and not a third time
    with pytest.raises(MeasurementError, match="not its noise"):
        measure_noise(target, items[1:], first, margin_points=2)
    return found


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 600), st.floats(0.002, 0.2))
def test_rules_are_the_interval_against_the_margin(lost: int, gained: int, rest: int, margin: float) -> None:
    n = lost + gained + rest
    interval = paired_difference(lost, gained, n)
    if min(abs(end + margin) for end in interval) < 1e-9:
        return
    verdict = non_inferiority(interval, margin)
    assert passes("non-inferior", lost, gained, n, margin) == (verdict == "non-inferior")
    assert passes("not inferior", lost, gained, n, margin) == (verdict != "inferior")
    for rule in RULES:  # one more loss never helps
        assert passes(rule, lost, gained, n, margin) or not passes(rule, lost + 1, gained, n + 1, margin)


def test_an_unchanged_model_is_failed_no_oftener_than_the_rule_says() -> None:
    for n in (240, 1273):
        for rule in ("not inferior", "no loss shown"):
            assert rule_passes_with(rule, n, 0.05, 0.0, 0.01) >= 0.975
        # And a model that lost the margin is called non-inferior no oftener.
        assert rule_passes_with("non-inferior", n, 0.05, 0.01, 0.01) <= 0.026


def test_gates_follow_the_rule_and_say_what_would_decide(runs: tuple[AccuracyRun, ...]) -> None:
    first, *_, last = runs
    compared = compare_accuracy(first, last, margin_points=2, task_margins={"dose": 2})
    row = compared.overall
    assert (row.only_reference, row.only_candidate, row.verdict) == (8, 1, "inconclusive")
    outcomes = {}
    for rule in RULES:
        gates = verdict_gates(rule, compared, ["dose"])
        outcomes[rule] = [gate.outcome for gate in gates]
        assert all("items would decide" in gate.note for gate in gates if "inconclusive" in gate.note)
    # 8 lost and 1 gained of 240: one-sided p = 0.020 for a loss, 2 points neither shown nor ruled out. Of 40
    # doses 6 are lost: more than 2 points.
    assert outcomes == {
        "non-inferior": ["fail", "fail"],
        "not inferior": ["pass", "fail"],
        "no loss shown": ["pass", "pass"],
    }
    # The loss is shown if that is all that is asked; two questions need stronger evidence.
    assert [gate.outcome for gate in verdict_gates("no loss shown", compared)] == ["fail"]
    assert [gate.outcome for gate in verdict_gates(None, compared)] == ["not gated"]
    with pytest.raises(MeasurementError, match="named for surgery"):
        compare_accuracy(first, last, margin_points=2, task_margins={"surgery": 1})


def test_a_task_is_inferior_only_if_that_survives_holm() -> None:
    def row(lost: int) -> list[tuple[bool, bool]]:
        return [(True, False)] * lost + [(True, True)] * (200 - lost)

    alone = paired_outcomes("one", row(6), 1)
    assert alone.verdict == "inferior" and alone.p_holm is None
    unchanged = [paired_outcomes(f"t{k}", row(0), 1) for k in range(5)]
    together = looked_at_together([alone, *unchanged])
    assert together[0].verdict == "inconclusive"
    assert together[0].n_to_decide is not None and together[0].n_to_decide > 200
    assert together[0].p_holm == pytest.approx(6 * alone.p_value)
    assert looked_at_together([paired_outcomes("one", row(30), 1), *unchanged])[0].verdict == "inferior"


def test_the_noise_floor_stands_beside_what_candidates_change(
    runs: tuple[AccuracyRun, ...], noise: NoiseFloor
) -> None:
    assert (noise.flips, noise.texts_changed, noise.unstable) == (2, 2, {"allergy-3", "choice-0"})
    assert noise.low < 2 / 240 < noise.high
    panel = noise_panel(noise, [compare_accuracy(runs[0], runs[1], margin_points=2)])
    (table,) = panel.tables
    assert [row[:4] for row in table.rows] == [("BF16 again", 240, 2, 0), ("FP8", 240, 2, 1)]
    assert [row[-1] for row in table.rows] == [None, 1]  # allergy-3 flips without FP8 too
    assert len(panel.unfoldings) == 2 and panel.subjects == ("sha256:BF16",)


def test_safety_items_gate_by_themselves_beyond_noise(
    runs: tuple[AccuracyRun, ...], noise: NoiseFloor
) -> None:
    marked = check_safety(runs[0], runs[1], margin_points=2)
    assert marked is not None and marked.tasks == ("allergy",)  # by meta.safety alone
    assert marked.beyond_noise == 2 and marked.in_noise is None
    check = check_safety(runs[0], runs[1], margin_points=2, tasks=["contraindication"], noise=noise)
    assert check is not None and (check.paired.n, check.beyond_noise, check.noise_flips) == (80, 1, 1)
    assert [f.id for f in check.right_to_wrong] == ["allergy-3", "allergy-4"]
    assert [safety_gate(check, bound, "FP8").outcome for bound in (0, 1, None)] == [
        "fail", "pass", "not gated",
    ]  # fmt: skip
    assert safety_gate(None, 0, "FP8").outcome == "not measured"
    panel = safety_panel([check])
    assert "(also in noise)" in panel.unfoldings[0].line
    assert dict(panel.unfoldings[1].text)["FP8"] == "Answer: no"
    with pytest.raises(MeasurementError, match="surgery"):
        check_safety(runs[0], runs[1], margin_points=2, tasks=["surgery"])


def test_the_matrix_tells_each_step_apart(runs: tuple[AccuracyRun, ...]) -> None:
    bf16, fp8, yarn, drafted = (
        Variant(run, frozenset(features.split()))
        for run, features in zip(runs, ("", "FP8", "FP8 YaRN", "FP8 YaRN EAGLE3"), strict=True)
    )
    matrix = build_matrix([bf16, fp8, yarn, drafted], margin_points=2, wanted=[frozenset(("FP8", "EAGLE3"))])
    assert [(s.added, s.before, s.apart) for s in matrix.steps] == [
        (("FP8",), "BF16", True), (("YaRN",), "FP8", True), (("EAGLE3",), "FP8+YaRN", True),
    ]  # fmt: skip
    assert [s.paired.only_reference for s in matrix.steps] == [2, 6, 0]
    assert sum(s.paired.difference_points for s in matrix.steps) == pytest.approx(
        matrix.total.difference_points
    )
    assert matrix.steps[1].paired.p_holm == pytest.approx(3 * 2 / 2**6)
    assert matrix.missing == (("EAGLE3", "FP8"),)
    panel = matrix_panel(matrix)
    assert "Not measured: EAGLE3 + FP8." in panel.notes
    # Without the run between, the two features come together, and the matrix says so.
    step = build_matrix([bf16, yarn], margin_points=2).steps[0]
    assert (step.added, step.apart) == (("FP8", "YaRN"), False)
    with pytest.raises(MeasurementError, match="same features"):
        build_matrix([bf16, bf16], margin_points=2)


def test_a_release_draws_its_conclusions_from_the_runs_it_has(
    runs: tuple[AccuracyRun, ...], noise: NoiseFloor
) -> None:
    spec = GatesSpec(
        max_accuracy_loss_points=3,
        task_margins={"dose": 5},
        accuracy_verdict="non-inferior",
        served_verdict="not inferior",
        safety_tasks=("contraindication",),
        max_safety_flips=0,
    )
    assert margin_points(spec) == 3
    found = conclude(spec, "FP8", runs, noise)
    gates = found.gates(spec)
    # FP8 rules out 3 points over all, but not 5 on 40 doses; all that is served shows no 3 points lost, and
    # the one safety item that noise does not explain is one too many.
    assert [gate.outcome for gate in gates] == ["pass", "fail", "pass", "fail"]
    assert [panel.key for panel in found.panels(spec)] == ["verdicts", "matrix", "noise-floor", "safety"]
    summary = json.loads(json.dumps(found.summary()))
    assert summary["noise_floor"] == {"flips": 2, "items": 240}
    assert summary["safety_lost"]["FP8"] == 1
    assert found.matrix.missing == (("EAGLE3", "FP8"),)
    alone = runs[1].model_copy(update={"label": "FP8+EAGLE3", "subject": "sha256:FP8+EAGLE3"})
    whole = conclude(spec, "FP8", runs, noise, alone)
    assert whole.matrix.missing == ()
    assert all(step.apart for step in whole.matrix.steps)
    assert whole.comparisons == found.comparisons, "verdicts are on what is shipped"
    without = conclude(GatesSpec(), "FP8", runs, None)
    assert "noise-floor" not in [panel.key for panel in without.panels(GatesSpec())]
    assert {gate.outcome for gate in without.gates(GatesSpec())} == {"not gated"}
    with pytest.raises(Exception, match=r"safety_tasks names surgery"):
        check_tasks(GatesSpec(safety_tasks=("surgery",)), _items(1))


def test_the_panel_of_verdicts_says_what_the_rules_do_by_chance(runs: tuple[AccuracyRun, ...]) -> None:
    panel = verdict_panel([compare_accuracy(runs[0], runs[2], margin_points=2)], ["no loss shown"])
    verdicts, chances = panel.tables
    assert [row[0] for row in verdicts.rows] == ["All", *TASKS]
    rows = {str(row[0]): row[1:] for row in chances.rows}
    same, one, two = (float(x or 0) for x in rows["no loss shown"])
    assert same >= 97.5 > one > two
    assert "inconclusive" in panel.summary and "would decide" in panel.summary


def test_scores_of_a_conversation_count_together() -> None:
    def scores(shift: dict[str, float]) -> list[Score]:
        return [
            Score(
                id=f"{task}{k}",
                task=task,
                conversation=f"{task}{k // 2}",
                score=0.5 + shift.get(task, 0) * (k % 5),
            )
            for task in ("chat", "plan")
            for k in range(80)
        ]

    compared = compare_scores(
        scores({}), scores({"plan": -0.1})[::-1], labels=("BF16", "FP8"), margin_points=5
    )
    chat, plan = compared.by_task
    # Nothing moved in 40 conversations: that rules out no loss of 5 points.
    assert (chat.verdict, chat.conversations, chat.moved) == ("inconclusive", 40, 0)
    assert plan.difference_points == pytest.approx(-20) and plan.verdict == "inferior"
    assert plan.low_points < plan.difference_points < plan.high_points
    assert plan.p_holm is not None and plan.p_holm < 1e-6
    assert compared.overall.items == 160
    assert len(score_table(compared).rows) == 3
    with pytest.raises(MeasurementError, match="1 items are scored for one"):
        compare_scores(scores({}), scores({})[1:], labels=("a", "b"), margin_points=5)


def test_the_verb_prints_verdicts_in_eighty_columns_and_gates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "items.jsonl"
    path.write_text("".join(item.model_dump_json() + "\n" for item in _items(20)))
    before, floor = tmp_path / "before.json", tmp_path / "noise.json"

    def accuracy(url: str, subject: str, *more: str) -> int:
        fixed = ("--items", str(path), "--cache", str(tmp_path / "cache"), "--subject", subject)
        return command(["validate", "accuracy", "--url", url, *fixed, *more])

    with LoopbackChat(lambda _: "Answer: yes") as server:
        assert accuracy(server.url, "a", "--label", "BF16", "--out", str(before), "--again", str(floor)) == 0
    assert "asked again: 0 of 120 items flip" in capsys.readouterr().out
    wrong = {f"{task}-{k}" for task in TASKS[:3] for k in (3, 4)}
    with LoopbackChat(lambda m: "Answer: no" if m in wrong else "Answer: yes") as server:
        url = server.url
        compare = ("--reference", str(before), "--noise", str(floor), "--label", "FP8")
        assert accuracy(url, "b", *compare, "--safety-task", "contraindication") == 0
        said = capsys.readouterr().out
        table = said[said.index("FP8 against BF16") :].splitlines()
        assert [line for line in table if len(line) > 80] == []
        assert next(line for line in table if line.startswith("all ")).split()[-1] == "inconclusive"
        assert any(line.startswith("contraindication ") and "inconclusive" in line for line in table)
        assert "would decide" in said and "finds" in said
        assert "safety: 4 of 40 turned right to wrong, 4 of them beyond noise" in said
        assert accuracy(url, "b", *compare, "--rule", "non-inferior") == 4
        assert accuracy(url, "b", *compare, "--rule", "no loss shown") == 4
        assert accuracy(url, "b", *compare, "--task-margin", "dose=20", "--max-safety-flips", "2") == 0
        capsys.readouterr()
        assert accuracy(url, "b", *compare, "--max-safety-flips", "1", "--json") == 4
        document = json.loads(capsys.readouterr().out)
        assert [gate["outcome"] for gate in document["gates"]] == ["pass", "fail"]
        assert accuracy(url, "b", *compare, "--task-margin", "dose") == 2
        assert accuracy(url, "b", "--max-safety-flips", "1") == 2
