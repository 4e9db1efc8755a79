"""One whole release of the nano by the true command, reduced in size, and what must hold of it afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_release import reduced_nano

from packager.artifact import read_manifest
from packager.recipe import load_recipe
from packager.release import plan_release

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Released:
    """A finished release: its recipe, its workspace, and what the command printed."""

    recipe: Path
    workspace: Path
    printed: str


def _release(recipe: Path, workspace: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "packager", "release", str(recipe), "--workspace", str(workspace)]
    return subprocess.run([*command, *options], capture_output=True, text=True)


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    """The one release that all tests here look at; they must leave it as it is."""
    folder = tmp_path_factory.mktemp("release")
    recipe = reduced_nano(folder / "recipe.yaml")
    done = _release(recipe, folder / "workspace")
    assert done.returncode == 0, done.stderr
    return Released(recipe, folder / "workspace", done.stdout)


def _copy(released: Released, folder: Path) -> Path:
    """The workspace again, by hard links, to do harm to."""
    copy = folder / "workspace"
    shutil.copytree(released.workspace, copy, copy_function=os.link, symlinks=True)
    for record in (copy / "work").glob("*.json"):  # links to records would change with them
        text = record.read_bytes()
        record.unlink()
        record.write_bytes(text)
    return copy


def _changed(released: Released, path: Path, **sections: dict[str, Any]) -> Path:
    document = yaml.safe_load(released.recipe.read_text(encoding="utf-8"))
    for name, changes in sections.items():
        document[name].update(changes)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def test_it_prints_every_stage_and_ends_with_answer_speed_and_places(released: Released) -> None:
    for stage in ("quantize", "extend-context", "draft", "validate", "bundle", "publish"):
        assert f" {stage} " in released.printed
    fields = [line.split()[0] for line in released.printed.splitlines() if line[:1].isalpha()]
    assert fields[-5:] == ["question", "answer", "speed", "report", "bundle"]
    assert "with the draft" in released.printed


def test_every_stage_names_what_it_was_made_from(released: Released) -> None:
    manifests = {name: read_manifest(released.workspace / name) for name in ("fp8", "context", "draft")}
    evidence = read_manifest(released.workspace / "evidence")
    bundle = read_manifest(released.workspace / "bundle")
    assert manifests["fp8"].digest in manifests["context"].inputs.values()
    assert manifests["context"].digest in manifests["draft"].inputs.values()
    assert {found.digest for found in manifests.values()} <= set(evidence.inputs.values())
    assert {evidence.digest, *(found.digest for found in manifests.values())} <= set(bundle.inputs.values())


def test_what_came_back_from_the_hub_is_the_bundle(released: Released) -> None:
    sent, back = released.workspace / "bundle", released.workspace / "published"
    assert read_manifest(back).digest == read_manifest(sent).digest
    for entry in read_manifest(sent).files:
        assert (back / entry.path).read_bytes() == (sent / entry.path).read_bytes()


def test_the_weights_of_the_bundle_are_links_not_copies(released: Released) -> None:
    shards = sorted((released.workspace / "fp8").glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert shard.stat().st_ino == (released.workspace / "bundle" / shard.name).stat().st_ino


def test_the_dry_run_had_the_sizes_right(released: Released) -> None:
    plan = plan_release(load_recipe(released.recipe), released.recipe)
    written = read_manifest(released.workspace / "fp8").metrics["bytes"]
    assert plan.sizes.source == written["source"]
    assert plan.sizes.fp8 == written["written"]
    draft = (released.workspace / "draft" / "model.safetensors").stat().st_size
    assert plan.sizes.draft == pytest.approx(draft, rel=0.01)


def test_a_second_run_does_nothing_says_so_and_needs_no_torch(released: Released) -> None:
    before = {path: path.stat().st_mtime_ns for path in released.workspace.rglob("manifest.json")}
    arguments = ["release", str(released.recipe), "--workspace", str(released.workspace)]
    script = (
        "import sys\n"
        "from packager.cli import run\n"
        f"code = run({arguments!r})\n"
        "sys.exit(code or int(bool({'torch', 'vllm', 'transformers'} & set(sys.modules))))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Nothing to do: ")
    assert done.stdout.partition("\n")[2] == released.printed
    assert {path: path.stat().st_mtime_ns for path in released.workspace.rglob("manifest.json")} == before


def test_json_is_one_document_with_every_figure(released: Released) -> None:
    done = _release(released.recipe, released.workspace, "--json")
    document = json.loads(done.stdout)
    assert document["nothing_to_do"] is True
    assert [stage["stage"] for stage in document["stages"]][-1] == "publish"
    assert document["tokens_per_s"]["with_draft"] > 0
    assert document["answer"]["question"]


def test_the_evidence_says_how_the_weights_were_served(released: Released) -> None:
    from packager.serving import fp8_runs_here

    report = json.loads((released.workspace / "evidence" / "report.json").read_text(encoding="utf-8"))
    assert report["weights_served"] == ("native" if fp8_runs_here()[0] else "dequantized")
    assert "short-context" in [panel["key"] for panel in report["panels"]]
    steps = {step["name"].split(",")[0] for step in report["conduct"]["steps"]}
    assert {"accuracy", "long records", "speed"} <= steps
    settings = yaml.safe_load((released.workspace / "bundle" / "serve.yaml").read_text(encoding="utf-8"))
    assert settings["context_measured"]["longest_record_read"] == settings["max_model_len"]


def test_the_evidence_has_verdicts_the_cost_of_each_step_and_the_noise_floor(released: Released) -> None:
    evidence = released.workspace / "evidence"
    report = json.loads((evidence / "report.json").read_text(encoding="utf-8"))
    panels = {panel["key"]: panel for panel in report["panels"]}
    assert {"verdicts", "matrix", "noise-floor", "safety"} <= panels.keys()
    steps = panels["matrix"]["tables"][1]["rows"]
    assert [row[:3] for row in steps[:-1]] == [
        ["FP8", "BF16", "yes"],
        ["EAGLE3", "FP8", "yes"],
        ["YaRN", "FP8", "yes"],
        ["YaRN", "FP8+EAGLE3", "yes"],
        ["EAGLE3", "FP8+YaRN", "yes"],
    ]
    assert panels["noise-floor"]["tables"][0]["rows"][0][:2] == ["BF16 again", 24]
    # BF16 was truly asked twice: its second answers are kept apart.
    kept = [
        json.loads(path.read_text(encoding="utf-8").split("\n", 1)[0])["settings"]["subject"]
        for path in (released.workspace / "work" / "measurements").glob("answers-*.jsonl")
    ]
    assert sum(subject.endswith(":again") for subject in kept) == 1
    assert {"verdicts", "noise_floor", "steps_points"} <= read_manifest(evidence).metrics.keys()


def test_the_report_has_rubrics_of_both_weights_by_a_qualified_judge(released: Released) -> None:
    report = json.loads((released.workspace / "evidence" / "report.json").read_text(encoding="utf-8"))
    [panel] = [panel for panel in report["panels"] if panel["key"] == "rubrics"]
    scores = panel["tables"][0]
    assert [row[0] for row in scores["rows"]] == ["BF16", "FP8"]
    assert [row[-1] for row in scores["rows"]] == ["yes", "yes"]
    assert len(panel["subjects"]) == 2


def test_a_gate_that_fails_ends_with_4_keeps_the_evidence_and_serves_nothing_again(
    released: Released, tmp_path: Path
) -> None:
    workspace = _copy(released, tmp_path)
    recipe = _changed(released, tmp_path / "recipe.yaml", gates={"min_acceptance_length": 99.0})
    done = _release(recipe, workspace, "--junit", str(tmp_path / "junit.xml"))
    assert done.returncode == 4, done.stderr
    assert '<failure message="measured' in (tmp_path / "junit.xml").read_text(encoding="utf-8")
    assert "acceptance length" in done.stderr
    assert "what to do: " in done.stderr
    assert "serving" not in done.stderr.replace("served", "")  # every answer came from the measurements
    assert read_manifest(workspace / "evidence").metrics["outcome"] == "fail"
    assert read_manifest(workspace / "bundle").digest == read_manifest(released.workspace / "bundle").digest


def test_a_byte_changed_in_a_sealed_stage_ends_with_5_and_names_the_file(
    released: Released, tmp_path: Path
) -> None:
    workspace = _copy(released, tmp_path)
    victim = sorted((workspace / "fp8").glob("*.safetensors"))[0]
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.unlink()
    victim.write_bytes(damaged)
    done = _release(released.recipe, workspace)
    assert done.returncode == 5
    assert victim.name in done.stderr


def test_a_changed_card_makes_only_the_bundle_and_the_publication_again(
    released: Released, tmp_path: Path
) -> None:
    workspace = _copy(released, tmp_path)
    recipe = _changed(released, tmp_path / "recipe.yaml", bundle={"title": "Another title"})
    done = _release(recipe, workspace)
    assert done.returncode == 0, done.stderr
    started = [line.split("] ")[1] for line in done.stderr.splitlines() if line.endswith(": started")]
    assert started == ["bundle: started", "publish: started"]
    assert "# Another title" in (workspace / "published" / "README.md").read_text(encoding="utf-8")
    assert "| 稠密基线 |" in (workspace / "published" / "README.zh.md").read_text(encoding="utf-8")
    assert list((workspace / "published" / ".eval_results").glob("*.yaml"))
