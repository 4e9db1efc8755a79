"""The release: what is done is not done again, what changed is, and nothing unfinished looks finished."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from packager.artifact import ArtifactWriter, Manifest, is_sealed, read_manifest
from packager.checkpoint.source import Checkpoint
from packager.cli import run
from packager.errors import BadInput, IntegrityFailure, UsageProblem
from packager.recipe import QuantizeSpec, SchemeName, SourceSpec, load_recipe
from packager.release import Workspace, plan_release, shipped_recipe
from packager.release.figures import stage_figures
from packager.release.pipeline import Pipeline, Stage, StageResult
from packager.release.stages import rehearsal_repo
from packager.release.variants import Variants
from packager.release.workspace import SourceIdentity, locate

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
REAL = RECIPES / "antangelmed-fp8-eagle3-128k-h20.yaml"


def reduced_nano(path: Path, **sections: dict[str, Any]) -> Path:
    """The nano recipe with less of everything that takes time; `sections` update it further."""
    document = yaml.safe_load((RECIPES / "nano.yaml").read_text(encoding="utf-8"))
    document["draft"].update(prompts=48, steps=20, max_response_tokens=96)
    document["validate"].update(
        items_per_task=4,
        long_items=4,
        identity_prompts=12,
        concurrency=[1],
        throughput_prompts=4,
        throughput_output_tokens=48,
    )
    document["gates"] = {
        "max_accuracy_loss_points": 20,
        "min_identical_fraction": 0.9,
        "accuracy_verdict": "not inferior",
        "safety_tasks": ["allergy", "contraindication"],
    }
    for name, changes in sections.items():
        document[name].update(changes)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


# ---- the machinery, on stages that write one small file ------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "workspace")
    with made.open():
        pass
    return made


class Maker:
    """Makes stages that seal one file, and counts how often each was made."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.made: list[str] = []

    def stage(self, name: str, setting: int, *inputs: str) -> Stage:
        folder = self.workspace.root / name

        def make(digest: str) -> Manifest:
            self.made.append(name)
            named = {str(at): value for at, value in enumerate(inputs)}
            with ArtifactWriter(folder, stage=name, recipe_digest=digest, inputs=named) as writer:
                writer.write_text("figure.txt", f"{name} {setting}")
                return writer.seal({})

        return Stage(name, folder, {"setting": setting}, lambda: inputs, make)

    def release(self, first: int = 1, second: int = 1) -> Pipeline:
        """Two stages, the second made from the first."""
        pipeline = Pipeline(self.workspace, lambda _: None)
        made = pipeline.run(self.stage("one", first, "sha256:source"))
        pipeline.run(self.stage("two", second, made.digest))
        return pipeline


def test_a_second_run_makes_nothing(workspace: Workspace) -> None:
    maker = Maker(workspace)
    assert [stage.skipped for stage in maker.release().results] == [False, False]
    assert [stage.skipped for stage in maker.release().results] == [True, True]
    assert maker.made == ["one", "two"]


def test_a_changed_setting_makes_its_stage_and_what_follows(workspace: Workspace) -> None:
    maker = Maker(workspace)
    maker.release()
    maker.release(second=2)
    assert maker.made == ["one", "two", "two"]
    maker.release(first=2, second=2)
    assert maker.made == ["one", "two", "two", "one", "two"]
    assert (workspace.root / "two" / "figure.txt").read_text() == "two 2"


def test_a_setting_that_leaves_the_bytes_alone_stops_there(workspace: Workspace) -> None:
    maker = Maker(workspace)
    pipeline = maker.release()
    before = pipeline.results[1].manifest.digest
    maker.release(first=2)
    maker.release(first=1)
    assert maker.release().results[1].manifest.digest == before


def test_an_unfinished_stage_is_finished_not_skipped(workspace: Workspace) -> None:
    maker = Maker(workspace)
    maker.release()
    (workspace.root / "two" / "manifest.json").unlink()
    shutil.rmtree(workspace.root / "two")
    assert [stage.skipped for stage in maker.release().results] == [True, False]


