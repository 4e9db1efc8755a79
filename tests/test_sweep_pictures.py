"""Sweeps as pictures, claims and predictions: what is drawn was measured, and what is not real is said."""

from __future__ import annotations

import json
import re
import unicodedata
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sweep_documents import EFFICIENCY, ENVIRONMENT, digest, make_sweep

from packager.cli import run as packager
from packager.cli.terminal_plot import terminal_plot
from packager.errors import UsageProblem
from packager.nano import CHECKPOINT
from packager.serving.served_model import model_in
from validation.claims import HERE, Claim, Judged, judge
from validation.claims_sweep import figures_of, models_of
from validation.errors import MeasurementError
from validation.hardware import Hardware, parse_hardware
from validation.picture import axes
from validation.predict import calibrate, transfer
from validation.report.chart import inline_svg, svg_file
from validation.report.drawing import clean_svg
from validation.sweep_bound import bound_of, context_of, known_hardware, step_cells
from validation.sweep_model import Sweep
from validation.sweep_panel import sweep_panel
from validation.sweep_pictures import pictures

SHAPES = ("line", "use", "text", "title", "desc", "path")


def elements(svg: str) -> list[str]:
    return [element.tag.rpartition("}")[2] for element in ET.fromstring(svg).iter()]


@pytest.mark.parametrize("seed", range(4))
def test_every_measured_point_lies_in_its_picture_and_below_its_roofline(seed: int) -> None:
    levels = [(1, 2), (1, 8, 64), (3,), (1, 4, 16, 64, 256)][seed]
    lengths = [((128, 64), (512, 64), (2048, 64)), ((1024, 128),), ((1, 1), (9000, 900)), ((64, 64),)][seed]
    sweep = make_sweep(seed=seed, concurrency=levels, lengths=lengths, repeats=1 + seed)
    drawn = pictures(sweep)
    kinds = [picture.key.split("-")[0] for picture in drawn]
    pairs = sum(1 for lo, hi in pairwise(lengths) if lo[1] == hi[1])
    assert kinds.count("interactivity") == len(lengths)
    assert kinds.count("ratio") == 3
    assert kinds.count("context") == (min(2, len(levels)) if pairs else 0)
    for picture in drawn:
        x, y = axes(picture)
        points = [point for line in picture.lines for point in line.points]
        assert all(0 < x.share(p.x) < 1 for p in points)
        assert all(0 < y.share(v) < 1 for p in points for v in (p.y, p.low, p.high) if v is not None)
        assert 2 <= len(y.ticks) <= 7
        # The cleaner that guards the page takes nothing away from what we draw.
        svg = str(inline_svg(picture))
        assert [e for e in elements(str(clean_svg(svg))) if e in SHAPES] == [
            e for e in elements(svg) if e in SHAPES
        ]
        text = terminal_plot(picture)
        assert max(len(row) for row in text.splitlines()) <= 79
        legend = unicodedata.normalize("NFKC", text)
        for line in picture.lines:
            assert line.bound or f"{'#ox+'[line.style]} {line.name}" in legend
    for cell in sweep.cells:
        bound = bound_of(sweep, cell)
        assert bound is not None
        assert cell.per_user is not None
        assert cell.per_user.median / bound.each == pytest.approx(EFFICIENCY, rel=0.1)


def test_lines_differ_by_marker_and_dash_and_each_point_says_what_it_is() -> None:
    picture = pictures(make_sweep())[0]
    svg = svg_file(picture)
    assert {line.style for line in picture.lines if not line.bound} == {0, 1, 2}
    assert len(set(re.findall(r'href="#([^"]+)"', svg))) == 3
    assert len(set(re.findall(r'stroke-dasharray="([^"]+)"', svg))) == 3
    assert "FP8 + EAGLE3: 4 at once, " in svg
    assert svg.index("<title>Throughput over interactivity") < svg.index("<desc>")
    assert "prefers-color-scheme: dark" in svg
    assert 'xmlns="http://www.w3.org/2000/svg"' in svg
    for element in ET.fromstring(svg).iter():
        for name in ("x", "x1", "x2"):
            value = element.get(name, "0")
            assert not value.endswith("%") or 0 <= float(value[:-1]) <= 100


