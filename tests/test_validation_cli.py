"""`packager validate` against a server that answers by rule: figures, exit codes, JSON, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from loopback_chat import LoopbackChat

from packager.cli import run


@pytest.fixture
def items(tmp_path: Path) -> Path:
    rows = [
        {
            "id": f"q{k}",
            "task": "record",
            "language": "en",
            "messages": [{"role": "user", "content": f"question {k}"}],
            "answer": "yes",
            "meta": {"multiple": 1 + k % 2, "context_tokens": 512, "depth": 0.5},
        }
        for k in range(60)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def arguments(verb: str, url: str, items: Path, subject: str, *more: str) -> list[str]:
    cache = str(items.parent / "cache")
    return [
        "validate",
        verb,
        "--url",
        url,
        "--items",
        str(items),
        "--subject",
        subject,
        "--cache",
        cache,
        *more,
    ]


def test_accuracy_prints_figures_and_compares_with_a_reference(
    items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = str(tmp_path / "good.json"), str(tmp_path / "bad.json")
    with LoopbackChat(lambda _: "Answer: yes") as server:
        assert run(arguments("accuracy", server.url, items, "a", "--label", "BF16", "--out", good)) == 0
        assert "100.0" in capsys.readouterr().out
    with LoopbackChat(lambda _: "Answer: no") as server:
        code = run(arguments("accuracy", server.url, items, "b", "--out", bad, "--reference", good, "--json"))
    said = capsys.readouterr()
    assert code == 4 and "is inferior to BF16" in said.err
    document = json.loads(said.out)
    assert document["comparison"]["overall"]["only_reference"] == 60
    # The cache answers for a server that is gone.
    assert run(arguments("accuracy", "http://127.0.0.1:9", items, "a")) == 0


def test_fidelity_names_where_outputs_part(items: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        LoopbackChat(lambda _: "Answer: yes") as one,
        LoopbackChat(lambda m: "Answer: no" if m.endswith(" 3") else "Answer: yes") as two,
    ):
        reference = ("--reference-url", one.url, "--reference-subject", "a", "--prompts", "10", "--json")
        reference += ("--top-logprobs", "0")
        assert run(arguments("fidelity", two.url, items, "b", *reference)) == 0
    identity = json.loads(capsys.readouterr().out)["identity"]
    assert (identity["identical"], identity["n"]) == (9, 10)
    assert identity["differences"][0]["id"] == "q3"
    assert identity["all_near_ties"] is False


def test_context_is_by_multiple(items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = str(tmp_path / "before.json")
    with LoopbackChat(lambda _: "Answer: ?") as server:
        assert (
            run(arguments("context", server.url, items, "a", "--trained-length", "512", "--out", before)) == 0
        )
    capsys.readouterr()
    with LoopbackChat(lambda _: "Answer: yes") as server:
        more = ("--trained-length", "512", "--before", before, "--json")
        assert run(arguments("context", server.url, items, "b", *more)) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(s["multiple"], s["correct"]) for s in document["run"]["by_multiple"]] == [(1, 30), (2, 30)]
    assert document["comparison"]["by_multiple"][1]["difference_points"] == 100


@pytest.mark.slow
def test_wrong_input_is_one_message_and_the_right_exit_code(
    items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    url = "http://127.0.0.1:9"
    cases = [
        (arguments("accuracy", url, tmp_path / "missing.jsonl", "a"), 2, "does not exist"),
        (arguments("accuracy", url, bad, "a"), 3, "line 1 is not JSON"),
        (arguments("accuracy", url, items, "a", "--reference", str(bad)), 3, "not the JSON of such a run"),
        (arguments("accuracy", url, items, "unanswered"), 6, "gave no answer"),
        (
            arguments("throughput", url, items, "a", "--tokenizer", str(tmp_path), "--concurrency", "x"),
            2,
            "1,8",
        ),
    ]
    for line, code, message in cases:
        assert run(line) == code, line
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
        assert said.count("error: ") == 1
