"""A bundle: assembled without copying, sealed, signed, refused once anything about it is not as released."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from tiny_bundle import SOURCE_DIGEST, Stages, digest_of, make_evidence, make_stages, reseal

from packager.artifact import MANIFEST_NAME
from packager.bundle import signature
from packager.bundle.serve_profiles import profiles, serve_yaml
from packager.bundle.verify import verify_bundle
from packager.cli.bundle import command as bundle_command
from packager.cli.verify import command as verify_command
from packager.errors import BadInput, IntegrityFailure
from packager.recipe import ServeSettings, SpeculationRange
from packager.serving.serve_file import read_serve_file
from validation.gates import at_least


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return make_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def released(stages: Stages) -> Path:
    """One bundle for the tests that only read."""
    stages.bundle(stages.root / "bundle")
    return stages.root / "bundle"


@pytest.fixture
def copy(released: Path, tmp_path: Path) -> Path:
    """A copy of the bundle to damage (the original's files are hard links into the stages)."""
    return Path(shutil.copytree(released, tmp_path / "bundle"))


def test_the_bundle_holds_a_model_repository_and_what_proves_it(released: Path) -> None:
    found = {p.relative_to(released).as_posix() for p in released.rglob("*") if p.is_file()}
    assert found >= {
        "config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "chat_template.jinja",
        "generation_config.json", "draft/model.safetensors", "draft/config.json", "evidence/report.json",
        "evidence/report.md", "evidence/fidelity.jsonl", "evidence/fidelity.svg", "bundle.lock",
        "serve.yaml", "README.md", "README.zh.md",
        "LICENSE-NOTE.md", "model.sig", "manifest.json",
    }  # fmt: skip
    assert not [p for p in found if p.endswith(".py")]


def test_weights_are_linked_not_copied(stages: Stages, released: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "draft/model.safetensors", "evidence/report.json"):
        stage = stages.root / ("context/" + name if "/" not in name else name)
        assert (released / name).samefile(stage)


def test_the_same_stages_give_the_same_bytes_and_a_second_call_changes_nothing(
    stages: Stages, released: Path, tmp_path: Path
) -> None:
    again = stages.bundle(tmp_path / "again")
    assert again.digest == digest_of(released)
    assert (tmp_path / "again/model.sig").read_bytes() == (released / "model.sig").read_bytes()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*")}
    assert stages.bundle(tmp_path / "again") == again
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "again").rglob("*")} == before


def test_a_bundle_that_was_killed_before_signing_is_signed_by_the_next_call(
    stages: Stages, tmp_path: Path
) -> None:
    stages.bundle(tmp_path / "b")
    (tmp_path / "b/model.sig").rename(tmp_path / "b/model.sig.part")
    stages.bundle(tmp_path / "b")
    assert verify_bundle(tmp_path / "b", stages.public_key).authenticated


def test_a_whole_bundle_verifies_and_says_what_it_is(stages: Stages, released: Path) -> None:
    found = verify_bundle(released, stages.public_key)
    assert found.digest == digest_of(released)
    assert found.signer == signature.fingerprint(stages.public_key)
    assert found.lock.gates.outcome == "pass"
    assert found.lock.source.digest == SOURCE_DIGEST
    locked = {name: stage.digest for name, stage in found.lock.stages.items()}
    assert locked == {name: digest_of(stages.root / name) for name in ("fp8", "context", "draft", "evidence")}
    without_key = verify_bundle(released)
    assert without_key.signer
    assert not without_key.authenticated


