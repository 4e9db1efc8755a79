"""The files of a bundle that make it run, and say what it is made of: right by their formats' own readers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_bundle import SOURCE_DIGEST, Stages, digest_of, make_stages, recipe

import packager.bailing
import packager.nano
from packager.artifact import ArtifactWriter, Manifest, read_manifest
from packager.bundle.bill_of_materials import BOM_NAME, listed_files
from packager.bundle.companions import COMPANIONS
from packager.bundle.containers import ENGINE_IMAGE
from packager.bundle.lock import read_lock
from packager.bundle.plugin_wheel import MODULES, PACKAGE, REVIEWED, WHEEL_NAME, WHEEL_PATH, build_wheel
from packager.bundle.provenance import LOCAL_BUILDER, PROVENANCE_NAME, provenance, subjects
from packager.bundle.serve_profiles import ENGINE_VERSIONS
from packager.bundle.verify import verify_bundle
from packager.errors import IntegrityFailure
from packager.recipe import Recipe, ServeSettings

NANO = Path(packager.nano.__file__).parent / "checkpoint"
PINNED = "vllm/vllm-openai@sha256:" + "a" * 64


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return make_stages(tmp_path_factory.mktemp("stages"), rows=32768)


@pytest.fixture(scope="module")
def released(stages: Stages) -> Path:
    """Made without any CI job around it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GITHUB_ACTIONS", raising=False)
        patch.delenv("SOURCE_DATE_EPOCH", raising=False)
        stages.bundle(stages.root / "bundle")
    return stages.root / "bundle"


def _document(released: Path, name: str) -> Any:
    return json.loads((released / name).read_bytes())


def _allocated(root: Path) -> int:
    """Bytes of disk under a folder, every file counted once however many names it has."""
    found = {(s.st_dev, s.st_ino): s.st_blocks * 512 for s in (p.lstat() for p in root.rglob("*"))}
    return sum(found.values())


