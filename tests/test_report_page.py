"""Panels in the report: laid out whole, whatever a model said in them; small enough; whole in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_panels import HOSTILE, rubric_panel
from test_validation_report import DIGESTS, MACHINE, sample_inputs

from validation.gates import at_least
from validation.panel import Column, Panel, Table, Unfolding
from validation.report import ReportInputs, Subject, build_report, write_report
from validation.report.drawing import clean_svg
from validation.report.layout import SUMMARY_CHARACTERS
from validation.report.render import html_page, markdown
from validation.report.room import LONGEST_TEXT, cut, shares
from validation.tasks.comparison import AccuracyComparison, Flip, paired_outcomes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def inputs_of(*panels: Panel, comparisons: tuple[AccuracyComparison, ...] = ()) -> ReportInputs:
    names = ("BF16", "FP8")
    return ReportInputs(
        title="Panels",
        subjects=tuple(Subject(name=name, digest=DIGESTS[name]) for name in names),
        weights_served="native",
        environment=MACHINE,
        gates=(at_least("score", 0.61, 0.6),),
        panels=panels,
        comparisons=comparisons,
    )


def test_a_panel_stands_in_every_form_and_its_hostile_text_is_text() -> None:
    report = build_report(inputs_of(rubric_panel(DIGESTS["FP8"]), rubric_panel(DIGESTS["FP8"])))
    page, summary = html_page(report), markdown(report)
    for text in (page, summary):
        assert "HealthBench, main" in text and "61.2 %" in text and "9.8" in text and "−1.5" in text
        assert "Scores of an unqualified judge do not count." in text
        assert HOSTILE not in text and "<img" not in text
    assert page.count("<script") == 1 and page.count("onerror=") == page.count("onerror=&#34;")
    # Numbers carry their value to be sorted by; what was not measured carries none, and says so.
    assert '<td class="n" data-v="61.25">61.2</td>' in page.replace("61.3", "61.2")
    assert page.count('<td class="n soft">not measured</td>') == 4
    assert "| emergency referrals | 1,204 |" in summary and "global health \\| 全球健康" in summary
    assert "Every criterion" in page and "Every criterion" not in summary  # one table is enough for CI
    assert 'id="panel-healthbench-main"' in page and 'href="#panel-healthbench-main-2"' in page
    assert "rule-based, qualified" in page and "Measured on</dt><dd>FP8</dd>" in page


def test_drawings_keep_their_shapes_and_nothing_that_runs_or_loads() -> None:
    panel = rubric_panel(DIGESTS["FP8"])
    for caption, text in panel.plots[:2]:
        kept = clean_svg(text)
        assert kept is not None, caption
        assert re.findall(r"<(?:circle|line|rect|text)\b", kept) == re.findall(
            r"<(?:circle|line|rect|text)\b", text
        )
        assert re.findall(r'(?:cx|x1|width|class)="[^"]*"', kept) == re.findall(
            r'(?:cx|x1|width|class)="[^"]*"', text
        )
    kept = clean_svg(panel.plots[2][1])
    assert kept is not None and 'id="kept"' in kept and "shown &lt;b&gt;" in kept and "fill: red" in kept
    for word in ("script", "onload", "foreignObject", "javascript", "example", "position", "image", "<style"):
        assert word not in kept
    assert clean_svg("<svg><rect") is None and clean_svg("plain words") is None
    assert clean_svg('<!DOCTYPE svg [<!ENTITY a "b">]><svg>&a;</svg>') is None
    assert clean_svg("<svg>" + "<g></g>" * 40_000 + "</svg>") is None


def test_what_matplotlib_draws_is_shown() -> None:
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2, 3], [1.0, 4.0, 9.0], label="KL")
    written = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(written, format="svg")
    kept = clean_svg(written.getvalue())
    assert kept is not None
    assert kept.count("<path") == written.getvalue().count("<path ") and "stroke: #1f77b4" in kept


def test_room_is_shared_fairly_and_a_cut_is_said() -> None:
    assert shares([10, 1000, 30], 100) == [10, 60, 30]
    assert shares([10, 20], 100) == [10, 20] and shares([], 5) == []
    text = "a" * LONGEST_TEXT + "Answer: 7 mg"
    assert cut(text).endswith("Answer: 7 mg") and "12 characters left out" in cut(text)
    assert len(cut(text, 900)) < 1000 and cut(text, 900).endswith("Answer: 7 mg")
    assert cut("short") == "short"


def big_inputs(items: int) -> ReportInputs:
    """Every item flips, its texts the longest there are, in two comparisons; a panel has a row an item."""
    said = "患者目前剂量为每日一次。" * 500
    flips = tuple(
        Flip(
            id=f"q{k}", task="dose", language="zh", direction="wrong to right" if k % 3 else "right to wrong",
            question=said, expected="A", reference_answer="A", candidate_answer="B", reference_text=said,
            candidate_text=said,
        )
        for k in range(items)
    )  # fmt: skip
    overall = paired_outcomes("all", [(k % 3 == 0, k % 3 != 0) for k in range(items)], 2)
    comparison = AccuracyComparison(
        reference="BF16", candidate="FP8", reference_subject=DIGESTS["BF16"],
        candidate_subject=DIGESTS["FP8"], items_digest="sha256:0", overall=overall, by_task=(overall,),
        flips=flips,
    )  # fmt: skip
    panel = Panel(
        key="items",
        title="Every item",
        summary="All of them.",
        tables=(
            Table(
                columns=(
                    Column(name="Item", kind="text"),
                    *(Column(name=f"c{k}", digits=3) for k in range(6)),
                ),
                rows=tuple((f"<item {k}>", *(k / (j + 1) for j in range(6))) for k in range(items)),
            ),
        ),
        unfoldings=tuple(Unfolding(line=f"item {k}", text=(("Answer", said),)) for k in range(items)),
        plots=(("Too many points.", "<svg>" + '<circle cx="1" cy="2" r="3"/>' * 10_000 + "</svg>"),) * 2,
    )
    return inputs_of(panel, comparisons=(comparison, comparison))


@pytest.mark.slow
def test_a_page_of_5000_items_is_below_3_mb_and_says_what_it_leaves_out() -> None:
    report = build_report(big_inputs(5_000))
    page = html_page(report)
    assert 1_000_000 < len(page.encode()) < 3_000_000
    for k, place in enumerate(("comparisons[0].flips", "comparisons[1].flips", "panels[0].unfoldings")):
        left = re.search(rf"([\d,]+) more would make this page too large.*?{re.escape(place)}<", page)
        assert left, place
        shown = page.split("<h3>Flips,")[k + 1] if k < 2 else page[page.index('id="panel-items"') :]
        count = shown.split("</section>")[0].count("<details>")
        assert count + int(left[1].replace(",", "")) == 5_000 and count > 20
    assert re.search(r"3,\d\d\d more rows would make this page.*panels\[0\]\.tables\[0\]\.rows", page)
    assert "wrong to right" not in page.split("<h3>Flips,")[1]  # the lost ones come first
    assert page.count("This drawing is not shown") == 2
    summary = markdown(report)
    assert len(summary) < SUMMARY_CHARACTERS and "4970 more rows" in summary


def test_a_summary_holds_as_many_panels_as_fit_and_names_the_others() -> None:
    panel = rubric_panel(DIGESTS["FP8"])
    many = tuple(panel.model_copy(update={"title": f"Panel {k}"}) for k in range(120))
    summary = markdown(build_report(inputs_of(*many)))
    assert len(summary) < SUMMARY_CHARACTERS
    assert (
        "## Panel 3\n" in summary and "Too long to be shown here in full, see report.html: Panel" in summary
    )
    assert "## Measured" in summary and summary.rstrip().endswith("schema 2.")


PROBE = """
addEventListener("load", () => {
  const found = { width: innerWidth, scroll: document.documentElement.scrollWidth, title: document.title };
  const table = document.querySelector("#panel-healthbench-main table");
  const column = (at) => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
  const sorted = (at) => {
    table.tHead.rows[0].cells[at].querySelector("button").click();
    return column(at);
  };
  found.up = sorted(2); found.down = sorted(2); found.back = sorted(2); found.count = sorted(1);
  const all = (selector, holds) => [...document.querySelectorAll(selector)].filter(holds).length;
  found.boxes = all(".scroll", (box) => box.scrollWidth > box.clientWidth + 1);
  dispatchEvent(new Event("beforeprint"));
  found.closed = document.querySelectorAll("details:not([open])").length;
  dispatchEvent(new Event("afterprint"));
  found.open = document.querySelectorAll("details[open]").length;
  document.querySelector(".control").click();
  found.opened = document.querySelectorAll("details[open]").length;
  found.wide = all("details[open] pre", (text) => text.scrollWidth > innerWidth);
  found.after = document.documentElement.scrollWidth;
  parent.postMessage(JSON.stringify(found), "*");
});
"""


FRAME = """<!doctype html><iframe width="{width}" height="900" style="border: 0" src="probed.html"></iframe>
<script>addEventListener("message", (event) => {{ document.body.dataset.found = event.data; }});</script>"""
"""A window of a phone's width: headless Chromium makes none narrower than 500 pixels."""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is checked without a browser only")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_the_page_sorts_unfolds_fits_the_width_and_is_silent(width: int, tmp_path: Path) -> None:
    """From a file. The page's policy lets the probe through by its digest, not the script beside it."""
    inputs = sample_inputs(tmp_path / "cache")
    panel = rubric_panel(DIGESTS["FP8"])
    path = write_report(build_report(inputs.model_copy(update={"panels": (panel,)})), tmp_path)["report.html"]
    page = path.read_text(encoding="utf-8")
    plain = browse(path)
    assert "CONSOLE" not in plain.stderr, plain.stderr
    assert 'aria-label="Contents"' in plain.stdout
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    page = page.replace("script-src '", f"script-src 'sha256-{digest}' '", 1)
    other = "<script>document.title='owned'</script>"
    probe = page.replace("</body>", f"{other}<script>{PROBE}</script></body>")
    (tmp_path / "probed.html").write_text(probe, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    probed = browse(tmp_path / "frame.html")
    assert "Content Security Policy" in probed.stderr  # of the script that is not let through
    raw = re.search(r'data-found="([^"]*)"', probed.stdout)
    assert raw, probed.stderr
    found = json.loads(raw[1].replace("&quot;", '"'))
    assert (found["width"], found["scroll"], found["after"]) == (width, width, width)
    assert found["title"].endswith("validation report")
    assert found["up"] == ["9.8", "61.2", "100.0", "not measured"]
    assert found["down"] == ["100.0", "61.2", "9.8", "not measured"]
    assert found["back"] == ["61.2", "9.8", "not measured", "100.0"]
    assert found["count"] == ["7", "90", "300", "1,204"]
    assert found["closed"] == found["open"] == found["wide"] == 0 and found["opened"] > 10
    if width == 390:
        assert found["boxes"] > 0  # a wide table scrolls inside its own box


def browse(path: Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--hide-scrollbars", "--window-size=1400,900", "--virtual-time-budget=3000", "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
