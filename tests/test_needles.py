"""Needles: answers right by construction, lengths by the tokenizer; the grid; claims; the cost."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback_chat import LoopbackChat
from tiny_bundle import recipe

from packager.bundle.serve_profiles import serve_yaml
from packager.cli import run
from packager.nano import CHECKPOINT
from packager.recipe import ValidateSpec
from validation.budget import RULER_TASKS, budget, ruler_budget, ruler_commands
from validation.endpoint import Target
from validation.errors import MeasurementError
from validation.longcontext import LongRun, context_claim, measure_long
from validation.needles import KINDS, RESERVED_TOKENS, needle_items, token_counter
from validation.report.figures import depth_grid
from validation.statistics import wilson
from validation.tasks import Item, compare_accuracy, items_from, measure_accuracy


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return needle_items([1024, 2048], trained_length=512, tokens=token_counter(CHECKPOINT), depths=3)


def said(item: Item) -> str:
    return item.messages[0].content


def notes(item: Item) -> list[str]:
    return said(item).partition("\n\n")[0].split("\n")[1:]


def test_records_fill_their_length_and_the_answer_stands_at_its_depth(items: list[Item]) -> None:
    assert len(items) == 2 * 3 * 8
    for item in items:
        meta, lines = item.meta, notes(item)
        room = meta["length"] - RESERVED_TOKENS  # for the record; the question is some 30 to 130 tokens more
        assert room - 100 < meta["context_tokens"] <= room + 130
        holds = re.compile(rf"(?<![0-9.]){re.escape(item.answer)}")
        places = [k for k, line in enumerate(lines) if holds.search(line)]
        earlier = meta["kind"] == "later"
        wanted = meta["depth"] * (len(lines) - 1 - earlier) + earlier
        assert min(abs(k - wanted) for k in places) <= 0.5, (item.id, places, wanted)
        assert [line[:16] for line in lines] == sorted(line[:16] for line in lines)  # in order of time
    cells = [(i.meta["length"], i.meta["depth"], i.meta["kind"], i.language) for i in items]
    assert len(set(cells)) == len(items) and {i.meta["kind"] for i in items} == set(KINDS)


def test_nothing_else_in_a_record_answers_the_question(items: list[Item]) -> None:
    subject = {
        "dose": r"dose of (\S+) was|问题：(\S+)的剂量",
        "laboratory": r"was the (.+), with|问题：(.+)的结果",
    }
    for item in items:
        if item.meta["kind"] in subject:
            asked = re.search(subject[item.meta["kind"]], said(item))
            assert asked
            name = asked[1] or asked[2]
            assert [item.answer in line for line in notes(item) if name in line] == [True]
        elif item.meta["kind"] == "allergy":
            assert sum("was followed by" in line or "后出现" in line for line in notes(item)) == 1


def test_of_two_notes_the_later_one_counts(items: list[Item]) -> None:
    later = [item for item in items if item.meta["kind"] == "later"]
    assert later
    for item in later:
        before, after = item.meta["superseded"], item.answer
        places = {
            dose: [
                m.start() for m in re.finditer(rf"(?:review: \S+|核对：\S+) {re.escape(dose)}\b", said(item))
            ]
            for dose in (before, after)
        }
        assert len(places[before]) == len(places[after]) == 1 and places[before] < places[after]


def test_the_same_seed_gives_the_same_records_and_bad_settings_are_said(items: list[Item]) -> None:
    count = token_counter(CHECKPOINT)
    again = needle_items([1024], trained_length=512, tokens=count, depths=3)
    assert again == items[: len(again)]
    assert needle_items([1024], trained_length=512, tokens=count, depths=1, seed=1)[0] not in items
    with pytest.raises(MeasurementError, match="1024 tokens or more"):
        needle_items([100], trained_length=512, tokens=count)
    with pytest.raises(MeasurementError, match=r"no tokenizer\.json"):
        token_counter(Path("/nowhere"))


def answers(items: list[Item], cache: Path, reply: Any) -> LongRun:
    by_text = {said(item): item for item in items}
    with LoopbackChat(lambda text: str(reply(by_text[text]))) as server:
        return measure_long(Target(server.url, "model", "s", "YaRN", cache), items, trained_length=512)


def test_the_grid_counts_by_depth_and_kind_and_names_who_took_the_older_note(
    items: list[Item], tmp_path: Path
) -> None:
    """A server that forgets the end of long records and reads the older of two notes."""

    def reply(item: Item) -> str:
        if item.meta["length"] == 2048 and item.meta["depth"] == 1:
            return "I do not know."
        if item.meta["kind"] == "later":
            return f"Answer: {item.meta['superseded']}"
        return f"**Answer: {item.answer.replace(' ', '')}**"

    found = answers(items, tmp_path, reply)
    cells = {(c.multiple, c.depth_low): (c.correct, c.n) for c in found.grid}
    assert cells == {
        (2, 0): (6, 8),
        (2, 0.5): (6, 8),
        (2, 1): (6, 8),
        (4, 0): (6, 8),
        (4, 0.5): (6, 8),
        (4, 1): (0, 8),
    }
    kinds = {(c.kind, c.multiple): (c.correct, c.superseded) for c in found.by_kind}
    assert kinds[("later", 2)] == (0, 6) and kinds[("later", 4)] == (0, 4) and kinds[("dose", 2)] == (6, 0)
    first = found.grid[0]
    assert (first.low, first.high) == tuple(wilson(6, 8))
    drawn = depth_grid(found)
    assert (
        drawn.count("<rect") == 6
        and "75 %" in drawn
        and "41–93" in drawn
        and ">1K<" in drawn
        and ">2K<" in drawn
    )


def test_many_depths_are_gathered_into_bands(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(k), "task": "record", "language": "en", "answer": "x",
            "messages": [{"role": "user", "content": f"{k}"}],
            "meta": {"multiple": 1, "context_tokens": 5, "depth": k / 39},
        }
        for k in range(40)
    ]  # fmt: skip
    found = answers(items_from(rows), tmp_path, lambda _: "Answer: x")
    assert [(c.depth_low, c.depth_high) for c in found.grid] == [(k / 5, (k + 1) / 5) for k in range(5)]
    assert sum(c.n for c in found.grid) == 40 and min(c.n for c in found.grid) >= 7
    assert found.by_kind == ()


def test_a_bundle_claims_no_more_than_was_read(items: list[Item], tmp_path: Path) -> None:
    whole = answers(items, tmp_path / "a", lambda item: f"Answer: {item.answer}")
    half = answers(
        items, tmp_path / "b", lambda i: f"Answer: {i.answer if i.meta['length'] == 1024 else '?'}"
    )
    claims = {
        "whole": context_claim(2048, [half, whole], 0.6),
        "half": context_claim(2048, [whole, half], 0.6),
        "beyond": context_claim(4096, [whole], 0.6),
        "nothing": context_claim(2048, [], 0.6),
    }
    assert {name: c.outcome for name, c in claims.items()} == {
        "whole": "measured",
        "half": "not held",
        "beyond": "not measured",
        "nothing": "not measured",
    }
    assert claims["whole"].sentence == "" and claims["half"].held == 1024
    assert claims["beyond"].sentence.startswith(
        "claimed beyond what was measured: the longest record read had 2048"
    )
    assert "claimed, not measured" in claims["nothing"].sentence
    written = yaml.safe_load(serve_yaml(recipe(), draft=False, trained_length=512, claim=claims["half"]))
    assert written["context_measured"] == {"tokens": 1024, "longest_record_read": 2048, "min_accuracy": 0.6}


def test_a_recipe_whose_items_have_no_long_records_gets_needles_up_to_its_context(tmp_path: Path) -> None:
    from packager.release.evidence import questions

    row = {"id": "q", "task": "dose", "language": "en", "answer": "yes"}
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps({**row, "messages": [{"role": "user", "content": "?"}]}) + "\n")
    settings = {"items_file": str(file), "long_items": 5}
    made = recipe(context={"length": 2048}).model_copy(update={"validate_": ValidateSpec(**settings)})
    asked = questions(made, CHECKPOINT, 1024)
    assert [item.id for item in asked.items] == ["q"]
    assert [(i.meta["length"], i.meta["depth"]) for i in asked.long] == [
        (length, depth / 4) for length in (1024, 2048) for depth in range(5)
    ]


@pytest.mark.slow
def test_the_cost_of_the_patch_to_short_prompts_is_a_panel(tmp_path: Path) -> None:
    from validation.report import short_context_panel

    rows = [
        {
            "id": f"q{k}", "task": "dose" if k % 2 else "triage", "language": "en", "answer": "yes",
            "messages": [{"role": "user", "content": f"question {k}"}],
        }
        for k in range(60)
    ]  # fmt: skip
    runs = []
    for name, wrong in (("FP8", ()), ("FP8 + YaRN", ("question 4", "question 7"))):
        with LoopbackChat(lambda text, wrong=wrong: f"Answer: {'no' if text in wrong else 'yes'}") as server:
            runs.append(measure_accuracy(Target(server.url, "model", name, name, tmp_path), items_from(rows)))
    panel = short_context_panel(compare_accuracy(*runs, margin_points=2))
    assert panel.subjects == ("FP8", "FP8 + YaRN") and "2 items were lost, 0 gained" in panel.summary
    rows_ = {row[0]: row[1:7] for row in panel.tables[0].rows}
    assert rows_["all short items"][:5] == (60, 60, 58, 2, 0) and rows_["dose"][:5] == (30, 30, 29, 1, 0)
    assert [one.line for one in panel.unfoldings] == [
        f"{task}, q{k}: expected yes, after the patch no" for task, k in (("triage", 4), ("dose", 7))
    ]


def test_rulers_tasks_are_lm_evals_and_its_cost_is_arithmetic() -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    files = {p.name: p.read_text() for p in folder.glob("*.yaml")}
    group = re.findall(r"- (\w+)$", files["ruler.yaml"].partition("aggregate")[0], re.MULTILINE)
    assert group == list(RULER_TASKS)

    def most_tokens(text: str) -> int:
        stated, parent = re.search(r"max_gen_toks: (\d+)", text), re.search(r"include: (\S+)", text)
        return int(stated[1]) if stated else most_tokens(files[parent[1]])  # type: ignore[index]

    stated = {re.findall(r"^task: (\w+)", text, re.MULTILINE)[-1]: most_tokens(text)
              for name, text in files.items() if name != "ruler.yaml"}  # fmt: skip
    assert stated == dict(RULER_TASKS)

    plan = ruler_budget([4096], 10, prefill_tokens_per_s=1000, decode_tokens_per_s=100, gpus=2)
    written = 10 * sum(RULER_TASKS.values())
    assert (plan.requests, plan.prompt_tokens) == (130, 130 * 4096 - written)
    assert plan.gpu_hours == pytest.approx(2 * (plan.prompt_tokens / 1000 + written / 100) / 3600)
    with pytest.raises(MeasurementError, match="500 samples"):
        ruler_budget([4096], 501, prefill_tokens_per_s=1, decode_tokens_per_s=1)
    with pytest.raises(MeasurementError, match="no task x"):
        ruler_budget([4096], 1, tasks=["x"], prefill_tokens_per_s=1, decode_tokens_per_s=1)
    with pytest.raises(MeasurementError, match="positive"):
        budget("x", {1: (1, 1)}, prefill_tokens_per_s=0, decode_tokens_per_s=1)
    lines = ruler_commands([8192, 4096], 10, url="http://h/", model="m", tokenizer="t")
    assert [next(a for a in line if a.startswith("--metadata")) for line in lines] == [
        f'--metadata={{"max_seq_lengths":[{length}]}}' for length in (4096, 8192)
    ]


def test_the_verb_makes_records_says_the_cost_and_prints_the_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "validate",
        "context",
        "--subject",
        "a",
        "--trained-length",
        "512",
        "--cache",
        str(tmp_path / "c"),
    ]
    made = ["--records", "1024", "--depths", "2", "--tokenizer", str(CHECKPOINT)]
    with LoopbackChat(lambda _: "Answer: 5 mg") as server:
        url = ["--url", server.url]
        assert run([*line, *url, *made, "--prefill-tokens-per-s", "1000", "--gpus", "2"]) == 0
        printed = capsys.readouterr()
        assert "16 records, 8 in each of 2 cells: 0.0 million tokens to read, 0.0091 GPU-hours" in printed.err
        assert re.search(r"depth 100 % +0 of 8", printed.out) and re.search(r"later +\d of 4", printed.out)
        assert run([*line, *url, *made, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["run"]["grid"]) == 2
        assert run([*line, *url, *made, "--report", str(tmp_path / "report")]) == 0
        assert "Values found by depth and length" in (tmp_path / "report" / "report.html").read_text()
        capsys.readouterr()
        assert run([*line, *url]) == 2 and "one of --items" in capsys.readouterr().err
        assert run([*line, *url, "--records", "1024"]) == 2 and "--tokenizer" in capsys.readouterr().err
    plan = ["validate", "ruler-plan", "--lengths", "4096", "--samples", "5", "--prefill-tokens-per-s", "9e3"]
    assert run([*plan, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 65
