"""A release in continuous integration: what it leaves behind, and that the next job goes on where it was."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml
from shown_commands import ROOT, parse, script_commands
from test_release import reduced_nano
from tiny_bundle import make_stages

from packager.cli import run
from packager.errors import GateFailed
from packager.release import Workspace
from packager.release.for_ci import append_summary, write_junit
from validation.gates import at_least
from validation.report import read_report, write_report

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCRIPT = ROOT / ".ci/release.sh"


def _workflow(path: Path) -> dict[Any, Any]:
    document: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_asks_for_no_more_than_it_needs_and_names_what_it_uses(path: Path) -> None:
    workflow = _workflow(path)
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"]
        own = job.get("permissions", {})
        # Only what publishes may ask for an identity, and nothing may write to the repository.
        assert own in ({}, {"contents": "read", "id-token": "write"}), name
        assert bool(own) == (name == "publish")
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w/-]+@(v\d+|[0-9a-f]{40})", step["uses"]), step["uses"]
                assert path.stem != "release" or len(step["uses"].partition("@")[2]) == 40, step["uses"]
            # Inputs reach a shell through variables alone: in its text they would be code.
            assert "${{" not in step.get("run", ""), step


def test_every_packager_command_of_the_workflow_and_the_script_is_understood() -> None:
    steps = [step for job in _workflow(ROOT / ".github/workflows/release.yml")["jobs"].values()
             for step in job["steps"]]  # fmt: skip
    text = "\n".join(step["run"] for step in steps if "run" in step) + SCRIPT.read_text(encoding="utf-8")
    text = text.replace('"${key[@]}"', "--signing-key KEY").replace("; fi", "").replace("; then", "\n")
    text = re.sub(r"\$BIN/packager", "packager", text)
    found = [words for words in script_commands(text) if words[0] == "packager"]
    assert [words[1] for words in found] == ["release", "publish", "release", "publish"]
    for words in found:
        parse([word.replace("$workspace", "w") for word in words])
    make = [words for words in script_commands(text) if words[0] == "make"]
    for words in make:
        parse(words)


def test_a_release_that_cannot_begin_leaves_junit_and_summary(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()  # no checkpoint
    recipe = reduced_nano(tmp_path / "recipe.yaml", source={"path": str(tmp_path / "source")})
    junit, summary = tmp_path / "out/junit.xml", tmp_path / "out/summary.md"
    arguments = ["release", str(recipe), "--workspace", str(tmp_path / "w")]
    for _ in range(2):
        assert run([*arguments, "--junit", str(junit), "--summary", str(summary)]) == 3
    [suite] = ET.parse(junit).getroot().findall("testsuite")
    assert (suite.get("name"), suite.get("tests"), suite.get("errors"), suite.get("skipped")) == (
        "stages", "6", "1", "5",
    )  # fmt: skip
    [error] = suite.findall("testcase/error")
    assert "is not a checkpoint" in error.get("message", "")
    assert summary.read_text().count("**Ended at quantize.**") == 2  # appended, as GitHub's file wants it
    assert "what to do: " in summary.read_text()


def test_gates_that_fail_are_failures_and_what_was_not_measured_is_skipped(tmp_path: Path) -> None:
    gates = (at_least("acceptance length", 1.1, 2.5), at_least("speed", None, 9.0), at_least("more", 3, 2))
    stages = make_stages(tmp_path / "w", gates=gates)
    workspace = Workspace(tmp_path / "w")
    write_report(read_report(workspace.evidence / "report.json"), workspace.evidence)
    failed = GateFailed("the gates are not passed", "Read the report.")
    write_junit(tmp_path / "junit.xml", stages.recipe, workspace, failed)
    append_summary(tmp_path / "summary.md", stages.recipe, workspace, failed)
    first = (tmp_path / "junit.xml").read_bytes()
    write_junit(tmp_path / "junit.xml", stages.recipe, workspace, failed)
    assert (tmp_path / "junit.xml").read_bytes() == first
    suites = {suite.get("name"): suite for suite in ET.parse(tmp_path / "junit.xml").getroot()}
    states = {
        str(case.get("name")): [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        for suite in suites.values()
        for case in suite.findall("testcase")
    }
    assert states == {
        "quantize": [], "extend-context": [], "draft": [], "validate": ["failure"], "bundle": ["skipped"],
        "publish": ["skipped"], "acceptance length": ["failure"], "speed": ["skipped"], "more": [],
    }  # fmt: skip
    assert "| acceptance length | 1.1 | at least 2.5 | fail |" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_shell_example_killed_after_a_stage_goes_on_in_the_next_job(tmp_path: Path) -> None:
    """The second job has the folder as a cache gives it back: unpacked elsewhere. No engine is reached."""
    recipe = reduced_nano(tmp_path / "recipe.yaml")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/packager").write_text(f'#!/bin/bash\nexec {sys.executable} -m packager "$@"\n')
    (tmp_path / "bin/packager").chmod(stat.S_IRWXU)

    def job(workspace: Path) -> str:
        """Run the example until the draft is begun, then kill all of it."""
        log = workspace.with_suffix(".log")
        settings = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "WORKSPACE": str(workspace)}
        settings |= {"JUNIT": str(tmp_path / "junit.xml"), "SUMMARY": str(tmp_path / "summary.md")}
        with log.open("w") as stream:
            process = subprocess.Popen(
                [SCRIPT, recipe], env={**os.environ, **settings}, stderr=stream, stdout=stream,
                start_new_session=True, cwd=tmp_path,
            )  # fmt: skip
            try:
                for _ in range(1200):
                    if process.poll() is not None or "draft: started" in log.read_text():
                        break
                    time.sleep(0.05)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return log.read_text()

    first = job(tmp_path / "first")
    assert "quantize: started" in first
    assert "extend-context: done" in first
    assert "draft: started" in first
    shutil.make_archive(str(tmp_path / "cache"), "gztar", tmp_path / "first")
    shutil.unpack_archive(tmp_path / "cache.tar.gz", tmp_path / "second")
    second = job(tmp_path / "second")
    assert "quantize: started" not in second
    assert "extend-context: started" not in second
    assert "draft: started" in second
