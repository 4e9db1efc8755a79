"""All shapes of the 103B model: what is told from headers is right, and costs little memory and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sparse_checkpoint import write_sparse_checkpoint

from packager.checkpoint import Checkpoint

BF16, FP32 = 102_889_697_280, 7_936
# VmHWM is of this program alone; ru_maxrss would count the parent's memory too.
MEASURED = """
import json, sys
from packager.cli import run
code = run(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
read = dict(line.split(": ") for line in open("/proc/self/io"))["rchar"]
heavy = sorted({"torch", "numpy", "transformers", "huggingface_hub"} & sys.modules.keys())
print(json.dumps({"rss": int(status["VmHWM"].split()[0]) * 1024, "read": int(read), "heavy": heavy}),
      file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module", params=["sharded", pytest.param("single", marks=pytest.mark.slow)])
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "source"
    if request.param == "sharded":
        return write_sparse_checkpoint(path)
    write_sparse_checkpoint(path, shard_bytes=1 << 50)
    (path / "model.safetensors.index.json").unlink()
    (path / "model-00001-of-00001.safetensors").rename(path / "model.safetensors")
    return path


def tell(*arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON document of a verb in a process of its own, and what that process used."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])


def require_light(used: dict[str, Any]) -> None:
    assert used["rss"] < 300_000_000
    assert used["read"] < 100_000_000, "more than headers was read"
    assert used["heavy"] == []


def test_inspect_counts_every_parameter_of_103b(sparse: Path) -> None:
    found, used = tell("inspect", sparse)
    dtypes = found["weights"]["dtypes"]
    assert {name: row["elements"] for name, row in dtypes.items()} == {"BF16": BF16, "F32": FP32}
    assert found["parameters"]["total"] == BF16 + FP32
    assert found["weights"]["bytes"] == 2 * BF16 + 4 * FP32
    assert found["sound"] is True
    require_light(used)


def test_a_dry_run_tells_the_plan_of_103b(sparse: Path) -> None:
    found, used = tell("quantize", sparse, "--dry-run")
    rows = {(row["role"], row["decision"]): row for row in found["roles"]}
    assert sum(row["parameters"] for row in found["roles"]) == BF16 + FP32
    experts = rows["routed_expert", "quantize"]
    assert experts["tensors"] == 31 * 256 * 3
    assert experts["parameters"] == 31 * 256 * 3 * 4096 * 1024
    # One byte an element, and an FP32 scale for each 128 x 128 of them.
    assert experts["output_bytes"] == experts["parameters"] * (1 + 4 / 128**2)
    assert rows["expert_bias", "keep"]["stored_as"] == "F32"
    assert {role for role, decision in rows if decision == "keep"} == {
        "embedding", "lm_head", "norm", "router", "expert_bias",
    }  # fmt: skip
    assert found["source_bytes"] == 2 * BF16 + 4 * FP32
    assert found["output_bytes"] == pytest.approx(104.2e9, rel=0.001)
    assert found["shards"] == 21
    require_light(used)


def test_plan_reads_the_same_bytes_of_103b(sparse: Path) -> None:
    found, used = tell("plan", sparse, "--precision", "bf16")
    assert found["weights_bytes"] == 2 * BF16 + 4 * FP32
    assert found["weights_from"] == "shard headers"
    require_light(used)


def test_missing_experts_of_103b_are_named_on_one_line(sparse: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sparse.iterdir():
        (copy / path.name).symlink_to(path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({**config, "num_experts": 264}))
    done = subprocess.run(
        [sys.executable, "-m", "packager", "quantize", str(copy), "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    folded = "missing: model.layers.{1-31}.mlp.experts.{256-263}.gate_proj.weight [1024, 4096] (248 tensors)"
    assert f"  {folded}" in lines
    assert len(done.stderr) < 5000
    assert done.stdout == ""


def test_a_hole_of_206_gb_is_read_one_piece_at_a_time(sparse: Path) -> None:
    checkpoint = Checkpoint.open(sparse)
    assert checkpoint.nbytes == 2 * BF16 + 4 * FP32
    with checkpoint.reader() as reader:
        last = list(checkpoint.tensors.values())[-1]
        assert not reader.bytes(last, last.nbytes - 4096).any()
        expert = checkpoint.tensors["model.layers.31.mlp.experts.255.down_proj.weight"]
        assert [part.nbytes for part in reader.chunks(expert, 3 << 20)] == [3 << 20, 3 << 20, 2 << 20]
