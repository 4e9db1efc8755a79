"""The script that takes evidence on a GPU, tried at nano size on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu" / "measure.py"


@pytest.mark.slow
def test_cells_leave_their_files_once_and_none_begins_that_does_not_fit(tmp_path: Path) -> None:
    def measure(*more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(SCRIPT), "conversion", "--scale", "nano", "--out", str(tmp_path), *more]
        return subprocess.run(line, capture_output=True, text=True)

    late = measure("--seconds", "1")
    assert late.returncode == 1 and "do not fit" in late.stderr and not list(tmp_path.iterdir())
    assert (done := measure()).returncode == 0, done.stderr
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    kernel = json.loads((tmp_path / "conversion-kernel-power-of-two.json").read_text())
    assert kernel["figures"]["same_bits_as_cpu"] and kernel["figures"]["of_copy"] > 0
    assert kernel["environment"]["versions"]["torch"] and kernel["scale"] == "nano"
    assert measure().stderr.count("done before") == len(files) == 4
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == files