def test_ratios_have_the_claimed_line_and_gains_of_a_draft_do_not() -> None:
    drawn = {p.title: p for p in pictures(make_sweep()) if p.key.startswith("ratio")}
    dense = drawn["FP8 + EAGLE3 over dense 36B: ratio of output tokens/s"]
    assert dense.levels == ((1.0, "1x"), (3.0, "3x"))
    assert "3x" in svg_file(dense)
    assert "3x |---" in terminal_plot(dense)
    assert drawn["FP8 + EAGLE3 over FP8: ratio of output tokens/s"].levels == ((1.0, "1x"),)
    ratio = make_sweep().ratios[0]
    assert f"{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" in svg_file(dense)


def test_what_is_not_real_is_written_into_every_picture_and_the_summary() -> None:
    sweep = make_sweep(weights="dummy", failed=2)
    for picture in pictures(sweep):
        assert "dummy weights" in svg_file(picture)
        assert "dummy weights" in terminal_plot(picture)
    panel = sweep_panel(sweep)
    assert panel.summary.startswith("Not real (FP8 + EAGLE3: dummy weights, synthetic acceptance 2.5; ")
    assert "Not measured: 2 of 24 cells." in panel.summary
    failures = panel.tables[-1]
    assert [row[1] for row in failures.rows] == ["out of memory"] * 2
    assert len(panel.tables[1].rows) == 24
    assert panel.tables[1].rows[0][4] is None, "a failed cell has no figure, not a bad one"


def test_without_hardware_there_is_no_roofline_and_the_panel_says_so() -> None:
    for sweep in (make_sweep(on=None), make_sweep(models=False)):
        assert not any(line.bound and line.points for p in pictures(sweep) for line in p.lines)
        panel = sweep_panel(sweep)
        assert any(note.startswith("No roofline") for note in panel.notes)
        assert "Of the roofline" not in [column.name for column in panel.tables[1].columns]
    with pytest.raises(MeasurementError, match="what hardware"):
        step_cells(make_sweep(on=None))
    with pytest.raises(MeasurementError, match="no cell"):
        step_cells(make_sweep(models=False))


def claim(quantity: str, value: float, **conditions: Any) -> Claim:
    ratio = quantity == "ratio of output tokens/s"
    stated: dict[str, Any] = {
        "card": "h200",
        "count": 4,
        "concurrency": 4,
        "precision": "fp8",
        "context": 1150,
    }
    stated |= {"baseline_precision": "bf16"} if ratio else {}
    return Claim(
        id="it",
        says="so",
        source="nowhere",
        quantity=quantity,  # type: ignore[arg-type]
        value=value,
        model="ling-flash-2.0",
        baseline="seed-oss-36b" if ratio else None,
        conditions={k: v for k, v in (stated | conditions).items() if v is not None},  # type: ignore[arg-type]
    )


def held(sweep: Sweep, one: Claim) -> Judged:
    return judge(one, figures_of(sweep), models=models_of(sweep))


