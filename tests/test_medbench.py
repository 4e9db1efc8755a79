"""MedBench: files are read, answered, checked, packed, and scored where they hold labels."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from loopback_chat import LoopbackChat

from validation.endpoint import Target
from validation.errors import MeasurementError
from validation.medbench import (
    MedBenchRun,
    check,
    compare_medbench,
    measure_medbench,
    medbench_panel,
    pack,
    read_folder,
)
from validation.medbench.files import written

SINGLE = "请完成下列单选题，只需要输出最适合的选项字母。\n水银血压计的检定周期是？\nA. 1年\nB. 3个月\n"
SEVERAL = "选出一个或多个正确回答的序号，多个答案之间使用','分隔。\nA. 出血性胃炎\nB. 疝\nC. 消化性溃疡\n"
OPEN = "简述该病人的诊断及诊断依据。"
REFERENCE = "诊断：右侧腹股沟疝嵌顿。\n依据：①T 37.8℃；②肿块不可回纳"


def line(question: str, answer: str = "", **other: object) -> str:
    return json.dumps({"question": question, "answer": answer, "other": other}, ensure_ascii=False) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "CMB-Clin-extended").mkdir(parents=True)
    (root / "MedSafety.jsonl").write_text(
        line(SINGLE, "<A>", id=4) + line(SINGLE + "C. 5年", "A", id=4) + "\n" + line(SINGLE + "D. 2年")
    )
    (root / "DDx-advanced.jsonl").write_text(line(SEVERAL, "A,C", id=1))
    (root / "CMB-Clin-extended" / "test.jsonl").write_text(line(OPEN, REFERENCE, id=2))
    (root / "MedRehab.jsonl").write_text(line("请制定康复计划。", id=3))
    return root


def answer(question: str) -> str:
    if "单选" in question:
        return "<think>B 或 A？</think>\n答案：A" if "C. 5年" not in question else "B. 3个月"
    return "C, A" if "一个或多个" in question else "右侧 腹股沟疝 嵌顿，肿块不可回纳，体温37.8℃。"


def target(tmp_path: Path, url: str, label: str = "BF16") -> Target:
    return Target(url, "model", f"sha256:{label}", label, tmp_path / "cache")


def test_answers_are_in_its_form_and_scored_where_there_are_labels(folder: Path, tmp_path: Path) -> None:
    files = read_folder(folder)
    assert [(f.task, f.dimension) for f in files] == [
        ("CMB-Clin-extended", "complex reasoning"),
        ("DDx-advanced", "complex reasoning"),
        ("MedRehab", "not assigned"),
        ("MedSafety", "safety and ethics"),
    ]
    assert [q.form for f in files for q in f.questions] == ["text", "choice", "text", *["choice"] * 3]
    with LoopbackChat(answer) as server:
        run = measure_medbench(target(tmp_path, server.url), files)
        again = measure_medbench(target(tmp_path, server.url), files)
        assert sum(server.asked.values()) == 6 and again == run
    assert run.choices is not None
    assert {r.id for r in run.choices.results if r.safety} == {"MedSafety:1", "MedSafety:2"}
    assert run.answers["MedSafety:1"] == "<A>" and run.answers["MedSafety:2"] == "<B>"
    assert run.answers["DDx-advanced:1"] == "<A, C>"
    assert run.answers["MedSafety:4"] == "<A>", "lines are counted as in the file, blank ones too"
    scores = {t.name: (t.labelled, t.choices_right, t.score) for t in run.by_task}
    assert scores["MedSafety"] == (2, 1, 0.5) and scores["DDx-advanced"] == (1, 1, 1.0)
    # The answer says neither 诊断 nor 依据, and 体温 instead of T.
    assert run.open[0].missing == ("诊断", "依据", "T 37.8℃") and run.open[0].held == 2
    assert scores["MedRehab"] == (0, None, None)
    by_dimension = {d.name: d.score for d in run.by_dimension}
    assert by_dimension == {
        "complex reasoning": pytest.approx((0.4 + 1.0) / 2),
        "not assigned": None,
        "safety and ethics": 0.5,
    }
    assert MedBenchRun.model_validate_json(run.model_dump_json()) == run
    assert medbench_panel(run).tables[1].rows[2][5] is None
    assert read_folder(folder, {"MedRehab": "language generation"})[2].dimension == "language generation"


def test_listed_key_points_may_have_equivalents(folder: Path, tmp_path: Path) -> None:
    row = line(OPEN, REFERENCE, key_points=["右侧腹股沟疝嵌顿", ["发热", "体温37.8℃"], "肠梗阻"])
    (folder / "CMB-Clin-extended" / "test.jsonl").write_text(row)
    with LoopbackChat(answer) as server:
        run = measure_medbench(target(tmp_path, server.url), read_folder(folder))
    assert (run.open[0].held, run.open[0].points, run.open[0].missing) == (2, 3, ("肠梗阻",))


def test_the_upload_is_the_same_lines_with_answers_and_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    files = read_folder(folder)
    with LoopbackChat(answer) as server:
        answers = measure_medbench(target(tmp_path, server.url), files).answers
    first = pack(files, answers, tmp_path / "one.zip").read_bytes()
    assert pack(files, answers, tmp_path / "two.zip").read_bytes() == first
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert "MedBench_LLM/CMB-Clin-extended/test.jsonl" in archive.namelist()
        rows = [json.loads(row) for row in archive.read("MedBench_LLM/MedSafety.jsonl").decode().splitlines()]
    assert [row["answer"] for row in rows] == ["<A>", "<B>", "<A>"]
    assert rows[0] == {"question": SINGLE, "answer": "<A>", "other": {"id": 4}}

    wrong = answers | {"MedSafety:1": "我不确定", "MedRehab:1": " ", "DDx-advanced:7": "<A>"}
    assert check(files, wrong) == [
        "DDx-advanced:7: an answer to no question",
        "MedRehab.jsonl, line 1: no answer",
        "MedSafety.jsonl, line 1: '我不确定' is not <D> or <A, B>",
    ]
    with pytest.raises(MeasurementError, match="not packed: DDx-advanced:7"):
        pack(files, wrong, tmp_path / "three.zip")
    assert not (tmp_path / "three.zip").exists()
    assert pack(files, wrong, tmp_path / "three.zip", faulty=True).is_file()
    assert (
        written("choice", "分析：A 不对。\n因此选 B\n<B>") == "<B>"
        and written("choice", "无法判断") == "无法判断"
    )


def test_two_models_pair_on_the_labelled_items(folder: Path, tmp_path: Path) -> None:
    questions = [f"{SINGLE}第{k}题" for k in range(40)]
    (folder / "DDx-advanced.jsonl").write_text("".join(line(f"{SEVERAL}第{k}题", "A, C") for k in range(5)))
    (folder / "MedSafety.jsonl").write_text("".join(line(q, "<A>") for q in questions))
    texts = "".join(line(f"{OPEN}第{k}例", REFERENCE) for k in range(12))
    (folder / "CMB-Clin-extended" / "test.jsonl").write_text(texts)
    files = read_folder(folder)
    with LoopbackChat(answer) as one, LoopbackChat(lambda q: "B" if "单选" in q else "疝") as two:
        before = measure_medbench(target(tmp_path, one.url), files)
        after = measure_medbench(target(tmp_path, two.url, "FP8"), files)
    found = compare_medbench(before, after, margin_points=2)
    assert found.choices is not None and found.choices.overall.only_reference == 45
    assert found.inferior and found.open is not None and found.open.overall.verdict == "inferior"
    assert found.open.overall.difference_points == pytest.approx(-40)
    assert len(medbench_panel(after, found).unfoldings) == len(after.faults) + 45
    same = compare_medbench(before, before, margin_points=2)
    assert not same.inferior and same.open is not None and same.open.overall.difference_points == 0
    (folder / "MedSafety.jsonl").write_text(line(SINGLE, "<A>"))
    with LoopbackChat(answer) as one:
        other = measure_medbench(target(tmp_path, one.url), read_folder(folder))
    with pytest.raises(MeasurementError, match="different files"):
        compare_medbench(before, other, margin_points=2)


def test_faults_in_the_files_are_named(folder: Path, tmp_path: Path) -> None:
    for content, message in [
        ('{"question": "x"', "line 1 is not JSON"),
        (line("x") + '{"answer": "A"}\n', "line 2: no question"),
        ('{"question": "x", "answer": ["A"]}', "line 1: the answer is not text"),
        ("\n", "holds no questions"),
    ]:
        (folder / "MedRehab.jsonl").write_text(content)
        with pytest.raises(MeasurementError, match=message):
            read_folder(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MeasurementError, match="holds no JSONL") as raised:
        read_folder(tmp_path / "empty")
    assert "medbench.opencompass.org.cn" in raised.value.remedy
