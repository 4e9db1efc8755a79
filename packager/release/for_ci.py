"""What a release leaves for continuous integration, whether it ended well or not: JUnit XML, a summary."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from packager.artifact import is_sealed, read_manifest
from packager.errors import GateFailed, PackagerError
from packager.recipe import Recipe
from packager.release.workspace import Workspace

_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def write_junit(file: Path, recipe: Recipe, workspace: Workspace, failure: BaseException | None) -> None:
    """Stages and gates as test cases. A stage that is not sealed was skipped, or the release ended there.

    The gates are those of the evidence's own `junit.xml`, if there is evidence for this recipe.
    """
    cases = []
    stages = _stages(workspace)
    ended = _ended(stages, failure)
    times = workspace.read_json("timings.json")
    for name, done in stages.items():
        case = ET.Element("testcase", classname=recipe.name, name=name)
        if done and name in times:
            case.set("time", f"{times[name]:.2f}")
        if name == ended:
            kind = "failure" if isinstance(failure, GateFailed) else "error"
            ET.SubElement(case, kind, message=_plain(_message(failure).splitlines()[0])).text = _plain(
                _message(failure)
            )
        elif not done:
            ET.SubElement(case, "skipped", message="not reached")
        cases.append(case)
    failures, errors, skipped = (
        sum(case.find(kind) is not None for case in cases) for kind in ("failure", "error", "skipped")
    )
    suite = ET.Element(
        "testsuite", name="stages", tests=str(len(cases)), failures=str(failures), errors=str(errors),
        skipped=str(skipped),
    )  # fmt: skip
    suite.extend(cases)
    root = ET.Element("testsuites", name=recipe.name)
    root.append(suite)
    gates = workspace.evidence / "junit.xml"
    if stages["validate"] and gates.is_file():
        root.extend(ET.parse(gates).getroot().findall("testsuite"))
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n', encoding="utf-8")


def append_summary(file: Path, recipe: Recipe, workspace: Workspace, failure: BaseException | None) -> None:
    """How the release ended, its stages, and the evidence's own summary, after what the file has already."""
    stages, times = _stages(workspace), workspace.read_json("timings.json")
    ended = _ended(stages, failure)
    lines = [f"# Release of {recipe.name}", ""]
    if failure is None:
        lines += [
            f"Done: bundle `{read_manifest(workspace.bundle).digest}`, signed, rehearsed and asked.",
            "",
        ]
    else:
        lines += [f"**Ended at {ended}.**", "", "```text", _message(failure).replace("```", "'''"), "```", ""]
    lines += ["| stage | state | seconds |", "|---|---|---:|"]
    for name, done in stages.items():
        state = "ended here" if name == ended else "done" if done else "not reached"
        lines.append(f"| {name} | {state} | {times.get(name, '–') if done else '–'} |")
    report = workspace.evidence / "report.md"
    if stages["validate"] and report.is_file():
        lines += ["", report.read_text(encoding="utf-8").rstrip()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n\n")


def _stages(workspace: Workspace) -> dict[str, bool]:
    """Whether each stage is done: sealed, or for the publication recorded."""
    folders = {
        "quantize": workspace.fp8,
        "extend-context": workspace.context,
        "draft": workspace.draft,
        "validate": workspace.evidence,
        "bundle": workspace.bundle,
    }
    done = {name: is_sealed(folder) for name, folder in folders.items()}
    return done | {"publish": bool(workspace.read_json("published.json"))}


def _ended(stages: dict[str, bool], failure: BaseException | None) -> str | None:
    """The stage at which a release ended early: gates fail after `validate` is sealed, the rest before."""
    if failure is None:
        return None
    if isinstance(failure, GateFailed):
        return "validate"
    return next((name for name, done in stages.items() if not done), "publish")


def _message(failure: BaseException | None) -> str:
    if isinstance(failure, PackagerError):
        return f"{failure.message}\nwhat to do: {failure.remedy}" if failure.remedy else failure.message
    return f"{type(failure).__name__}: {failure}"


def _plain(text: str) -> str:
    return _NOT_XML.sub("", text)