def test_a_sweep_decides_a_claim_only_by_its_whole_interval() -> None:
    sweep = make_sweep()
    ratio = next(
        r
        for r in sweep.ratios
        if (r.candidate, r.baseline, r.concurrency, r.input_tokens) == ("FP8", "dense 36B", 4, 1024)
    )
    assert ratio.low is not None
    assert ratio.high is not None
    quantity = "ratio of output tokens/s"
    assert held(sweep, claim(quantity, ratio.low * 0.99)).verdict == "verified"
    assert held(sweep, claim(quantity, ratio.ratio)).verdict == "inconclusive"
    assert held(sweep, claim(quantity, ratio.high * 1.01)).verdict == "refuted"
    assert held(make_sweep(repeats=1), claim(quantity, ratio.low / 2)).verdict == "inconclusive"
    assert held(sweep, claim(quantity, 3, concurrency=5)).verdict == "consistent", "not measured there"
    assert held(sweep, claim(quantity, 3, context=1400)).verdict == "consistent"
    vague = held(sweep, claim(quantity, 3, concurrency=None))
    assert vague.verdict == "unfalsifiable"
    assert vague.missing == ("concurrency",)
    assert len(vague.evidence) == 4, "one of each concurrency at that context"


def test_speed_and_gain_are_evidence_too_and_a_draft_counts_only_if_the_claim_has_one() -> None:
    sweep = make_sweep()
    with_draft = next(c for c in sweep.cells if c.variant == "FP8 + EAGLE3" and c.concurrency == 64)
    assert with_draft.output_tokens_per_s is not None
    speed = "output tokens/s"
    fast = 0.9 * with_draft.output_tokens_per_s.median
    at: dict[str, Any] = {"concurrency": 64, "context": round(context_of(with_draft))}
    assert held(sweep, claim(speed, fast, **at)).verdict == "refuted", "it was the draft that was so fast"
    drafted = {"draft_tokens": 3, "acceptance_length": 2.5}
    assert held(sweep, claim(speed, fast, **at, **drafted)).verdict == "verified"
    gain = "gain of a draft"
    assert held(sweep, claim(gain, 1.5, **at, **drafted)).verdict == "verified"
    other = {"draft_tokens": 3, "acceptance_length": 3.0}
    assert held(sweep, claim(gain, 1.5, **at, **other)).verdict == "consistent", "another acceptance"


def test_dummy_weights_never_verify_and_never_refute() -> None:
    sweep = make_sweep(weights="dummy")
    for value in (1.1, 4.6):
        judged = held(sweep, claim("ratio of output tokens/s", value))
        assert (judged.verdict, judged.mark) == ("consistent", "dummy weights")
        assert len(judged.evidence) == 1


def test_a_claim_about_this_machine_is_bounded_by_its_measured_rates() -> None:
    here = parse_hardware("h100").card.model_copy(
        update={"name": "this machine (measured)", "memory_gb": 640.0}
    )
    sweep = make_sweep().model_copy(update={"hardware": Hardware(key=HERE, count=1, card=here)})
    one = claim("output tokens/s", 1000, card=HERE)
    judged = judge(one, figures_of(sweep), card=here, models=models_of(sweep))
    assert judged.verdict == "verified"
    assert "ling-flash-2.0 on 4xhere" in judged.arithmetic
    assert judge(one).bound is None


def test_a_sweep_on_one_card_says_another_ones_cells_by_the_ratio_of_bounds() -> None:
    measured, truth = step_cells(make_sweep(seed=1)), step_cells(make_sweep(seed=2, on="4xh20"))
    assert calibrate(measured).median_error < 0.05
    said = transfer(measured, parse_hardware("h20").card)
    inside = sum(t.low_s <= cell.seconds <= t.high_s for t, cell in zip(said, truth, strict=True))
    assert inside >= 0.8 * len(truth)
    halved = transfer(measured, parse_hardware("h20").card, ways=2)
    assert all(a.bound.memory_s > 1.9 * b.bound.memory_s for a, b in zip(halved, said, strict=True))


