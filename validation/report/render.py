"""A report as JSON, one self-contained HTML page, Markdown and JUnit XML; the bytes follow from it alone."""

from __future__ import annotations

import base64
import hashlib
import os
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from validation.endpoint import Sampling
from validation.report.figures import accuracy_shares, at_multiple, figures, multiples, percent
from validation.report.layout import SUMMARY_CHARACTERS, anchors, heading, page_parts, summaries
from validation.report.model import Report, signed


def write_report(report: Report, directory: Path) -> dict[str, Path]:
    """Write report.json, .html, .md and junit.xml, each whole or not at all; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "report.json": report.model_dump_json(indent=1) + "\n",
        "report.html": html_page(report),
        "report.md": markdown(report),
        "junit.xml": junit_xml(report),
    }
    paths = {}
    for name, text in contents.items():
        path = directory / name
        temporary = path.with_name(name + ".tmp")
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        paths[name] = path
    return paths


def verdict(report: Report) -> str:
    """The outcome in one sentence."""
    gated = [g for g in report.gates if g.outcome != "not gated"]
    missed = [g.name for g in gated if g.outcome == "fail"]
    unmeasured = [g.name for g in gated if g.outcome == "not measured"]
    if missed:
        return f"{len(missed)} of {len(gated)} gates failed: {', '.join(missed)}."
    if not gated:
        return "Not judged: no gate was set."
    if unmeasured:
        names = ", ".join(unmeasured)
        return f"Not decided: {len(unmeasured)} of {len(gated)} gates were not measured: {names}."
    return f"All {len(gated)} gates passed." if len(gated) > 1 else "The one gate passed."


def html_page(report: Report) -> str:
    """One page with nothing to load. Its one script sorts and unfolds; without it the page is whole.

    The page's security policy names that script by its digest, so nothing else in it can run.
    """
    environment = _environment(autoescape=True)
    script = environment.get_template("report.js.jinja").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        css=Markup(environment.get_template("report.css.jinja").render()),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        plots=figures(report),
        parts=page_parts(report),
        contents=_contents(report),
        **_context(report),
    )


def markdown(report: Report) -> str:
    """A summary for a continuous-integration page or a terminal; panels as far as they fit."""
    template = _environment(autoescape=False).get_template("report.md.jinja")
    context = _context(report)
    bare = template.render(panels="", **context)
    return template.render(panels=summaries(report, SUMMARY_CHARACTERS - len(bare)), **context)


def _contents(report: Report) -> list[tuple[str, str]]:
    """Link target and title of each section, in the page's order."""
    found = [
        ("gates", "Gates"),
        ("measured", "What was measured"),
        ("accuracy", "Accuracy"),
        ("same-output", "Same output, token for token"),
        ("long-records", "Long records"),
    ]
    found += [(anchor, p.title) for anchor, p in zip(anchors(report.panels), report.panels, strict=True)]
    found.append(("speed", "Speed"))
    if report.stages:
        found.append(("made", "How it was made"))
    if report.notes:
        found.append(("notes", "Notes"))
    return found


def junit_xml(report: Report) -> str:
    """The gates as test cases: failed is a failure, not measured and not gated are skipped."""
    cases = []
    for gate in report.gates:
        case = ET.Element("testcase", classname=report.title, name=gate.name)
        bound = "no bound" if gate.bound is None else f"{gate.comparison} {figure(gate.bound, gate.unit)}"
        said = f"measured {figure(gate.measured, gate.unit)}, bound {bound}"
        if gate.outcome == "fail":
            ET.SubElement(case, "failure", message=said)
        elif gate.outcome != "pass":
            ET.SubElement(case, "skipped", message=gate.outcome)
        ET.SubElement(case, "system-out").text = said
        cases.append(case)
    outcomes = [g.outcome for g in report.gates]
    suite = ET.Element(
        "testsuite",
        name="gates",
        tests=str(len(cases)),
        failures=str(outcomes.count("fail")),
        errors="0",
        skipped=str(outcomes.count("not measured") + outcomes.count("not gated")),
    )
    properties = ET.SubElement(suite, "properties")
    for subject in report.subjects:
        ET.SubElement(properties, "property", name=subject.name, value=subject.digest)
    suite.extend(cases)
    root = ET.Element("testsuites", name=report.title)
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def figure(value: float | None, unit: str = "") -> str:
    """A figure with its unit, to four digits; `×` and `%` follow closely, other units after a space."""
    if value is None:
        return "not measured"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    text = "0" if text == "-0" else text.replace("-", "\N{MINUS SIGN}")
    if unit in ("x", "×"):
        return f"{text}×"
    return f"{text} {unit}".rstrip()


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _sampling(sampling: Sampling | None) -> str:
    if sampling is None:
        return "greedy"
    seed = "no seed" if sampling.seed is None else f"seed {sampling.seed}"
    return (
        f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, {seed}, "
        f"at most {sampling.max_tokens} tokens"
    )


_KINDS = {
    "dose": "a dose",
    "allergy": "an allergy",
    "laboratory": "a laboratory value",
    "later": "the later of two conflicting notes",
}


def _plain(value: str | int | float) -> str:
    return value if isinstance(value, str) else figure(float(value))


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("validation.report"),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "percent": percent,
        "range": lambda share: f"{100 * share.low:.1f} – {100 * share.high:.1f}",
        "signed": signed,
        "figure": figure,
        "plain": _plain,
        "heading": heading,
        "duration": duration,
        "sampling": _sampling,
        "kind": lambda kind: _KINDS.get(kind, kind),
        "ms": lambda v: f"{v:.1f}" if v < 100 else f"{v:,.0f}",
        "sentence": lambda text: text[:1].upper() + text[1:].rstrip(".") + ".",
        "short": lambda digest: digest.removeprefix("sha256:")[:12],
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    return environment


def _context(report: Report) -> dict[str, Any]:
    """What both templates show, as rows."""
    accuracy_rows: list[dict[str, Any]] = []
    if report.accuracy:
        for shares in accuracy_shares(report):
            first = shares[0]
            accuracy_rows.append(
                {
                    "name": "All" if first is report.accuracy[0].overall else first.name,
                    "total": first is report.accuracy[0].overall,
                    "n": first.n,
                    "shares": shares,
                    "majority_share": first.majority_share,
                    "majority_answer": first.majority_answer,
                }
            )
    paired = {p.scope: p for p in report.long_comparison.by_multiple} if report.long_comparison else {}
    long_rows = []
    for multiple in multiples(report):
        shares_ = [at_multiple(run.by_multiple, multiple) for run in report.long_context]
        some = next(s for s in shares_ if s is not None)
        long_rows.append(
            {
                "multiple": multiple,
                "tokens": f"{some.context_tokens:,}",
                "n": some.n,
                "shares": shares_,
                "paired": paired.get(f"{multiple:g}x"),
            }
        )
    speed_rows = [
        {
            "label": run.label,
            "cell": cell,
            "ratio": next(
                (x for x in report.ratios if x.candidate == run.label and x.concurrency == cell.concurrency),
                None,
            ),
        }
        for run in report.throughput
        for cell in run.cells
    ]
    return {
        "r": report,
        "asked": list(report.asked()),
        "verdict": verdict(report),
        "accuracy_rows": accuracy_rows,
        "long_rows": long_rows,
        "speed_rows": speed_rows,
    }