def test_assembling_copies_no_weight_byte(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("disk")
    for name in ("fp8", "context", "draft", "evidence"):
        shutil.copytree(stages.root / name, root / name)
    before = _allocated(root)
    folders = {name: root / name for name in ("fp8", "context", "draft", "evidence")}
    made = stages.bundle(root / "bundle", **folders)
    weights = sum(entry.size for entry in made.files if entry.path.endswith(".safetensors"))
    assert weights > 8_000_000
    assert 0 < _allocated(root) - before < 1_000_000
    assert made.metrics["linked_bytes"] >= weights


def test_every_file_is_sealed_signed_and_verified(stages: Stages, released: Path) -> None:
    assert verify_bundle(released, stages.public_key).authenticated
    assert {entry.path for entry in read_manifest(released).files} >= COMPANIONS


# --- bill of materials --------------------------------------------------------------------------------------


def _components(document: Any) -> Iterator[dict[str, Any]]:
    waiting = [document["metadata"]["component"], *document["components"], *document["formulation"]]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += one.get("components", [])


def test_the_bill_of_materials_lists_every_file_and_where_all_comes_from(released: Path) -> None:
    bom = _document(released, BOM_NAME)
    sealed = {entry.path: entry.sha256 for entry in read_manifest(released).files}
    assert listed_files(bom) == {k: v for k, v in sealed.items() if k not in (BOM_NAME, PROVENANCE_NAME)}
    by_ref = {one["bom-ref"]: one for one in _components(bom)}
    assert by_ref["base"]["purl"] == f"pkg:huggingface/org/base@{'0' * 40}"
    assert by_ref["model"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    architecture = by_ref["model"]["modelCard"]["modelParameters"]["modelArchitecture"]
    assert architecture == "BailingMoeV2ForCausalLM"
    metrics = by_ref["model"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "accuracy lost", "value": "0.5 points"} in metrics
    assert by_ref["data:evaluation-items-0"]["hashes"] == [{"alg": "SHA-256", "content": "7" * 64}]
    needs = {one["ref"]: one["dependsOn"] for one in bom["dependencies"]}
    assert needs["model"] == ["base", "draft", "engine:vllm", f"file:{WHEEL_PATH}"]
    assert {ref for others in needs.values() for ref in others} | set(needs) <= set(by_ref)
    tasks = {task["name"]: task["uid"] for task in bom["formulation"][0]["workflows"][0]["tasks"]}
    assert tasks == {name: stage.digest for name, stage in read_lock(released).stages.items()}


def test_its_date_is_a_stated_one_or_none(
    stages: Stages, released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "timestamp" not in _document(released, BOM_NAME)["metadata"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
    stages.bundle(tmp_path / "dated")
    dated = _document(tmp_path / "dated", BOM_NAME)
    assert dated["metadata"]["timestamp"] == "2026-01-01T00:00:00Z"
    assert dated["serialNumber"] != _document(released, BOM_NAME)["serialNumber"]
    entry = yaml.safe_load((tmp_path / "dated/deploy/vllm-recipe.yaml").read_text())
    assert str(entry["meta"]["date_added"]) == "2026-01-01"


@pytest.mark.slow
def test_the_bill_of_materials_is_valid_by_the_librarys_own_schema(released: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    text = (released / BOM_NAME).read_text(encoding="utf-8")
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"modelArchitecture"', '"modelShape"')) is not None


# --- provenance ---------------------------------------------------------------------------------------------


def test_the_provenance_is_a_statement_by_in_totos_own_types(released: Path) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    statement = _document(released, PROVENANCE_NAME)
    parsed = json_format.ParseDict(statement, statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    predicate = json_format.ParseDict(statement["predicate"], provenance_pb2.Provenance())
    assert predicate.run_details.builder.id == LOCAL_BUILDER
    source, *made = predicate.build_definition.resolved_dependencies
    assert source.digest["gitCommit"] == "0" * 40
    assert source.digest["sha256"] == SOURCE_DIGEST.removeprefix("sha256:")
    locked = read_lock(released).stages
    assert {one.name: f"sha256:{one.digest['sha256']}" for one in made} == {
        name: stage.digest for name, stage in locked.items()
    }
    sealed = {entry.path: entry.sha256 for entry in read_manifest(released).files}
    assert subjects(statement) == {k: v for k, v in sealed.items() if k != PROVENANCE_NAME}


def test_the_builder_is_the_ci_job_where_there_is_one(released: Path) -> None:
    lock = read_lock(released)
    job = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "org/models",
        "GITHUB_WORKFLOW_REF": "org/models/.github/workflows/release.yml@refs/heads/main",
        "GITHUB_RUN_ID": "7",
        "GITHUB_SHA": "b" * 40,
        "HOSTNAME": "somewhere",
    }
    text = provenance(recipe(), lock, read_manifest(released).files, job)
    run = json.loads(text)["predicate"]["runDetails"]
    assert run["builder"]["id"] == f"https://github.com/{job['GITHUB_WORKFLOW_REF']}"
    assert run["metadata"]["invocationId"] == "https://github.com/org/models/actions/runs/7/attempts/1"
    assert "somewhere" not in text


def test_no_place_of_the_machine_is_told(released: Path) -> None:
    document = recipe().model_dump(mode="json", by_alias=True)
    document["source"] = {"path": "/secret/place/base"}
    document["publish"]["target"] = "dir:/secret/place/out"
    document["validate"]["healthbench"] = {
        "rows": "/secret/place/rows.jsonl", "judge_url": "http://judge.secret:8000", "judge_model": "j",
    }  # fmt: skip
    told = provenance(Recipe.model_validate(document), read_lock(released), read_manifest(released).files, {})
    assert "secret" not in told
    settings = json.loads(told)["predicate"]["buildDefinition"]["externalParameters"]["recipe"]
    assert (settings["source"]["path"], settings["publish"]["target"]) == ("base", "dir:out")


# --- the plugin's wheel -------------------------------------------------------------------------------------


def test_the_wheel_is_the_reviewed_one_and_holds_this_packages_own_sources(released: Path) -> None:
    built = build_wheel()
    assert hashlib.sha256(built).hexdigest() == REVIEWED[WHEEL_NAME], (
        "the plugin's sources changed: raise PLUGIN_VERSION if the old wheel has been released, and record "
        "the new digest in REVIEWED once they are reviewed"
    )
    assert (released / WHEEL_PATH).read_bytes() == built
    own = Path(packager.bailing.__file__).parent
    with zipfile.ZipFile(released / WHEEL_PATH) as archive:
        code = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
    assert code == {f"{PACKAGE}/__init__.py": b""} | {
        f"{PACKAGE}/{name}.py": (own / f"{name}.py").read_bytes() for name in MODULES
    }
    assert not [name for name, text in code.items() if b"import packager" in text or b"from packager" in text]


PARTS = """
import json, sys
from vllm.plugins import load_general_plugins

load_general_plugins()
from transformers import AutoConfig
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.utils.argparse_utils import FlexibleArgumentParser

model, *commands = sys.argv[1:]
settings = EngineArgs(model=model, enforce_eager=True).create_model_config()
found, _ = ModelRegistry.resolve_model_cls(["BailingMoeV2ForCausalLM"], settings)
config = AutoConfig.from_pretrained(model, trust_remote_code=False)
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
parsed = [parser.parse_args(json.loads(command)[1:]) for command in commands]
print(json.dumps({
    "config": type(config).__module__,
    "model": found.__module__,
    "eagle3": supports_eagle3(found),
    "parsed": [
        [p.model_tag, p.host, p.max_model_len, p.speculative_config, p.trust_remote_code] for p in parsed
    ],
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip", "zipfile"])
def test_vllm_takes_the_installed_wheel_and_the_commands_without_this_package(
    released: Path, tmp_path: Path, installer: str
) -> None:
    """pip is how people install it, zipfile how the container files do."""
    target = tmp_path / "plugin"
    wheel = str(released / WHEEL_PATH)
    if installer == "pip":
        install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), wheel]
    else:
        install = ["zipfile", "-e", wheel, str(target)]
    subprocess.run([sys.executable, "-m", *install], check=True)
    # Every process of vLLM imports this first: this package cannot be imported, nor its own plugin be used.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['packager'] = None\n")
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{target}",
        "VLLM_PLUGINS": "bailing_moe_v2_eagle3",
        "HF_HUB_OFFLINE": "1",
    }
    commands = [json.dumps(command) for command in _commands(released)]
    done = subprocess.run(
        [sys.executable, "-c", PARTS, str(NANO), *commands],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["config"], found["model"]) == (f"{PACKAGE}.hf_config", f"{PACKAGE}.vllm_model")
    assert found["eagle3"]
    drafting = {"method": "eagle3", "model": "/model/draft", "num_speculative_tokens": 3}
    assert found["parsed"] == [["/model", "0.0.0.0", 2048, drafting, False]] * 2


# --- containers ---------------------------------------------------------------------------------------------


def _kubernetes(released: Path) -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all((released / "deploy/kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


def _commands(released: Path) -> list[list[str]]:
    lines = (released / "deploy/Containerfile").read_text().splitlines()
    [entry] = [
        json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT")
    ]
    pod = _kubernetes(released)["Deployment"]["spec"]["template"]["spec"]
    return [entry, pod["containers"][0]["command"]]


def test_all_containers_run_the_command_of_serve_yaml(released: Path) -> None:
    profile = yaml.safe_load((released / "serve.yaml").read_text())["profiles"]["1xgpu"]["args"]
    inside = {".": "/model", "127.0.0.1": "0.0.0.0"}
    expected = [inside.get(word, word).replace('"draft"', '"/model/draft"') for word in profile]
    assert _commands(released) == [expected, expected]
    assert expected[:3] == ["vllm", "serve", "/model"]


def test_the_image_is_pinned_where_the_recipe_pins_it(stages: Stages, released: Path, tmp_path: Path) -> None:
    assert f"v{ENGINE_VERSIONS.split(',')[0].removeprefix('>=')}." in ENGINE_IMAGE
    assert f"ARG IMAGE={ENGINE_IMAGE}\n" in (released / "deploy/Containerfile").read_text()
    stages.bundle(tmp_path / "b", recipe=recipe(bundle={"image": PINNED}))
    for name in ("Containerfile", "compose.yaml", "kubernetes.yaml"):
        text = (tmp_path / "b/deploy" / name).read_text()
        assert PINNED in text
        assert "can move" not in text
    with pytest.raises(ValueError, match="image"):
        recipe(bundle={"image": "vllm/vllm-openai:latest"})


def test_the_containerfile_finds_the_wheel_in_its_own_folder(released: Path) -> None:
    compose = yaml.safe_load((released / "deploy/compose.yaml").read_text())["services"]["model"]
    text = (released / "deploy" / compose["build"]["dockerfile"]).read_text()
    assert f"COPY {WHEEL_NAME} " in text
    assert (released / "deploy" / compose["build"]["context"] / WHEEL_NAME).is_file()
    assert compose["volumes"] == [{"type": "bind", "source": "..", "target": "/model", "read_only": True}]
    assert compose["ports"] == ["127.0.0.1:8000:8000"]
    [device] = compose["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"]) == ("nvidia", 1)


def test_the_kubernetes_manifest_hangs_together(released: Path) -> None:
    found = _kubernetes(released)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    [engine] = pod["containers"]
    assert engine["resources"]["limits"] == {"nvidia.com/gpu": 1}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["name"] for one in (engine, *pod["initContainers"]) for mount in one["volumeMounts"]}
    assert mounted == set(volumes)
    claim = volumes["model"]["persistentVolumeClaim"]["claimName"]
    assert claim == found["PersistentVolumeClaim"]["metadata"]["name"]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"].items() <= labels.items()
    download, plugin = pod["initContainers"]
    assert download["command"] == ["hf", "download", "rehearsal/tiny", "--local-dir", "/model"]
    assert plugin["command"][-2] == f"/model/{WHEEL_PATH}"
    probe = engine["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1200


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(
    ("kind", "edit"),
    [("Deployment", ["set", "image", "engine=other"]), ("Service", ["set", "selector", "app=other"])],
)
def test_kubernetes_own_types_know_every_field(
    released: Path, tmp_path: Path, kind: str, edit: list[str]
) -> None:
    """kubectl reads into its types, where an unknown field is lost, and writes them out again."""
    document = _kubernetes(released)[kind]
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(document))
    command = ["kubectl", *edit[:2], "--local", "-f", str(tmp_path / "in.yaml"), edit[2], "-o", "json"]
    typed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert list(_lost(document, typed)) == []


def _lost(ours: Any, typed: Any, where: str = "") -> Iterator[str]:
    if isinstance(ours, dict):
        for key, value in ours.items():
            if where.endswith("spec.selector"):  # what the command above changed
                return
            if key in typed:
                yield from _lost(value, typed[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif isinstance(ours, list):
        for mine, other in zip(ours, typed, strict=True):
            yield from _lost(mine, other, f"{where}[]")


# --- catalogues and other engines ---------------------------------------------------------------------------


def test_the_catalogue_entry_has_the_catalogues_keys_and_the_one_command(released: Path) -> None:
    """`scripts/build-recipes-api.mjs` of github.com/vllm-project/recipes took it when this was written."""
    entry = yaml.safe_load((released / "deploy/vllm-recipe.yaml").read_text())
    allowed = [
        "meta", "model", "dependencies", "features", "opt_in_features", "variants", "compatible_strategies",
        "strategy_overrides", "guide",
    ]  # fmt: skip
    assert list(entry) == allowed
    assert entry["model"]["model_id"] == "rehearsal/tiny"
    assert entry["model"]["base_args"] == ["--max-model-len", "2048"]
    assert "hardware" not in entry["meta"]
    flag, config = entry["features"]["spec_decoding"]["args"]
    assert flag == "--speculative-config"
    assert json.loads(config)["model"] == "tiny/draft"


def test_without_a_hub_there_is_no_catalogue_entry_and_nothing_to_download(
    stages: Stages, tmp_path: Path
) -> None:
    stages.bundle(tmp_path / "b", recipe=recipe(publish={"target": "dir:/somewhere/tiny"}))
    assert not (tmp_path / "b/deploy/vllm-recipe.yaml").exists()
    pod = _kubernetes(tmp_path / "b")["Deployment"]["spec"]["template"]["spec"]
    assert [one["name"] for one in pod["initContainers"]] == ["plugin"]
    verify_bundle(tmp_path / "b", stages.public_key)


def test_notes_on_other_engines_say_what_does_not_carry_over(stages: Stages, tmp_path: Path) -> None:
    limited = ServeSettings(speculation_max_context=1024)
    changed = recipe(draft={"sliding_window": 64}).model_copy(update={"serve": limited})
    stages.bundle(tmp_path / "b", recipe=changed)
    text = (tmp_path / "b/deploy/OTHER-ENGINES.md").read_text()
    assert "--speculative-draft-window-size 64" in text
    assert "1024 tokens" in text
    assert "--speculative-algorithm EAGLE3" in text
    assert "--scheme w8a8" in text


# --- what the verifier makes of them ------------------------------------------------------------------------


def _resealed(released: Path, out: Path, path: str, data: bytes) -> Manifest:
    """The bundle with one file replaced, sealed anew without a signature."""
    old = read_manifest(released)
    with ArtifactWriter(out, stage="bundle", recipe_digest=old.recipe_digest, inputs=old.inputs) as writer:
        for entry in old.files:
            if entry.path != path:
                writer.link(entry.path, released / entry.path, entry.sha256)
        writer.write_bytes(path, data)
        return writer.seal(old.metrics)


def test_another_plugin_is_refused_whatever_it_is_called(released: Path, tmp_path: Path) -> None:
    patched = bytearray((released / WHEEL_PATH).read_bytes())
    place = patched.index(b"return hidden, aux")
    patched[place : place + 6] = b"raise\t"
    _resealed(released, tmp_path / "patched", WHEEL_PATH, bytes(patched))
    with pytest.raises(IntegrityFailure, match="not the plugin that was reviewed"):
        verify_bundle(tmp_path / "patched")
    newer = WHEEL_PATH.replace("0.1.0", "9.9")
    _resealed(released, tmp_path / "newer", newer, bytes(patched))
    with pytest.raises(IntegrityFailure, match="does not know; a newer one may"):
        verify_bundle(tmp_path / "newer")
    _resealed(released, tmp_path / "elsewhere", WHEEL_NAME, build_wheel())
    with pytest.raises(IntegrityFailure, match="may not be in a bundle"):
        verify_bundle(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", [BOM_NAME, PROVENANCE_NAME])
def test_documents_that_tell_of_other_files_are_refused(released: Path, tmp_path: Path, name: str) -> None:
    digest = next(e.sha256 for e in read_manifest(released).files if e.path == "tokenizer.json")
    told = (released / name).read_bytes().replace(digest.encode(), b"0" * 64)
    _resealed(released, tmp_path / "b", name, told)
    with pytest.raises(IntegrityFailure, match=rf"{name}: it tells of another tokenizer\.json"):
        verify_bundle(tmp_path / "b")
    assert digest_of(tmp_path / "b") != digest_of(released)