def test_what_follows_the_seal_is_done_again_if_it_is_missing(workspace: Workspace) -> None:
    maker = Maker(workspace)
    signature = workspace.root / "one" / "model.sig"
    plain = maker.stage("one", 1)

    def make(digest: str) -> Manifest:
        found = read_manifest(plain.folder) if is_sealed(plain.folder) else plain.make(digest)
        signature.write_text("signed")
        return found

    signed = Stage(
        plain.name, plain.folder, plain.sections, plain.inputs, make, ("model.sig",), signature.is_file
    )
    pipeline = Pipeline(workspace, lambda _: None)
    pipeline.run(signed)
    signature.unlink()  # as if killed between the seal and the signature
    pipeline.run(signed)
    pipeline.run(signed)
    assert [stage.skipped for stage in pipeline.results] == [False, False, True]
    assert maker.made == ["one"]
    assert signature.is_file()


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_sealed_file_changed_by_one_byte_stops_the_release(workspace: Workspace, keep_time: bool) -> None:
    maker = Maker(workspace)
    maker.release()
    victim = workspace.root / "one" / "figure.txt"
    before = victim.stat()
    victim.write_text("one 2")
    if keep_time:  # the memory of sizes and times is only a shortcut: without it every byte is read
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
        (workspace.work / "sealed.json").unlink()
    with pytest.raises(IntegrityFailure, match=r"figure\.txt"):
        maker.release()
    assert maker.made == ["one", "two"]


def test_a_stray_file_in_a_sealed_stage_stops_the_release(workspace: Workspace) -> None:
    maker = Maker(workspace)
    maker.release()
    (workspace.root / "two" / "extra.txt").touch()
    with pytest.raises(IntegrityFailure, match=r"extra\.txt"):
        maker.release()


def test_times_are_kept_outside_the_manifests(workspace: Workspace) -> None:
    pipeline = Maker(workspace).release()
    assert all(stage.seconds is not None for stage in pipeline.results)
    assert set(workspace.read_json("timings.json")) == {"one", "two"}
    assert b"seconds" not in (workspace.root / "one" / "manifest.json").read_bytes()


def test_two_releases_in_one_workspace_are_refused(workspace: Workspace) -> None:
    with (
        workspace.open(),
        pytest.raises(UsageProblem, match="another release is running"),
        Workspace(workspace.root).open(),
    ):
        pass


def test_torn_records_of_the_workspace_count_for_nothing(workspace: Workspace) -> None:
    maker = Maker(workspace)
    maker.release()
    for name in ("sealed.json", "timings.json"):
        (workspace.work / name).write_text('{"one": [1, ')
    assert [stage.skipped for stage in maker.release().results] == [True, True]


def test_left_overs_of_a_killed_clean_up_are_removed(workspace: Workspace) -> None:
    grave = workspace.work / "discarded-one-123"
    grave.mkdir()
    (grave / "figure.txt").touch()
    with workspace.open():
        assert not grave.exists()


# ---- the source ----------------------------------------------------------------------------------------


