"""Public benchmarks: lm-eval's tasks asked through our client, item by item, resumed, compared, refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_completions import LoopbackModel, tokenize

from validation.endpoint import Target
from validation.errors import MeasurementError
from validation.public_benchmarks import (
    BenchmarkRun,
    benchmarks_panel,
    compare_benchmarks,
    measure_benchmarks,
)
from validation.public_benchmarks.likelihood import continuation_scores

LETTERS = "ABCD"
MEDQA = """
task: medqa_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/medqa.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{sent1}}}}\\nA. {{{{ending0}}}}\\nB. {{{{ending1}}}}\\nC. {{{{ending2}}}}\\n\\
  D. {{{{ending3}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: [A, B, C, D]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SUMS = """
task: sums_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n", "Question:"], max_gen_toks: 32}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: local
task: [medqa_local, sums_local]
"""
UNSAFE = """
task: code_local
dataset_path: json
unsafe_code: true
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{test}}}}"
"""
ABSENT = """
task: absent_local
dataset_path: example-org/absent
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: label
doc_to_choice: [A, B]
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    yield


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    definitions = {"medqa": MEDQA, "sums": SUMS, "local": GROUP, "code": UNSAFE, "absent": ABSENT}
    for name, text in definitions.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    rows = [
        {"sent1": f"Case {k}: which?", **{f"ending{j}": f"drug {j}" for j in range(4)}, "label": k % 4}
        for k in range(12)
    ]
    (folder / "medqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = [{"question": f"{k} + {k}?", "answer": str(2 * k)} for k in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return folder


def likes_case(prefix: str, token: str) -> float:
    """Finds the right letter of case k likely, but of case 3, and takes D for it there."""
    found = re.search(r"Case (\d+):", prefix)
    number = int(found[1]) if found else 0
    right = "A" if number == 3 else LETTERS[number % 4]
    return -0.05 if token.strip() == right else -2.0 - ord(token[-1]) / 1000


def says(prompt: str) -> str:
    if "Case" in prompt:
        number = int(prompt.split("Case ")[1].split(":")[0])
        return f"<think>Answer: A?</think>Let me see.\nAnswer: {'C' if number == 5 else LETTERS[number % 4]}"
    number = int(prompt.split(" ")[0])
    return f"<think>Question: what?\n\n</think>\n{2 * number if number != 4 else 9}\n\nMore."


def target(tmp_path: Path, url: str, label: str = "BF16") -> Target:
    return Target(url, "model", f"sha256:{label}", label, tmp_path / "cache")


def test_the_likelihood_of_a_continuation_is_the_sum_over_its_tokens(tmp_path: Path) -> None:
    def nats(prefix: str, token: str) -> float:
        return -(1 + len(tokenize(prefix))) / 64 if token != " mg" else -0.01

    pairs = [("Dose: ", "20 mg"), ("Dose:", " mg"), ("Dose: ", "20 mg")]
    with LoopbackModel(str, nats) as server:
        found = continuation_scores(target(tmp_path, server.url), pairs)
        assert len(server.asked) == 3, "one count of the context, two prompts; equal ones once"
        continuation_scores(target(tmp_path, server.url), pairs)
        assert sum(server.asked.values()) == 3
    # The blank goes to the continuation: " 2", "0", " mg" after "Dose", ":".
    assert found[0][:2] == (pytest.approx(math.fsum([-3 / 64, -4 / 64, -0.01]), abs=1e-12), True)
    assert found[1][:2] == (-0.01, True)
    with (
        LoopbackModel(str, lambda *_: -1.0) as server,
        pytest.raises(MeasurementError, match="needs a context"),
    ):
        continuation_scores(target(tmp_path, server.url), [("", "x")])


def test_tasks_are_scored_item_by_item_and_killed_runs_go_on(tasks: Path, tmp_path: Path) -> None:
    def faults(message: str, _: int) -> int | None:
        return 400 if "Case 9" in message else None

    with LoopbackModel(says, likes_case, faults=faults) as server:
        with pytest.raises(MeasurementError, match="400"):
            measure_benchmarks(target(tmp_path, server.url), ["local"], include=tasks, concurrency=1)
        asked = set(server.asked)
        server.faults = lambda *_: None
        run = measure_benchmarks(target(tmp_path, server.url), ["local"], include=tasks)
        again = {prompt for prompt, times in server.asked.items() if times > 1}
        assert len(asked) > 5 and all("Case 9" in prompt for prompt in again)
        assert measure_benchmarks(target(tmp_path, "http://127.0.0.1:9"), ["local"], include=tasks) == run
    assert run.items is not None and run.items.overall.n == 18
    wrong = {r.id: (r.expected, r.extracted) for r in run.items.results if not r.correct}
    assert wrong == {"medqa_local:3": ("D", "A"), "sums_local:4": ("8", "9")}
    sums = [r for r in run.items.results if r.task == "sums_local"]
    assert all("</think>" in r.text for r in sums) and sums[1].question == "1 + 1?"
    scores = {(s.task, s.metric): s.value for s in run.scores}
    assert scores["medqa_local", "acc"] == pytest.approx(11 / 12)
    assert scores["sums_local", "exact_match"] == pytest.approx(5 / 6)
    medqa = run.data[0]
    assert (medqa.task, medqa.dataset, medqa.items) == ("medqa_local", "json", 12) and medqa.fingerprint
    gone = target(tmp_path, "http://127.0.0.1:9")
    same = {medqa.task: medqa.items_digest}
    assert measure_benchmarks(gone, ["local"], include=tasks, expected=same).items == run.items
    with pytest.raises(MeasurementError, match="the data of medqa_local is sha256:"):
        measure_benchmarks(gone, ["local"], include=tasks, expected=same, limit=3)
    assert BenchmarkRun.model_validate_json(run.model_dump_json()) == run
    panel = benchmarks_panel(run, compare_benchmarks(run, run, margin_points=2))
    assert "16 of 18 right" in panel.summary and not panel.unfoldings


def test_reasoning_is_asked_in_chat_and_two_models_pair(tasks: Path, tmp_path: Path) -> None:
    options = {"include": tasks, "style": "reasoning"}
    with LoopbackModel(says) as one, LoopbackModel(lambda _: "Thinking …\nAnswer: B.") as two:
        before = measure_benchmarks(target(tmp_path, one.url), ["medqa_local"], **options)  # type: ignore[arg-type]
        after = measure_benchmarks(target(tmp_path, two.url, "FP8"), ["medqa_local"], **options)  # type: ignore[arg-type]
        prompt = one.bodies[0]["messages"][0]["content"]
    assert prompt.startswith("Question: Case") and "D. drug 3\n\nThink it through" in prompt
    assert before.items is not None and before.items.overall.correct == 11
    found = compare_benchmarks(before, after, margin_points=2)
    assert (found.overall.only_reference, found.overall.only_candidate) == (9, 1)
    assert len(benchmarks_panel(after, found).unfoldings) == 10
    with pytest.raises(MeasurementError, match="no multiple choice"):
        measure_benchmarks(target(tmp_path, "http://127.0.0.1:9"), ["sums_local"], **options)  # type: ignore[arg-type]


def test_plain_text_is_asked_through_completions_with_the_tasks_stops(tasks: Path, tmp_path: Path) -> None:
    with LoopbackModel(lambda p: f"{2 * int(p.split(' ')[0])}\n\nQuestion: 1") as server:
        run = measure_benchmarks(target(tmp_path, server.url), ["sums_local"], include=tasks, chat=False)
        assert {tuple(body["stop"]) for body in server.bodies} == {("\n\n", "Question:")}
        assert {body["max_tokens"] for body in server.bodies} == {32}
    assert run.items is not None and run.items.overall.correct == 6


def test_what_cannot_be_run_is_said_with_the_way_out(tasks: Path, tmp_path: Path) -> None:
    nowhere = target(tmp_path, "http://127.0.0.1:9")
    with pytest.raises(MeasurementError, match="would run code") as raised:
        measure_benchmarks(nowhere, ["code_local"], include=tasks)
    assert "--allow-code-execution" in raised.value.remedy
    with pytest.raises(MeasurementError, match=r"example-org/absent \(absent_local\)") as raised:
        measure_benchmarks(nowhere, ["absent_local"], include=tasks, data=tmp_path / "data")
    command = "hf download --repo-type dataset example-org/absent --local-dir"
    assert command in raised.value.remedy and "--data" in raised.value.remedy

    # The same data from a local folder, with the commit that `hf download` noted.
    local = tmp_path / "data" / "example-org" / "absent"
    (local / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (local / ".cache" / "huggingface" / "download" / "test.jsonl.metadata").write_text("a" * 40 + "\netag\n")
    (local / "test.jsonl").write_text(json.dumps({"q": "Case 1: A or B?", "label": 1}) + "\n")
    with LoopbackModel(says, likes_case) as server:
        run = measure_benchmarks(
            target(tmp_path, server.url), ["absent_local"], include=tasks, data=tmp_path / "data"
        )
    assert (run.data[0].dataset, run.data[0].revision) == ("example-org/absent", "a" * 40)
    assert run.items is not None and run.items.overall.correct == 1

    with (
        LoopbackModel(says, None) as server,
        pytest.raises(MeasurementError, match="no log-probabilities of the prompt"),
    ):
        measure_benchmarks(target(tmp_path / "b", server.url), ["medqa_local"], include=tasks, limit=1)


def test_a_release_judges_each_entry_of_its_recipe(tasks: Path, tmp_path: Path) -> None:
    from packager.recipe import BenchmarkSpec, GatesSpec
    from packager.release.benchmarks import Benchmarks, check_benchmarks
    from packager.release.benchmarks import measure_benchmarks as measure

    own = {"include": str(tasks)}
    specs = (
        BenchmarkSpec(tasks=("local",), **own),
        BenchmarkSpec(tasks=("medqa_local",), style="reasoning", **own),
    )
    check_benchmarks(specs)
    with pytest.raises(MeasurementError, match="example-org/absent"):
        check_benchmarks([BenchmarkSpec(tasks=("absent_local",), **own)])
    said: list[str] = []
    with LoopbackModel(says, likes_case) as one, LoopbackModel(lambda _: "Answer: B", likes_case) as two:
        before = measure(specs, target(tmp_path, one.url), said.append)
        after = measure(specs, target(tmp_path, two.url, "FP8"), said.append)
    assert said[0] == "  BF16, local (likelihood): 16 of 18 right"
    gates = GatesSpec(accuracy_verdict="not inferior")
    found = Benchmarks.compare(specs, before, after, 2.0).gates(gates)
    assert [g.outcome for g in found] == ["fail", "fail"]
    assert found[1].name.startswith("medqa_local (reasoning): accuracy of FP8 against BF16: not inferior")
    same = Benchmarks.compare(specs, before, before, 2.0)
    assert [g.outcome for g in same.gates(gates)] == ["pass", "pass"]
    assert [p.key for p in same.panels()] == ["benchmarks-likelihood-1", "benchmarks-reasoning-2"]