def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(copy: Path, stages: Stages) -> None:
    for file in sorted(p for p in copy.rglob("*") if p.is_file()):
        data = file.read_bytes()
        changed = bytearray(data)
        changed[len(data) // 2] ^= 1
        file.write_bytes(changed)
        with pytest.raises((IntegrityFailure, BadInput)) as caught:
            verify_bundle(copy, stages.public_key)
        assert file.name in caught.value.message, file
        file.write_bytes(data)
    verify_bundle(copy, stages.public_key)


def _replace_report(copy: Path) -> None:
    report = copy / "evidence/report.json"
    report.write_text(report.read_text().replace("Tiny", "Tony"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "missing": (lambda b: (b / "tokenizer.json").unlink(), r"tokenizer\.json: missing", False),
    "added": (lambda b: (b / "extra.json").write_text("{}"), r"extra\.json: stray", False),
    "renamed": (
        lambda b: (b / "tokenizer.json").rename(b / "tokenizer2.json"), r"tokenizer2\.json: stray", False,
    ),
    "link out": (
        lambda b: ((b / "tokenizer.json").unlink(), (b / "tokenizer.json").symlink_to("/etc/hostname")),
        r"tokenizer\.json: a link that leads out", False,
    ),
    "folder link": (lambda b: (b / "more").symlink_to("/etc"), "more: a link that leads out", False),
    "fifo": (lambda b: os.mkfifo(b / "pipe.json"), r"pipe\.json: neither a file", False),
    "code": (lambda b: (b / "modeling.py").write_text("1"), r"modeling\.py: code, pickles", True),
    "pickle": (lambda b: (b / "state.pt").write_bytes(b"\x80\x04"), r"state\.pt: code, pickles", True),
    "pickle as weights": (
        lambda b: (b / "x.safetensors").write_bytes(b"\x80\x04" + bytes(300)), "it is no safetensors", True,
    ),
    "pickle as text": (lambda b: (b / "x.txt").write_bytes(b"\x80\x04\x95"), r"x\.txt: it is a pickle", True),
    "huge header": (
        lambda b: (b / "x.safetensors").write_bytes((10**10).to_bytes(8, "little") + bytes(64)),
        "the header claims", True,
    ),
    "look-alike": (lambda b: (b / "config\u200b.json").write_text("{}"), "U\\+200B ZERO WIDTH SPACE", True),
    "own weights": (
        lambda b: shutil.copyfile(b / "draft/model.safetensors", b / "model-00003-of-00002.safetensors"),
        "not the file of the stage", True,
    ),
    "other evidence": (_replace_report, r"evidence/report\.json: not the file of the stage", True),
    "remote code": (
        lambda b: (b / "config.json").write_text('{"auto_map": {"AutoConfig": "x--y.Z"}}'), "auto_map", True,
    ),
    "no lock": (lambda b: (b / "bundle.lock").unlink(), r"no bundle\.lock", True),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bundle_with_something_wrong_is_refused_even_if_sealed_and_signed_again(
    name: str, copy: Path, stages: Stages
) -> None:
    damage, message, resealed = DAMAGE[name]
    # Hard links of the copy: none, so that damage stays in it.
    damage(copy)
    if resealed:
        reseal(copy, stages.private_key)
    with pytest.raises(IntegrityFailure, match=message):
        verify_bundle(copy, stages.public_key)


def test_a_path_that_leads_out_of_the_bundle_cannot_stand_in_a_manifest(copy: Path) -> None:
    document = json.loads((copy / MANIFEST_NAME).read_bytes())
    document["files"][0]["path"] = "../outside.json"
    (copy / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises((IntegrityFailure, BadInput), match=r"\.\./outside"):
        verify_bundle(copy)


def test_a_lock_whose_chain_is_broken_is_refused(copy: Path, stages: Stages) -> None:
    lock = json.loads((copy / "bundle.lock").read_bytes())
    lock["source"]["digest"] = "sha256:" + "6" * 64
    (copy / "bundle.lock").write_text(json.dumps(lock))
    reseal(copy, stages.private_key)
    with pytest.raises(IntegrityFailure, match="fp8 was not made from the source"):
        verify_bundle(copy, stages.public_key)


def test_a_lock_that_claims_passed_gates_against_the_report_is_refused(tmp_path: Path) -> None:
    failing = make_stages(tmp_path / "stages", gates=(at_least("acceptance length", 1.1, 2.5),))
    failing.bundle(tmp_path / "b")
    copy = Path(shutil.copytree(tmp_path / "b", tmp_path / "copy"))
    lock = json.loads((copy / "bundle.lock").read_bytes())
    assert lock["gates"]["outcome"] == "fail"
    lock["gates"] = {"outcome": "pass"}
    (copy / "bundle.lock").write_text(json.dumps(lock))
    reseal(copy, failing.private_key)
    with pytest.raises(IntegrityFailure, match="other gates"):
        verify_bundle(copy, failing.public_key)


def test_evidence_about_other_bytes_is_refused(tmp_path: Path) -> None:
    stages = make_stages(tmp_path / "stages")
    shutil.rmtree(tmp_path / "stages/evidence")
    context, draft = (digest_of(tmp_path / "stages" / name) for name in ("context", "draft"))
    make_evidence(tmp_path / "stages/evidence", context, draft, (), measured="sha256:" + "9" * 64)
    stages.bundle(tmp_path / "b")
    with pytest.raises(IntegrityFailure, match="does not measure the context"):
        verify_bundle(tmp_path / "b")


def test_stages_that_do_not_belong_together_are_not_bundled(stages: Stages, tmp_path: Path) -> None:
    other = make_stages(tmp_path / "other", seed=1)
    with pytest.raises(BadInput, match="context was not made from the fp8"):
        stages.bundle(tmp_path / "b", fp8=other.root / "fp8")
    with pytest.raises(BadInput, match="evidence was not made from the draft"):
        stages.bundle(tmp_path / "b", draft=other.root / "draft", context=other.root / "context",
                      fp8=other.root / "fp8")  # fmt: skip
    with pytest.raises(BadInput, match="no directory"):
        stages.bundle(tmp_path / "b", evidence=tmp_path / "none")
    assert not (tmp_path / "b").exists()


def test_what_hub_and_client_leave_beside_the_files_is_tolerated(copy: Path, stages: Stages) -> None:
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copy / ".cache/huggingface/download").mkdir(parents=True)
    (copy / ".cache/huggingface/download/x.metadata").write_text("1")
    verify_bundle(copy, stages.public_key)
    (copy / ".cache/other").write_text("1")
    with pytest.raises(IntegrityFailure, match=r"\.cache/other: stray"):
        verify_bundle(copy, stages.public_key)


def test_a_hub_cache_snapshot_is_followed_into_its_blobs_and_no_further(
    released: Path, stages: Stages, tmp_path: Path
) -> None:
    repo = tmp_path / "models--rehearsal--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    for number, file in enumerate(p for p in released.rglob("*") if p.is_file()):
        link = snapshot / file.relative_to(released)
        blob = repo / "blobs" / str(number)
        for parent in (link.parent, blob.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    verify_bundle(snapshot, stages.public_key)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(released / "config.json")
    with pytest.raises(IntegrityFailure, match=r"config\.json: a link that leads out"):
        verify_bundle(snapshot, stages.public_key)


def test_the_stock_verifier_accepts_a_bundle_and_its_download(
    released: Path, copy: Path, stages: Stages
) -> None:
    from model_signing import verifying

    (copy / ".cache/huggingface").mkdir(parents=True)
    (copy / ".cache/huggingface/CACHEDIR.TAG").write_text("")
    for root in (released, copy):
        stock = verifying.Config().use_elliptic_key_verifier(public_key=stages.public_key)
        stock.verify(root, root / "model.sig")


def test_the_card_serves_by_the_commands_of_serve_yaml(released: Path) -> None:
    import shlex

    settings = yaml.safe_load((released / "serve.yaml").read_text())
    assert settings["trust_remote_code"] is False
    assert (settings["draft"], settings["num_speculative_tokens"]) == ("draft", 3)
    text = (released / "README.md").read_text()
    assert "packager serve ." in text
    for profile in settings["profiles"].values():
        assert shlex.join(profile["args"]) in text
        assert "--trust-remote-code" not in profile["args"]
        speculative = json.loads(profile["args"][profile["args"].index("--speculative-config") + 1])
        assert speculative == {"method": "eagle3", "model": "draft", "num_speculative_tokens": 3}


def test_the_bundle_is_served_at_its_trained_length_too_and_the_card_says_how(released: Path) -> None:
    from packager.serving.serve_file import context_for

    settings = yaml.safe_load((released / "serve.yaml").read_text())
    assert settings["default_context"] == "extended"
    assert settings["max_model_len"] == settings["contexts"]["extended"]["max_model_len"] == 2048
    native = context_for(released, "native")
    assert (native.max_model_len, native.trained_rotary) == (512, True)
    text = (released / "README.md").read_text()
    assert "| Context | 2048 tokens (yarn); 512 as trained; **claimed, not measured" in text
    assert settings["context_measured"] == {"tokens": None, "longest_record_read": None, "min_accuracy": 0.6}
    assert "packager serve . --context native" in text


def test_what_was_measured_decides_when_to_draft_on_that_hardware_alone(
    stages: Stages, tmp_path: Path
) -> None:
    """The recipe's hardware is cpu: the other profile was not measured. What the recipe says comes first."""
    measured = (
        SpeculationRange(max_concurrency=2, num_speculative_tokens=3),
        SpeculationRange(num_speculative_tokens=0),
    )
    own, other = profiles(stages.recipe, draft=True, measured=measured)
    assert (own.device, own.speculation, other.speculation) == ("cpu", measured, ())
    assert "num_speculative_tokens_per_batch_size" in own.shell
    assert "num_speculative_tokens_per_batch_size" not in other.shell

    said = SpeculationRange(num_speculative_tokens=2)
    recipe = stages.recipe.model_copy(update={"serve": ServeSettings(speculation=(said,))})
    assert [one.speculation for one in profiles(recipe, draft=True, measured=measured)] == [(said,), (said,)]

    (tmp_path / "serve.yaml").write_text(serve_yaml(stages.recipe, draft=True, measured=measured))
    read = read_serve_file(tmp_path / "serve.yaml").profiles
    assert (read["cpu"].speculation, read["1xgpu"].speculation) == (measured, ())


def test_a_release_stops_speculation_where_it_was_slower(tmp_path: Path) -> None:
    ranges = [{"max_concurrency": 2, "num_speculative_tokens": 3}, {"num_speculative_tokens": 0}]
    stages = make_stages(tmp_path / "stages", evidence_metrics={"speculation": ranges})
    stages.bundle(tmp_path / "bundle")
    settings = yaml.safe_load((tmp_path / "bundle/serve.yaml").read_text())
    assert settings["profiles"]["cpu"]["speculation"] == ranges
    assert "num_speculative_tokens_per_batch_size" in (tmp_path / "bundle/README.md").read_text()


def test_the_verbs_bundle_and_verify(stages: Stages, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(stages.recipe.model_dump(mode="json", by_alias=True)))
    out = tmp_path / "b"
    arguments = [
        str(stages.root),
        str(out),
        "--recipe",
        str(file),
        "--key",
        str(stages.private_key),
        "--json",
    ]
    made = CliRunner().invoke(bundle_command, arguments)
    assert made.exit_code == 0, made.output
    locked = tmp_path / "locked.pem"
    signature.generate_keys(locked, passphrase="open sesame")
    wrong = [*arguments[:1], str(tmp_path / "other"), *arguments[2:], "--key", str(locked)]
    for passphrase, said in ((None, "no passphrase"), ("open barley", "is wrong")):
        (tmp_path / "word").write_text(passphrase or "")
        given = ["--passphrase-file", str(tmp_path / "word")] if passphrase else []
        refused = CliRunner().invoke(bundle_command, [*wrong, *given])
        assert isinstance(refused.exception, BadInput)
        assert said in refused.exception.message
    assert json.loads(made.stdout)["digest"] == digest_of(out)
    checked = CliRunner().invoke(verify_command, [str(out), "--key", str(stages.public_key), "--json"])
    assert checked.exit_code == 0, checked.output
    found = json.loads(checked.stdout)
    assert (found["kind"], found["gates"]) == ("bundle", "pass")
    assert found["signature"].startswith("valid")
    stage = CliRunner().invoke(verify_command, [str(stages.root / "fp8"), "--json"])
    assert json.loads(stage.stdout)["kind"] == "fp8"
    nothing = CliRunner().invoke(verify_command, [str(tmp_path / "none")])
    assert isinstance(nothing.exception, BadInput)