def test_the_source_is_hashed_once_and_again_when_it_changes(
    workspace: Workspace, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint()
    read: list[Path] = []
    whole = Checkpoint.digest
    monkeypatch.setattr(Checkpoint, "digest", lambda self: (read.append(self.path), whole(self))[1])
    first = SourceIdentity(source, workspace).digest()
    assert SourceIdentity(source, workspace).digest() == first
    assert len(read) == 1
    (source / "tokenizer.json").write_text('{"version": "2.0"}')
    assert SourceIdentity(source, workspace).digest() != first
    assert len(read) == 2


def test_a_source_that_cannot_be_released_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a folder"):
        locate(SourceSpec(path=str(tmp_path / "nothing")))
    with pytest.raises(BadInput, match="does not pin a revision"):
        locate(SourceSpec(repo="org/name"))
    with pytest.raises(BadInput, match="does not pin a revision"):
        locate(SourceSpec(repo="org/name", revision="main"))
    with pytest.raises(BadInput, match="brings no checkpoint"):
        locate(SourceSpec(path="package:other"))


def test_a_shipped_recipe_is_found_by_name_and_any_by_path() -> None:
    assert load_recipe(shipped_recipe("nano")).name == load_recipe(RECIPES / "nano.yaml").name
    assert shipped_recipe("some/recipe.yaml") == Path("some/recipe.yaml")


@pytest.mark.parametrize(
    ("target", "repo"),
    [("hf://org/name", "org/name"), ("dir:/media/stick/name", "rehearsal/name")],
)
def test_the_rehearsal_uses_the_name_of_the_target(target: str, repo: str) -> None:
    assert rehearsal_repo(target) == repo


# ---- the dry run ---------------------------------------------------------------------------------------


def test_the_dry_run_computes_the_published_parameter_counts() -> None:
    plan = plan_release(load_recipe(REAL), REAL)
    assert plan.sizes.parameters == 102_889_697_280 + 7_936
    assert plan.sizes.source == 2 * 102_889_697_280 + 4 * 7_936
    assert plan.sizes.active_parameters == pytest.approx(6.15e9, rel=0.001)
    assert plan.sizes.fp8 == pytest.approx(104e9, rel=0.01)


def test_the_dry_run_names_everything_that_is_missing_here() -> None:
    missing = "\n".join(plan_release(load_recipe(REAL), REAL).missing)
    assert "the weights: 206 GB" in missing
    assert "source.revision" in missing
    assert "bundle.license" in missing
    assert "draft.prompts_file" in missing
    assert "validate.items_file" in missing
    assert "4xh20 would do" in missing  # the BF16 reference is larger than the release


@pytest.mark.slow
def test_the_dry_run_follows_the_recipe(tmp_path: Path) -> None:
    document = yaml.safe_load(REAL.read_text(encoding="utf-8"))
    document["source"].update(revision="0" * 40, shape=str(RECIPES / "ling-flash-2.0.json"))
    document["draft"]["prompts"] *= 2
    document["hardware"] = "4xh20"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    changed, plain = plan_release(load_recipe(path), path), plan_release(load_recipe(REAL), REAL)
    assert changed.sizes.states == 2 * plain.sizes.states
    assert not [line for line in changed.missing if "revision" in line or "BF16 reference" in line]


def test_the_dry_run_counts_and_names_the_weights_of_the_scheme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = yaml.safe_load(REAL.read_text(encoding="utf-8"))
    document["source"]["shape"] = str(RECIPES / "ling-flash-2.0.json")
    document["hardware"] = "1xh20"
    path, found = tmp_path / "recipe.yaml", {}
    for scheme in get_args(SchemeName):
        document["quantize"] = {"scheme": scheme}
        path.write_text(yaml.safe_dump(document))
        planned = plan_release(load_recipe(path), path)
        found[scheme] = planned.sizes.fp8
        assert run(["release", str(path), "--dry-run"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert f"{planned.weights}, draft" in said
        assert f"the BF16 reference that {planned.weights} is compared with" in said
        assert planned.weights == "FP8" or "FP8" not in said.replace(document["name"], "")
    assert found["int4-g128"] < 0.6 * found["fp8-block"]
    assert found["w8a8"] == found["fp8-channel"] > found["fp8-block"]


@pytest.mark.parametrize("scheme", get_args(SchemeName))
def test_variants_gates_and_figures_are_named_for_the_weights_of_the_scheme(
    scheme: SchemeName, workspace: Workspace
) -> None:
    recipe = load_recipe(RECIPES / "nano.yaml")
    recipe = recipe.model_copy(update={"quantize": QuantizeSpec(scheme=scheme)})
    for folder in (workspace.fp8, workspace.context, workspace.draft):
        with ArtifactWriter(folder, stage="x", recipe_digest="sha256:0", inputs={}) as writer:
            writer.seal({})
    variants = Variants(recipe, workspace, workspace.root, "sha256:0", "", lambda _: None)
    with variants.fp8(64) as plain, variants.context() as long, variants.draft() as drafted:
        labels = [plain.label, long.label, drafted.label]
    weights = {"int4-g128": "INT4", "w8a8": "INT8"}.get(scheme, "FP8")
    assert labels == [weights, f"{weights}+YaRN", f"{weights}+YaRN+EAGLE3"]
    metrics = {
        "weights": weights,
        "fp8_difference_points": [0.5, -1, 2],
        "outcome": "pass",
        "identical": None,
        "acceptance_length": None,
        "long_records": {},
        "tokens_per_s": {"dense": None},
    }
    manifest = read_manifest(workspace.fp8)
    stage = StageResult("validate", workspace.evidence, manifest, None, False, metrics)
    assert stage_figures(stage)[f"{weights} - BF16"] == "+0.5 points (-1.0 to +2.0)"


def test_the_dry_run_of_the_nano_lacks_nothing_but_what_is_not_installed() -> None:
    path = RECIPES / "nano.yaml"
    missing = plan_release(load_recipe(path), path).missing
    assert [line for line in missing if not line.endswith("not installed")] == []


def test_the_dry_run_prints_stages_gates_and_gaps_in_eighty_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["release", str(REAL), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for name in ("quantize", "extend-context", "draft", "validate", "bundle", "publish"):
        assert f"\n  {name} " in said
    assert "min_acceptance_length: 3.1" in said
    assert "missing here:" in said
    table = [line for line in said.splitlines() if line.startswith("  ")]
    assert max(map(len, table)) <= 80


def test_the_dry_run_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["release", str(REAL), "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stages"][0]["name"] == "quantize"
    assert document["gates"]["min_tokens_per_second"] == 200


@pytest.mark.slow
def test_the_dry_run_needs_neither_torch_nor_network() -> None:
    script = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from packager.cli import run\n"
        f"code = run(['release', {str(REAL)!r}, '--dry-run'])\n"
        "heavy = [name for name in ('torch', 'vllm', 'transformers') if name in sys.modules]\n"
        "sys.exit(code or repr(heavy) != '[]')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"source": {"path": "no/such/folder", "repo": None}}, 3),
        ({"source": {"path": None, "repo": "org/name"}}, 3),
        ({"context": {"lenght": 2048}}, 3),
    ],
)
def test_wrong_recipes_end_with_3_and_leave_nothing(
    tmp_path: Path, change: dict[str, Any], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = reduced_nano(tmp_path / "recipe.yaml", **change)
    assert run(["release", str(recipe), "--workspace", str(tmp_path / "workspace")]) == code
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "what to do: " in said
    assert not (tmp_path / "workspace").exists()


def test_a_release_can_have_its_weights_converted_by_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    workspace = tmp_path / "workspace"
    command = ["release", str(RECIPES / "nano.yaml"), "--workspace", str(workspace)]
    for options, code, says in (
        (("--executor", "ray", "--ray-address", "127.0.0.1:1"), 6, "no Ray cluster answers at 127.0.0.1:1"),
        (("--executor", "ray"), 2, "no Ray cluster is named"),
        (("--ray-address", "127.0.0.1:1"), 2, "Add --executor ray"),
    ):
        assert run([*command, *options]) == code
        assert says in capsys.readouterr().err
    assert not is_sealed(workspace / "fp8")


def test_a_release_without_a_workspace_is_a_usage_error() -> None:
    assert run(["release", str(RECIPES / "nano.yaml")]) == 2


# ---- the true command, killed --------------------------------------------------------------------------


def _command(recipe: Path, workspace: Path) -> list[str]:
    return [sys.executable, "-m", "packager", "release", str(recipe), "--workspace", str(workspace)]


def _run_until_context(recipe: Path, workspace: Path, seconds: float | None) -> bool:
    """Run until the deterministic stages are sealed or `seconds` are over, then SIGKILL; are they sealed?"""
    began = time.monotonic()
    with (workspace.parent / "stderr.txt").open("ab") as log:
        process = subprocess.Popen(_command(recipe, workspace), stdout=log, stderr=log)
    try:
        while not is_sealed(workspace / "context"):
            if seconds is not None and time.monotonic() - began > seconds:
                return False
            assert process.poll() is None, (workspace.parent / "stderr.txt").read_text()
            time.sleep(0.005)
        return True
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    recipe = reduced_nano(tmp_path / "recipe.yaml", quantize={"shard_bytes": 1_000_000})
    unbroken = tmp_path / "unbroken"
    began = time.monotonic()
    assert _run_until_context(recipe, unbroken, None)
    whole = time.monotonic() - began
    broken, moments, kills = tmp_path / "broken", random.Random(7), 0
    while not _run_until_context(recipe, broken, moments.uniform(0.2, 0.8) * whole if kills < 8 else None):
        kills += 1
    assert kills >= 1
    for stage in ("fp8", "context"):
        assert read_manifest(broken / stage).digest == read_manifest(unbroken / stage).digest
        for entry in read_manifest(unbroken / stage).files:
            assert (broken / stage / entry.path).read_bytes() == (unbroken / stage / entry.path).read_bytes()