def test_the_verbs_read_a_sweep_and_say_what_is_missing_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, bare = tmp_path / "sweep.json", tmp_path / "bare.json"
    whole.write_text(make_sweep(weights="dummy").model_dump_json())
    bare.write_text(make_sweep(models=False, on=None).model_dump_json())
    assert packager(["validate", "picture", str(whole), "--report", str(tmp_path / "page")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Not real (")
    assert max(map(len, printed.splitlines()[1:])) <= 80
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count('<svg class="chart"') == len(list((tmp_path / "page").glob("*.svg"))) == 7
    assert "synthetic acceptance 2.5" in (tmp_path / "page" / "report.md").read_text()
    arguments = ["--on", "4xh200", "--model", "FP8=ling-flash-2.0:fp8", "--model", "dense 36B=seed-oss-36b"]
    assert packager(["validate", "predict", str(bare), "--hardware", "2xh20", "--json", *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["median_error"] < 0.05
    assert len(document["predictions"]) == 16
    for one in document["predictions"]:
        assert one["by_ratio"]["low_s"] <= one["by_ratio"]["seconds"] <= one["by_ratio"]["high_s"]
    assert packager(["validate", "predict", str(whole), "--hardware", "4xh20"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("not real: FP8 + EAGLE3: dummy weights")
    assert max(map(len, printed.splitlines())) <= 82
    assert packager(["validate", "predict", "--published"]) == 0
    assert "median error 18" in capsys.readouterr().out
    for wrong in (["--model", "nobody=seed-oss-36b"], ["--on", "9xabacus"], ["--model", "FP8"]):
        assert packager(["validate", "picture", str(bare), *wrong]) == 2
        assert capsys.readouterr().err
    claims = tmp_path / "claims.yaml"
    claims.write_text(json.dumps([claim("ratio of output tokens/s", 2.5).model_dump()]))
    assert packager(["validate", "claims", str(claims), "--sweep", str(whole)]) == 0
    assert "CONSISTENT, ON DUMMY WEIGHTS" in capsys.readouterr().out
    assert packager(["validate", "claims", str(claims), "--sweep", str(bare), *arguments]) == 0
    assert capsys.readouterr().out.startswith("VERIFIED")


def test_a_served_model_is_read_from_its_folder_whatever_it_is_called(tmp_path: Path) -> None:
    nano = model_in(str(CHECKPOINT))
    assert nano.precision == "bf16"
    assert nano.draft_tokens is None
    assert nano.name == CHECKPOINT.name
    folder = tmp_path / "somebody's copy"
    folder.mkdir()
    config = json.loads(Path("recipes/ling-flash-2.0.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    assert model_in(str(folder), precision="fp8").name == "ling-flash-2.0"
    with pytest.raises(UsageProblem, match="no shape named"):
        model_in("nowhere")


def test_gpus_are_known_by_name_and_memory() -> None:
    def on(*gpus: str) -> str | None:
        found = known_hardware(ENVIRONMENT.model_copy(update={"gpus": gpus}))
        return None if found is None else found.label

    assert on("NVIDIA H20, 97871 MiB", "NVIDIA H20, 97871 MiB") == "2xh20"
    assert on("NVIDIA H20, 143771 MiB") == "1xh20-141"
    assert on("NVIDIA H200, 143771 MiB") == "1xh200"
    assert on("NVIDIA H100 80GB HBM3, 81559 MiB") == "1xh100"
    assert on("NVIDIA A100-SXM4-80GB, 81920 MiB") == "1xa100"
    assert on("NVIDIA A100-SXM4-40GB, 40960 MiB") is None
    assert on("NVIDIA H20, 97871 MiB", "NVIDIA L40S, 46068 MiB") is None
    assert on() is None


def test_names_in_a_sweep_cannot_break_out_of_a_picture() -> None:
    odd = '</svg><script>document.title="x"</script>'
    sweep = make_sweep(concurrency=(1, 4), lengths=((64, 64),))
    renamed = json.loads(sweep.model_dump_json().replace("dense 36B", odd.replace('"', '\\"')))
    for picture in pictures(Sweep.model_validate(renamed)):
        assert "<script" not in str(inline_svg(picture))
        ET.fromstring(svg_file(replace(picture, marks=(odd,))))
    assert digest("x") != digest("y")
