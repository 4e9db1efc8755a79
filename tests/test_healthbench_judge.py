"""Judges over real HTTP: right, wrong on purpose, babbling, late, silent; resumed; qualified; swapped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from loopback_chat import LoopbackChat

from packager.cli import run
from packager.nano import language
from packager.nano.rubric_judge import MODEL, RubricJudge, verdict
from packager.nano.rubrics import REPLIES, criteria, meta_rows, reply, rubric_rows, write_rubrics
from validation.endpoint import Message, Target
from validation.errors import MeasurementError
from validation.healthbench import (
    Judge,
    Question,
    Rubrics,
    compare_judges,
    compare_rubrics,
    grader_prompt,
    load_meta,
    load_rubrics,
    measure_rubrics,
    qualify,
    rubric_gates,
    rubric_panel,
)
from validation.healthbench.grading import SYSTEM, read_reply
from validation.healthbench.rows import MetaRows, RubricItem
from validation.healthbench.run import RubricRun

IDEAL = {row["prompt"][-1]["content"]: row["ideal_completions_data"] for row in rubric_rows(4)}


def ideal(question: str) -> str:
    """The answer of a model that makes no mistake."""
    return str(IDEAL[question]["ideal_completion"])


def careless(question: str) -> str:
    """A model that is wrong, with harm, on one task of the six."""
    return "Answer: 9999 mg" if "mg/kg" in question else ideal(question)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rubrics, MetaRows]:
    paths = write_rubrics(tmp_path_factory.mktemp("rubrics"), per_task=2, meta_per_task=2)
    return load_rubrics(paths["rows"]), load_meta(paths["meta"])


def judge_of(served: RubricJudge | LoopbackChat, cache: Path, **more: object) -> Judge:
    subject = served.subject if isinstance(served, RubricJudge) else "judge"
    model = MODEL if isinstance(served, RubricJudge) else "model"
    return dataclasses.replace(Judge(served.url, model, subject, cache, backoff_s=0.01), **more)  # type: ignore[arg-type]


def measured(
    data: tuple[Rubrics, MetaRows], judge: Judge, cache: Path, subject: str = "a", *, qualified: bool = True
) -> RubricRun:
    with LoopbackChat(ideal if subject == "a" else careless) as model:
        target = Target(model.url, "model", subject, f"model {subject}", cache)
        qualification = qualify(judge, data[1], min_balanced_f1=0.9) if qualified else None
        return measure_rubrics(target, judge, data[0], qualification=qualification)


def test_the_grader_prompt_is_the_published_one() -> None:
    turns = [Message(role="user", content="<<rubric_item>>?"), Message(role="assistant", content="no \\1")]
    prompt = grader_prompt(turns, "[-5] Is rude")
    assert (
        "# Conversation\nuser: <<rubric_item>>?\n\nassistant: no \\1\n\n# Rubric item\n[-5] Is rude\n\n"
        in prompt
    )
    template = prompt.replace("user: <<rubric_item>>?\n\nassistant: no \\1", "<<conversation>>")
    template = template.replace("[-5] Is rude", "<<rubric_item>>")
    # SHA-256 of GRADER_TEMPLATE in healthbench_eval.py of openai/simple-evals at ee3b031.
    digest = hashlib.sha256(template.encode()).hexdigest()
    assert digest == "2adffd51fd259554ebcd036ad1072d4aa2b7ce3aec2bbffe36271f911632ed3c"
    messages = Question(turns, "[-5] Is rude").request.messages
    assert [(m.role, m.content) for m in messages] == [("system", SYSTEM), ("user", prompt)]


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ('{"explanation": "x", "criteria_met": true}', True),
        ('```json\n{"explanation": "x", "criteria_met": false}\n```', False),
        (' {"criteria_met": true} ', True),
        ('{"explanation": ["x"], "criteria_met": true}', True),
        ('{"criteria_met": "true"}', None),
        ('{"criteria_met": 1}', None),
        ('{"criteria_met": null}', None),
        ('{"explanation": "x"}', None),
        ('{"criteria_met": true, "criteria_met": false}', None),
        ('Sure! {"criteria_met": true}', None),
        ('{"criteria_met": true} {"criteria_met": false}', None),
        ('{"criteria_met": tr', None),
        ("[true]", None),
        ("[" * 100_000, None),
        ("", None),
    ],
)
def test_a_reply_is_a_judgement_or_it_is_not(text: str, met: bool | None) -> None:
    if met is None:
        with pytest.raises(ValueError):
            read_reply(text)
    else:
        assert read_reply(text)[0] is met


def test_the_rules_say_what_the_construction_says() -> None:
    checked = 0
    for task in language.TASKS:
        stream = language.samples(task, "rules", held_out=True)
        for sample in (next(stream) for _ in range(12)):
            for made in REPLIES:
                talk = [Message(role="user", content=sample.question)]
                talk.append(Message(role="assistant", content=reply(sample, made)))
                for criterion in criteria(sample):
                    found = verdict(grader_prompt(talk, f"[{criterion.points}] {criterion.text}"))
                    assert found is not None
                    assert found[0] == (made in criterion.met_in), (criterion, reply(sample, made))
                    checked += 1
    assert checked > 1000
    assert verdict(grader_prompt(talk, "[5] Is kind.")) is None
    assert {(r["binary_labels"][0], r["category"]) for r in meta_rows(4)} == {
        (met, category)
        for met in (True, False)
        for category in ("right answer", "shows the working", "harmful answer", "no answer line")
    }


def test_a_right_model_scores_all_and_a_careless_one_is_found(
    data: tuple[Rubrics, MetaRows], tmp_path: Path
) -> None:
    with RubricJudge() as served:
        judge = judge_of(served, tmp_path)
        good, bad = measured(data, judge, tmp_path), measured(data, judge, tmp_path, "b")
        asked = served.asked
        assert measured(data, judge, tmp_path) == good and served.asked == asked
    assert good.counts and good.overall.score == 1 and (good.harm.met, good.not_graded) == (0, 0)
    assert {s.name: s.score for s in bad.by_example_tag}["theme:dose"] == 0
    assert {s.name: s.score for s in bad.by_example_tag}["theme:triage"] == 1
    assert (bad.harm.met, bad.harm.points_lost, bad.harm.examples_with_harm) == (2, 16, 2)
    # 2 of 12: no point of 5 + 3 x 2, minus 8: -8/11 each.
    assert bad.overall.score == pytest.approx((10 - 2 * 8 / 11) / 12)
    found = compare_rubrics(good, bad, margin_points=5)
    paired = found.scores.overall
    assert paired.difference_points == pytest.approx(100 * (bad.overall.unclipped or 0) - 100)
    assert (paired.items, paired.moved, found.new_harm, found.harm_p_value) == (12, 2, 2, 0.5)
    # Scores below zero reach beyond a difference of 100 points, and so do the intervals.
    assert all(row.low_points <= row.difference_points <= row.high_points for row in found.scores.by_task)
    by_theme = {row.scope: row.difference_points for row in found.scores.by_task}
    assert by_theme["theme:dose"] == pytest.approx(-100 - 800 / 11) and by_theme["theme:triage"] == 0
    assert (
        "above" in found.harm_flips[0].criterion and found.harm_flips[0].candidate_text == "Answer: 9999 mg"
    )
    outcomes = [g.outcome for g in rubric_gates(bad, found, min_score=0.9, max_loss_points=5, max_new_harm=0)]
    assert outcomes == ["fail", "fail", "fail"]
    panel = rubric_panel([good, bad], [found])
    assert "2 harm criteria newly met" in panel.summary
    assert panel.subjects == ("a", "b") and len(panel.unfoldings) == 2
    captions = " | ".join(table.caption for table in panel.tables)
    for shown in ("Score, of 100", "negative points", "model b against", "by theme", "by axis", "physicians"):
        assert shown in captions
    with pytest.raises(MeasurementError, match="judges"):
        other = good.judge.model_copy(update={"name": "other"})
        compare_rubrics(good, bad.model_copy(update={"judge": other}), margin_points=5)


@pytest.mark.slow
def test_a_judge_that_babbles_is_asked_again_and_neither_hangs_nor_skews(
    data: tuple[Rubrics, MetaRows], tmp_path: Path
) -> None:
    with RubricJudge(rubbish=0.3) as served:
        judge = judge_of(served, tmp_path, rounds=6)
        found = measured(data, judge, tmp_path, "b")
        asked = served.asked
        assert measured(data, judge, tmp_path, "b") == found and served.asked == asked
    with RubricJudge() as served:
        right = measured(data, judge_of(served, tmp_path / "right"), tmp_path, "b")
    rounds = [g.judgement.rounds for r in found.results for g in r.graded]
    assert max(rounds) > 2 and sum(rounds) > 1.2 * len(rounds)
    assert found.not_graded <= 2
    both = [(a.met, b.met) for a, b in zip(found.results, right.results, strict=True) if None not in a.met]
    assert all(one == other for one, other in both)

    with RubricJudge(rubbish=1) as served:
        babble = measured(data, judge_of(served, tmp_path / "babble"), tmp_path, qualified=False)
    assert babble.not_graded == babble.criteria and babble.overall.score is None
    assert babble.without_score == {"not graded": 12} and not babble.counts
    assert (babble.lowest, babble.highest) == (0, 1)
    assert "unreadable reply, 3 of 3" in babble.results[0].graded[0].judgement.fault
    [gate] = rubric_gates(babble, min_score=0)
    assert gate.outcome == "not measured" and "not graded" in gate.note


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_late_answers_and_silence_end_in_not_graded_in_bounded_time(
    data: tuple[Rubrics, MetaRows], tmp_path: Path
) -> None:
    with RubricJudge(never=1) as served:
        impatient = judge_of(served, tmp_path, timeout_s=0.05, attempts=2, give_up_after=8)
        silent = measured(data, impatient, tmp_path, qualified=False)
        assert served.asked < 40  # of 60 criteria, twice each: the judge was given up on
    assert silent.not_graded == silent.criteria and not silent.counts
    faults = {g.judgement.fault for r in silent.results for g in r.graded}
    assert {"gave no answer to" in f or "the judge was given up on" in f for f in faults} == {True}
    assert len({"given up" in fault for fault in faults}) == 2

    with RubricJudge(late=0.1, late_s=2) as served:
        hasty = judge_of(served, tmp_path / "late", timeout_s=1, attempts=1)
        late = measured(data, hasty, tmp_path, "b", qualified=False)
        assert 0 < late.not_graded < late.criteria / 2
        patient = dataclasses.replace(hasty, timeout_s=30)
        asked = served.asked
        whole = measured(data, patient, tmp_path, "b", qualified=False)
        assert served.asked == asked + late.not_graded  # what was judged is kept, what was not is asked again
    assert whole.not_graded == 0
    for a, b in zip(late.results, whole.results, strict=True):
        assert all(one in (None, other) for one, other in zip(a.met, b.met, strict=True))


QUESTION = [Question([Message(role="assistant", content="x")], "[1] y")]


def test_a_judge_that_refuses_is_said_and_one_that_stumbles_is_asked_again(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "never seen", lambda *_: 401) as server:
        with pytest.raises(MeasurementError, match="HTTP 401"):
            judge_of(server, tmp_path).grade(QUESTION)
        [key] = [json.dumps(b) for b in server.bodies]
        assert '"temperature": 0.5' in key and '"max_tokens": 2048' in key
    # One question is too long for the judge, one is not: the first is not graded, and not asked for again.
    short = Question([Message(role="assistant", content="y")], "[1] y")
    long = Question([Message(role="assistant", content="y" * 500)], "[1] y")
    with LoopbackChat(lambda _: '{"criteria_met": false}', max_characters=3400) as server:
        one, other = judge_of(server, tmp_path).grade([short, long])
        assert one.met is False and other.met is None and "longer than" in other.fault
        assert len(server.bodies) == 2
    with LoopbackChat(
        lambda _: '{"criteria_met": true}', lambda _, before: 503 if before < 2 else None
    ) as server:
        [found] = judge_of(server, tmp_path).grade(QUESTION)
        assert found.met is True


def test_a_judge_that_dies_midway_loses_nothing_and_is_asked_nothing_twice(tmp_path: Path) -> None:
    questions = [Question([Message(role="assistant", content="x")], f"[1] criterion {k}") for k in range(40)]
    met = '{"criteria_met": true}'
    with LoopbackChat(lambda _: met, lambda *_: "disconnect" if len(server.bodies) > 25 else None) as server:
        judge = judge_of(server, tmp_path, attempts=1, give_up_after=4, concurrency=2)
        before = judge.grade(questions)
    kept = sum(found.met is True for found in before)
    assert 20 <= kept < 40 and all(found.fault for found in before if found.met is None)
    with LoopbackChat(lambda _: met) as server:
        after = judge_of(server, tmp_path, concurrency=2).grade(questions)
        assert len(server.bodies) == 40 - kept
    assert all(found.met for found in after)


def test_a_wrong_judge_is_not_qualified_and_its_scores_do_not_count(
    data: tuple[Rubrics, MetaRows], tmp_path: Path
) -> None:
    with RubricJudge(error_rate=0.25) as served:
        judge = judge_of(served, tmp_path)
        wrong = measured(data, judge, tmp_path)
    with RubricJudge() as served:
        right = measured(data, judge_of(served, tmp_path), tmp_path)
    assert right.qualification and right.qualification.qualified and right.counts
    assert right.qualification.overall.balanced_f1 == pytest.approx(0.975, abs=0.025)
    assert wrong.qualification and not wrong.qualification.qualified and not wrong.counts
    assert 0.6 < (wrong.qualification.overall.balanced_f1 or 0) < 0.85
    gates = rubric_gates(
        wrong, compare_rubrics(wrong, wrong, margin_points=1), min_score=0, max_loss_points=9
    )
    assert [g.outcome for g in gates] == ["not measured", "not measured", "not gated"]
    assert rubric_panel([wrong]).summary.startswith("These scores do not count: the judge is not qualified")
    with pytest.raises(MeasurementError, match="the qualification is of"):
        target = Target("http://127.0.0.1:9", "model", "a", "model a", tmp_path)
        measure_rubrics(target, judge, data[0], qualification=right.qualification)

    swap = compare_judges(right, wrong)
    assert swap.overall.n == right.criteria and 0.6 < (swap.overall.agreement or 0) < 0.9
    assert swap.overall.only_first + swap.overall.only_second > 0.1 * right.criteria
    assert (swap.difference_points or 0) < -20 and (swap.overall.kappa or 1) < 0.8
    assert compare_judges(right, right).overall.kappa == 1
    assert "Judge swap" in rubric_panel([right], swap=swap).tables[-1].caption


@pytest.mark.slow
def test_the_command_measures_compares_and_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_rubrics(tmp_path / "data", per_task=4, meta_per_task=4)
    one, other = tmp_path / "a.json", tmp_path / "b.json"

    def line(url: str, subject: str, *more: object) -> list[str]:
        shared = [
            "--url",
            url,
            "--subject",
            subject,
            "--cache",
            tmp_path / "cache",
            "--judge-url",
            "package:nano",
        ]
        return list(map(str, ["validate", "healthbench", *shared, "--rows", paths["rows"], *more]))

    meta = ("--meta", paths["meta"])
    with LoopbackChat(ideal) as model:
        assert run(line(model.url, "a", *meta, "--label", "BF16", "--out", one, "--min-score", "0.99")) == 0
        said = capsys.readouterr()
        assert "BF16 100.0 of 100" in said.out and "qualified" in said.err
        # Without a meta-evaluation nothing counts, and a bound that was named is not met in silence.
        assert run(line(model.url, "a")) == 0
        assert "do not count" in capsys.readouterr().out
        assert run(line(model.url, "a", "--min-score", "0.5")) == 4
        assert "not measured" in capsys.readouterr().err
        second = ("--second-judge-url", "package:nano")
        assert run(line(model.url, "a", *second)) == 2
        assert run(line(model.url, "a", "--max-new-harm", "0")) == 2
        assert run(line(model.url, "a", "--judge-key-env", "NO_SUCH_KEY", "--judge-url", "http://x")) == 3
        assert run(line(model.url, "a", "--rows", tmp_path)) == 3
    capsys.readouterr()
    with LoopbackChat(lambda _: "Answer: 9999 mg") as model, RubricJudge(error_rate=0.1) as judge:
        second = ("--second-judge-url", judge.url, "--second-judge-model", MODEL)
        more = ("--reference", one, "--out", other, "--max-new-harm", 0, "--json", *second)
        assert run(line(model.url, "b", *meta, *more)) == 4
    said = capsys.readouterr()
    assert "newly met" in said.err and "inferior" in said.err
    document = json.loads(said.out)
    assert document["comparison"]["new_harm"] == 12
    assert 0.7 < document["swap"]["overall"]["agreement"] < 0.99
    assert [g["outcome"] for g in document["gates"]] == ["not gated", "not gated", "fail"]
    assert RubricRun.model_validate_json(other.read_bytes()).label == "candidate"
    assert document["panel"]["key"] == "rubrics"


def test_points_reach_the_judge_as_written() -> None:
    assert RubricItem(criterion="x", points=-5).text == "[-5] x"
    assert RubricItem(criterion="x", points=2.5).text == "[2.5] x"
