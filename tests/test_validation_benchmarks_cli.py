"""`packager validate benchmark`, `medbench`, `medaibench`: figures, uploads, exit codes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from loopback_chat import LoopbackChat
from loopback_completions import LoopbackModel

from packager.cli import run
from validation.panel import Panel

TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/own.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}\\nA. yes\\nB. no\\nAnswer:"
doc_to_target: label
doc_to_choice: [A, B]
"""


def arguments(verb: str, url: str, subject: str, folder: Path, *more: str) -> list[str]:
    server = ["--url", url, "--subject", subject, "--cache", str(folder / "cache")]
    return ["validate", verb, *server, *more]


@pytest.mark.slow
def test_benchmark_runs_compares_and_fails_on_a_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "own.yaml").write_text(TASK.format(folder=tmp_path))
    rows = [{"question": f"Question {k}?", "label": k % 2} for k in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, panel = str(tmp_path / "good.json"), tmp_path / "panel.json"
    task = ["--tasks", "own", "--include", str(tmp_path)]

    def knows(prefix: str, token: str) -> float:
        return -0.1 if token.strip() == ("B" if int(prefix.split()[1][:-1]) % 2 else "A") else -3.0

    with LoopbackModel(str, lambda p, t: knows(p, t) if "?" in p else -1.0) as server:
        assert run(arguments("benchmark", server.url, "a", tmp_path, *task, "--out", good)) == 0
        assert "100.0" in capsys.readouterr().out
    with LoopbackModel(str, lambda _, t: -0.1 if t.strip() == "A" else -3.0) as server:
        compared = ["--reference", good, "--panel", str(panel), "--json"]
        assert run(arguments("benchmark", server.url, "b", tmp_path, *task, *compared)) == 4
    said = capsys.readouterr()
    assert "is inferior to" in said.err and "Traceback" not in said.err
    assert json.loads(said.out)["comparison"]["overall"]["only_reference"] == 20
    assert len(Panel.model_validate_json(panel.read_bytes()).unfoldings) == 20
    with LoopbackChat(lambda m: f"So.\nAnswer: {'B' if int(m.split()[1][:-1]) % 2 else 'A'}") as server:
        reasoning = [*task, "--style", "reasoning", "--limit", "10"]
        assert run(arguments("benchmark", server.url, "a", tmp_path, *reasoning)) == 0
    assert "100.0" in capsys.readouterr().out
    nowhere = arguments("benchmark", "http://127.0.0.1:9", "c", tmp_path, "--include", str(tmp_path))
    assert run([*nowhere, "--tasks", "own", "--expect", "own=1"]) == 2
    assert run([*nowhere, "--tasks", "own", "--expect", "own=sha256:1"]) == 3
    assert "not sha256:1" in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text(TASK.format(folder=tmp_path / "gone"))
    assert run([*nowhere, "--tasks", "own"]) == 3
    assert "neither here nor to be reached" in capsys.readouterr().err


def test_medbench_answers_packs_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, upload = tmp_path / "data", tmp_path / "upload.zip"
    data.mkdir()
    rows = [{"question": f"单选题，输出选项字母。第{k}题\nA. 是\nB. 否", "answer": "<A>"} for k in range(40)]
    (data / "MedSafety.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dimensions.json").write_text('{"MedSafety": "safety and ethics"}')
    good = str(tmp_path / "good.json")
    given = ["--data", str(data), "--dimensions", str(tmp_path / "dimensions.json")]
    with LoopbackChat(lambda _: "A") as server:
        more = [*given, "--upload", str(upload), "--out", good]
        assert run(arguments("medbench", server.url, "a", tmp_path, *more)) == 0
    said = capsys.readouterr()
    assert "All answers are filled" in said.out and "safety" in said.out and "100.0" in said.out
    with zipfile.ZipFile(upload) as archive:
        assert archive.read("MedBench_LLM/MedSafety.jsonl").count(b"<A>") == 40
    with LoopbackChat(lambda m: "B" if "第3" in m or "第2" in m else "我不知道") as server:
        assert run(arguments("medbench", server.url, "b", tmp_path, *given, "--reference", good)) == 4
        assert "is inferior to candidate" in capsys.readouterr().err
    with LoopbackChat(lambda m: "B" if "第30题" in m else "A") as server:
        strict = [*given, "--reference", good, "--max-safety-flips", "0"]
        assert run(arguments("medbench", server.url, "c", tmp_path, *strict[:-2])) == 0
        assert run(arguments("medbench", server.url, "c", tmp_path, *strict)) == 4
        assert "safety items lost by candidate 1 items, bound 0" in capsys.readouterr().err
    with LoopbackChat(lambda _: "我不知道") as server:
        packed = [*given, "--upload", str(tmp_path / "no.zip")]
        assert run(arguments("medbench", server.url, "b", tmp_path, *packed)) == 3
    assert "'我不知道' is not <D> or <A, B>" in capsys.readouterr().err and not (tmp_path / "no.zip").exists()


def test_medaibench_is_a_form_that_is_filled_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "medaibench", "--template"]) == 0
    form = capsys.readouterr().out
    path = tmp_path / "form.jsonl"
    path.write_text(form)
    given = ["--items", str(path), "--json"]
    assert run(arguments("medaibench", "http://127.0.0.1:9", "a", tmp_path, *given)) == 3
    assert "is an example of the template" in capsys.readouterr().err
    path.write_text(form.replace("replace-me", "own"))
    answers = {
        "血红蛋白是": "0.082 kg/L",
        "每次多少": "0.5 g",
        "挂哪个科": "急诊",
        "病历": "B",
        "过敏性": "A",
    }
    with LoopbackChat(lambda m: "答案：" + next(a for q, a in answers.items() if q in m)) as server:
        assert run(arguments("medaibench", server.url, "a", tmp_path, *given)) == 0
    found = json.loads(capsys.readouterr().out)["run"]
    right = {s["name"]: s["correct"] for s in found["by_dimension"]}
    assert right == {"medical knowledge": 0, **dict.fromkeys(list(right)[1:], 1)} and len(right) == 5
    path.write_text(form.replace("replace-me", "own").replace("smart services", "smart"))
    assert run(arguments("medaibench", "http://127.0.0.1:9", "a", tmp_path, *given)) == 3
    assert "the dimension 'smart'" in capsys.readouterr().err
