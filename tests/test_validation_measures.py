"""Accuracy, identity, long records and decode speed, measured on a server that answers by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from loopback_chat import LoopbackChat, Token

from validation.endpoint import Sampling, Target
from validation.errors import MeasurementError
from validation.identity import IdentityResult, collect_outputs, compare_outputs
from validation.longcontext import compare_long, measure_long
from validation.tasks import (
    Item,
    compare_accuracy,
    extract_answer,
    is_correct,
    items_from,
    load_items,
    measure_accuracy,
)
from validation.throughput import measure_decode_speed


def item(name: str, answer: str, task: str = "dose", language: str = "en", **meta: Any) -> Item:
    messages = [{"role": "user", "content": name}]
    row = {
        "id": name,
        "task": task,
        "language": language,
        "messages": messages,
        "answer": answer,
        "meta": meta,
    }
    return items_from([row])[0]


def at(url: str, cache: Path, subject: str = "s", label: str = "x") -> Target:
    return Target(url, "model", subject, label, cache)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Weight 20 kg.\nAnswer: 200 mg", "200 mg"),
        ("Answer: 1\nNo, wait.\nAnswer: 2.", "2"),
        ("体重20千克。\n答案：200 mg。", "200 mg"),
        ("答案: B", "B"),
        ("Answer:   C  \n", "C"),
        ("Answer: 2.5 mg", "2.5 mg"),
        ("Answer: 7.5.", "7.5"),
        ("Answer:\n200", ""),
        ("The answer is 200 mg", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_last_marker(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_only_the_exact_answer_is_right() -> None:
    assert is_correct("200 mg", "200 mg")
    assert is_correct("200 mg", " 200 mg. ")
    assert not is_correct("20 mg", "200 mg")
    assert not is_correct("200 MG", "200 mg")
    assert not is_correct(None, "200 mg")


def test_accuracy_is_per_task_and_language_and_beside_it_stands_the_commonest_answer(tmp_path: Path) -> None:
    items = [item(f"d{k}", str(k)) for k in range(6)]
    items += [item(f"t{k}", "urgent" if k < 3 else "routine", "triage", "zh") for k in range(4)]
    said = {f"d{k}": f"Answer: {k}" for k in range(4)} | {"d4": "Answer: 9", "d5": "no idea"}
    with LoopbackChat(lambda m: said.get(m, "答案：urgent")) as server:
        run = measure_accuracy(at(server.url, tmp_path, "s", "BF16"), items)
    assert (run.overall.n, run.overall.correct, run.unmarked) == (10, 7, 1)
    dose, triage = run.by_task
    assert (dose.name, dose.correct, dose.n) == ("dose", 4, 6)
    assert (triage.correct, triage.majority_answer, triage.majority_share) == (3, "urgent", 0.75)
    assert [s.name for s in run.by_language] == ["en", "zh"]
    # Over both tasks, and languages, the baseline gives each its own commonest answer: 1 of 6 and 3 of 4.
    assert run.overall.majority_share == pytest.approx(0.4)
    assert dose.low < dose.accuracy < dose.high


def test_a_comparison_pairs_the_items_and_lists_every_flip(tmp_path: Path) -> None:
    items = [item(f"q{k}", "yes") for k in range(50)]
    with LoopbackChat(lambda m: "Answer: no" if m in ("q1", "q2") else "Answer: yes") as server:
        before = measure_accuracy(at(server.url, tmp_path, "a", "BF16"), items)
    with LoopbackChat(lambda m: "Answer: no" if m in ("q2", "q3", "q4") else "Answer: yes") as server:
        after = measure_accuracy(at(server.url, tmp_path, "b", "FP8"), items)
    result = compare_accuracy(before, after, margin_points=20)
    paired = result.overall
    assert (paired.both, paired.only_reference, paired.only_candidate, paired.neither) == (46, 2, 1, 1)
    assert paired.difference_points == pytest.approx(-2)
    assert paired.low_points < -2 < paired.high_points
    assert paired.p_value == 1.0
    assert paired.verdict == "non-inferior"
    assert {(f.id, f.direction) for f in result.flips} == {
        ("q1", "wrong to right"), ("q3", "right to wrong"), ("q4", "right to wrong"),
    }  # fmt: skip
    assert result.flips[-1].candidate_text == "Answer: no"
    assert compare_accuracy(before, after, margin_points=2).overall.verdict == "inconclusive"


def test_a_ruined_model_is_inferior(tmp_path: Path) -> None:
    items = [item(f"q{k}", "yes") for k in range(40)]
    with LoopbackChat(lambda _: "Answer: yes") as server:
        good = measure_accuracy(at(server.url, tmp_path, "a", "BF16"), items)
    with LoopbackChat(lambda _: "Answer: no") as server:
        bad = measure_accuracy(at(server.url, tmp_path, "b", "broken"), items)
    assert compare_accuracy(good, bad, margin_points=2).overall.verdict == "inferior"


def test_runs_over_other_items_or_other_sampling_do_not_pair(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "Answer: yes") as server:

        def run(items: list[Item], **sampling: Any) -> Any:
            return measure_accuracy(at(server.url, tmp_path), items, sampling=Sampling(**sampling))

        with pytest.raises(MeasurementError, match="different items"):
            compare_accuracy(run([item("a", "1")]), run([item("b", "1")]), margin_points=2)
        with pytest.raises(MeasurementError, match="sampled differently"):
            compare_accuracy(run([item("a", "1")]), run([item("a", "1")], max_tokens=5), margin_points=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no items"),
        ("{]", "line 1 is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"id": "a"}', "line 1: task"),
        ("SAME\nSAME", "occurs twice"),
    ],
)
def test_a_bad_items_file_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(content.replace("SAME", json.dumps(item("a", "1").model_dump())))
    with pytest.raises(MeasurementError, match=message):
        load_items(path)


def test_items_round_trip_through_a_file_with_line_separators_in_the_text(tmp_path: Path) -> None:
    items = [item("one\u2028two", "1"), item("剂量？", "2", language="zh", depth=0.5)]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(i.model_dump_json() + "\n" for i in items), encoding="utf-8")
    assert load_items(path) == items


# --- identity ---


def tokens(*parts: tuple[str, float, dict[str, float]]) -> list[Token]:
    return [(t, p, [(t, p), *others.items()]) for t, p, others in parts]


SURE = ("Give ", -0.01, {"Take ": -5.0})


def compared(tmp_path: Path, ours: dict[str, list[Token]], theirs: dict[str, list[Token]]) -> IdentityResult:
    items = [item(name, "x") for name in ours]
    runs = []
    for label, said in (("no draft", ours), ("draft", theirs)):
        with LoopbackChat(lambda m, said=said: said[m]) as server:  # type: ignore[misc]
            runs.append(collect_outputs(at(server.url, tmp_path, label, label), items))
    return compare_outputs(*runs)


def test_equal_outputs_are_identical_and_the_noise_between_the_servers_is_measured(tmp_path: Path) -> None:
    ours = {"a": tokens(SURE, ("5", -0.10, {})), "b": tokens(SURE)}
    theirs = {"a": tokens(SURE, ("5", -0.13, {})), "b": tokens(SURE)}
    result = compared(tmp_path, ours, theirs)
    assert (result.identical, result.n, result.differences, result.all_near_ties) == (2, 2, (), True)
    assert result.noise is not None and result.noise.tokens == 3
    assert result.noise.largest == pytest.approx(0.03)


def test_a_difference_at_a_near_tie_is_shown_as_one(tmp_path: Path) -> None:
    ours = {"a": tokens(SURE, ("5", -0.70, {"6": -0.76}), ("mg", -0.1, {}))}
    theirs = {"a": tokens(SURE, ("6", -0.71, {"5": -0.72}), ("mg", -0.1, {}))}
    result = compared(tmp_path, ours, theirs)
    (difference,) = result.differences
    assert (difference.position, difference.reference_token, difference.candidate_token) == (1, "5", "6")
    assert difference.gap_nats == pytest.approx(0.06)
    assert difference.near_tie and result.all_near_ties
    assert difference.agreed_text == "Give "
    # Only the beginning they share counts as agreement.
    assert result.noise is not None and result.noise.tokens == 1


def test_a_difference_where_the_reference_was_sure_is_no_near_tie(tmp_path: Path) -> None:
    ours = {"a": tokens(SURE, ("5", -0.1, {"6": -3.0}))}
    result = compared(tmp_path, ours, {"a": tokens(SURE, ("6", -0.2, {}))})
    assert result.differences[0].gap_nats == pytest.approx(2.9)
    assert not result.all_near_ties


def test_a_token_the_reference_does_not_list_is_no_near_tie(tmp_path: Path) -> None:
    ours = {"a": tokens(SURE, ("5", -0.1, {"6": -0.15}))}
    result = compared(tmp_path, ours, {"a": tokens(SURE, ("9", -0.2, {}))})
    (difference,) = result.differences
    assert difference.gap_nats is None and difference.gap_at_least_nats == pytest.approx(0.05)
    assert not difference.near_tie


def test_an_answer_that_goes_on_longer_is_a_difference(tmp_path: Path) -> None:
    result = compared(tmp_path, {"a": tokens(SURE)}, {"a": tokens(SURE, ("5", -0.1, {}))})
    assert (result.differences[0].reference_token, result.differences[0].near_tie) == ("(end)", False)


def test_identity_needs_greedy_sampling_with_log_probabilities(tmp_path: Path) -> None:
    for sampling in (Sampling(temperature=0.7), Sampling(top_logprobs=None)):
        with pytest.raises(MeasurementError, match="temperature 0"):
            collect_outputs(
                at("http://127.0.0.1:9", tmp_path),
                [item("a", "1")],
                sampling=sampling,
            )


def test_accuracy_and_identity_share_their_answers(tmp_path: Path) -> None:
    items = [item(f"q{k}", "yes") for k in range(5)]
    with LoopbackChat(lambda _: "Answer: yes") as server:
        measure_accuracy(at(server.url, tmp_path, "a", "x"), items)
        run = collect_outputs(at(server.url, tmp_path, "a", "x"), items[:3])
        assert len(run.outputs) == 3
        assert set(server.asked.values()) == {1}


# --- long records ---


def long_items() -> list[Item]:
    return [
        item("x" * 10 * m + str(k), f"v{k}", "record", multiple=m, context_tokens=512 * m, depth=k / 10)
        for m in (1, 2, 4)
        for k in range(10)
    ]


def test_retrieval_is_by_multiple_and_a_refused_prompt_is_not_found(tmp_path: Path) -> None:
    items = long_items()
    answers = {i.messages[0].content: i.answer for i in items}
    with LoopbackChat(lambda m: f"Answer: {answers[m]}", max_characters=25) as server:
        before = measure_long(at(server.url, tmp_path, "a", "before"), items, trained_length=512)
    with LoopbackChat(lambda m: f"Answer: {answers[m]}" if len(m) < 40 else "Answer: ?") as server:
        after = measure_long(at(server.url, tmp_path, "b", "after"), items, trained_length=512)
    assert [(s.multiple, s.correct, s.refused) for s in before.by_multiple] == [
        (1, 10, 0),
        (2, 10, 0),
        (4, 0, 10),
    ]
    assert before.longest_passing_tokens(0.9) == 1024
    assert [s.correct for s in after.by_multiple] == [10, 10, 0]
    assert [s.refused for s in after.by_multiple] == [0, 0, 0]
    comparison = compare_long(before, after)
    assert [p.scope for p in comparison.by_multiple] == ["1x", "2x", "4x"]
    assert comparison.by_multiple[0].difference_points == 0
    assert before.by_multiple[0].majority_share == pytest.approx(0.1)


def test_a_length_that_fails_ends_the_claim_though_a_longer_one_passes(tmp_path: Path) -> None:
    items = long_items()
    answers = {i.messages[0].content: i.answer for i in items}
    with LoopbackChat(lambda m: "Answer: ?" if 20 <= len(m) < 30 else f"Answer: {answers[m]}") as server:
        run = measure_long(at(server.url, tmp_path, "a", "x"), items, trained_length=512)
    assert [s.correct for s in run.by_multiple] == [10, 0, 10]
    assert run.longest_passing_tokens(0.9) == 512


def test_a_long_item_without_its_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="lacks meta multiple, context_tokens"):
        measure_long(
            at("http://127.0.0.1:9", tmp_path),
            [item("a", "1", depth=0.5)],
            trained_length=512,
        )


# --- decode speed by the streaming client ---


def test_decode_speed_counts_the_servers_tokens_and_is_kept(tmp_path: Path) -> None:
    prompts = [item("a", "1"), item("b", "1")]
    with LoopbackChat(lambda _: "one two three four five") as server:
        speed = measure_decode_speed(at(server.url, tmp_path), prompts, repeats=2)
        # One unmeasured answer, then two prompts twice.
        assert sum(server.asked.values()) == 5
        again = measure_decode_speed(at("http://127.0.0.1:9", tmp_path), prompts, repeats=2)
    assert again == speed
    assert 0 < speed.low <= speed.tokens_per_s <= speed.high


def test_answers_of_one_token_give_no_decode_speed(tmp_path: Path) -> None:
    with LoopbackChat(lambda _: "one") as server, pytest.raises(MeasurementError, match="two tokens"):
        measure_decode_speed(at(server.url, tmp_path), [item("a", "1")], repeats=1)
