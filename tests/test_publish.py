"""Publishing: main is what it was or the whole bundle, whatever goes wrong; the same command finishes it."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd, HfApi, constants
from tiny_bundle import Stages, digest_of, make_stages, recipe

from packager.artifact import MANIFEST_NAME, read_manifest
from packager.bundle.verify import verify_bundle
from packager.cli.publish import command as publish_command
from packager.errors import BadInput, GateFailed, IntegrityFailure, RemoteFailure, UsageProblem
from packager.publish.directory import copy_bundle
from packager.publish.hub import Published, download, publish
from packager.publish.hub_http import Fault
from packager.publish.loopback_hub import LoopbackHub
from packager.publish.rehearsal import rehearse
from validation.gates import at_least

REPO = "rehearsal/tiny"


def silent(_: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return make_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def bundle(stages: Stages) -> Path:
    stages.bundle(stages.root / "bundle")
    return stages.root / "bundle"


@pytest.fixture(autouse=True)
def _client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as running:
        yield running


def send(bundle: Path, hub: LoopbackHub, attempts: int = 1, tag: str | None = None) -> Published:
    return publish(
        bundle, REPO, endpoint=hub.url, token="t", attempts=attempts, wait_s=0, tag=tag, progress=silent
    )


def expected_files(bundle: Path) -> set[str]:
    return {e.path for e in read_manifest(bundle).files} | {MANIFEST_NAME, "model.sig", ".gitattributes"}


def files_of(hub: LoopbackHub, revision: str = "main") -> set[str]:
    return set(hub.store.commit(REPO, revision).tree)


def test_a_bundle_arrives_whole_by_a_pull_request_and_is_tagged(bundle: Path, hub: LoopbackHub) -> None:
    done = send(bundle, hub)
    assert files_of(hub) == files_of(hub, done.tag) == expected_files(bundle)
    assert done.revision == hub.store.resolve(REPO, "main")
    assert hub.store.discussion(REPO, 1).status == "merged"
    assert done.tag == f"bundle-{digest_of(bundle)[7:19]}"


def test_publishing_twice_sends_nothing_again(bundle: Path, hub: LoopbackHub) -> None:
    first = send(bundle, hub)
    hub.requests.clear()
    second = send(bundle, hub)
    assert second.already_there
    assert second.revision == first.revision
    written = [path for method, path in hub.requests if method != "GET" and path != "/api/repos/create"]
    assert written == []


def test_a_newer_bundle_replaces_the_older_one_and_takes_its_stray_files_away(
    bundle: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    first = send(bundle, hub, tag="v1")
    api = HfApi(endpoint=hub.url, token="t")
    api.create_commit(REPO, [CommitOperationAdd("old/notes.txt", b"x")], commit_message="by hand")
    newer = make_stages(tmp_path / "newer", seed=1)
    newer.bundle(tmp_path / "b")
    second = send(tmp_path / "b", hub, tag="v2")
    assert files_of(hub) == expected_files(tmp_path / "b")
    assert hub.store.resolve(REPO, "v1") == first.revision
    with pytest.raises(UsageProblem, match="names another content"):
        send(bundle, hub, tag="v2")
    assert hub.store.resolve(REPO, "main") == second.revision


def test_passing_faults_are_met_with_another_try(bundle: Path, hub: LoopbackHub) -> None:
    merges = iter([503, "lost-reply"])

    def fault(_: str, path: str) -> Fault | None:
        return next(merges, None) if path.endswith("/merge") else None

    hub.fault = fault
    lines: list[str] = []
    publish(bundle, REPO, endpoint=hub.url, token="t", wait_s=0, progress=lines.append)
    assert sum("trying again" in line for line in lines) == 2
    assert files_of(hub) == expected_files(bundle)
    assert len(hub.store.state(REPO).discussions) == 1


def test_a_hub_that_always_answers_500_is_a_remote_failure_that_names_it(
    bundle: Path, hub: LoopbackHub
) -> None:
    hub.fault = lambda *_: 500
    with pytest.raises(RemoteFailure, match="answered 500") as caught:
        send(bundle, hub, attempts=3)
    assert "again" in caught.value.remedy
    assert len(hub.requests) == 3


def test_a_hub_that_is_not_there_and_a_token_that_may_not_write(bundle: Path, hub: LoopbackHub) -> None:
    gone = LoopbackHub(hub.store.root)
    gone.start()
    url = gone.url
    gone.stop()
    with pytest.raises(RemoteFailure, match="no hub can be reached"):
        publish(bundle, REPO, endpoint=url, token="t", attempts=2, wait_s=0, progress=silent)
    hub.fault = lambda _, path: 403 if path == "/api/repos/create" else None
    with pytest.raises(RemoteFailure, match="answered 403") as caught:
        send(bundle, hub, attempts=3)
    assert "token" in caught.value.remedy


def test_without_a_token_nothing_is_asked_of_the_hub(
    bundle: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageProblem, match="token"):
        publish(bundle, REPO, endpoint=hub.url, progress=silent)
    assert hub.requests == []


def test_a_hub_that_holds_other_bytes_than_were_sent_is_found_before_main_changes(
    bundle: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    real = hub.store.add_commit

    def losing(repo_id: str, revision: str, **settings: object) -> str:
        lfs = dict(settings["lfs"])  # type: ignore[call-overload]
        lfs.pop("draft/model.safetensors", None)
        return real(repo_id, revision, **{**settings, "lfs": lfs})  # type: ignore[arg-type]

    monkeypatch.setattr(hub.store, "add_commit", losing)
    with pytest.raises(RemoteFailure, match=r"draft/model\.safetensors: missing"):
        send(bundle, hub)
    assert files_of(hub) == {".gitattributes"}


def test_contents_that_the_hub_has_are_not_sent_again(
    bundle: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.fault = lambda _, path: 500 if "/commit/" in path else None
    with pytest.raises(RemoteFailure):
        send(bundle, hub)
    uploads = [path for method, path in hub.requests if method == "PUT"]
    assert len(uploads) == 3
    hub.fault = None
    send(bundle, hub)
    assert [path for method, path in hub.requests if method == "PUT"] == uploads
    assert len(hub.store.state(REPO).discussions) == 1


def test_a_rehearsal_goes_there_and_back(bundle: Path, stages: Stages, tmp_path: Path) -> None:
    target = tmp_path / "down loads é"
    lines: list[str] = []
    for _ in range(2):
        result = rehearse(
            bundle, REPO, tmp_path / "hub", target, lines.append, tag="v1", public_key=stages.public_key
        )
    assert result.download == target
    assert result.files == len(read_manifest(bundle).files)
    assert verify_bundle(target, stages.public_key).digest == digest_of(bundle)
    newer = make_stages(tmp_path / "newer", seed=1)
    newer.bundle(tmp_path / "b")
    rehearse(tmp_path / "b", REPO, tmp_path / "hub", target, lines.append, tag="v1")
    assert verify_bundle(target).digest == digest_of(tmp_path / "b")
    with pytest.raises(BadInput, match="something else"):
        rehearse(bundle, REPO, tmp_path / "hub", stages.root, lines.append)


def test_a_rehearsal_works_with_the_hub_switched_off_elsewhere(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    rehearse(bundle, REPO, tmp_path / "hub", tmp_path / "down", silent)
    assert constants.HF_HUB_OFFLINE


def test_one_changed_byte_is_refused_and_named(bundle: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    weights = copy / "model-00002-of-00002.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityFailure, match=weights.name) as caught:
        send(copy, hub)
    assert caught.value.exit_code == 5
    assert hub.requests == []


def test_a_bundle_that_is_not_sealed_not_signed_or_not_licensed_is_refused(
    stages: Stages, bundle: Path, hub: LoopbackHub, tmp_path: Path
) -> None:
    unsealed = Path(shutil.copytree(bundle, tmp_path / "unsealed"))
    (unsealed / MANIFEST_NAME).unlink()
    stages.bundle(tmp_path / "unsigned", signing_key=None)
    stages.bundle(tmp_path / "unlicensed", recipe=recipe(bundle={"license": None}))
    refusals = {"unsealed": (BadInput, "has no manifest"), "unsigned": (UsageProblem, "not signed"),
                "unlicensed": (UsageProblem, "no licence")}  # fmt: skip
    for name, (kind, message) in refusals.items():
        with pytest.raises(kind, match=message):
            send(tmp_path / name, hub)
    with pytest.raises(BadInput, match="no directory"):
        send(tmp_path / "none", hub)
    assert {method for method, _ in hub.requests} == {"GET"}


def test_gates_that_are_not_passed_stop_a_publication_unless_overridden(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    gates = (at_least("acceptance length", 1.1, 2.5), at_least("speed", None, 200.0))
    stages = make_stages(tmp_path / "stages", gates=gates)
    stages.bundle(tmp_path / "b")
    with pytest.raises(GateFailed, match="failed: acceptance length") as caught:
        send(tmp_path / "b", hub)
    assert caught.value.exit_code == 4
    assert {method for method, _ in hub.requests} == {"GET"}
    stages.bundle(tmp_path / "overridden", override="for testers")
    send(tmp_path / "overridden", hub)
    assert files_of(hub) == expected_files(tmp_path / "overridden")


def test_a_directory_gets_a_whole_copy_once(bundle: Path, stages: Stages, tmp_path: Path) -> None:
    target = tmp_path / "out" / "copy"
    for _ in range(2):
        done = copy_bundle(bundle, target, public_key=stages.public_key, progress=silent)
    assert done.bytes == sum(e.size for e in read_manifest(bundle).files)
    assert {p.name for p in target.parent.iterdir()} == {"copy"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="is not this bundle"):
        copy_bundle(bundle, tmp_path / "mine", progress=silent)
    (tmp_path / "empty").mkdir()
    assert copy_bundle(bundle, tmp_path / "empty", progress=silent).digest == done.digest


def test_a_copy_goes_on_where_it_stopped_and_is_verified_before_it_gets_its_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    copy = shutil.copyfile

    def until_the_disk_is_full(source: Path, target: Path) -> Path:
        copied.append(str(source))
        if len(copied) == 5:
            raise OSError(errno.ENOSPC, "no space")
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", until_the_disk_is_full)
    with pytest.raises(BadInput, match="the disk is full"):
        copy_bundle(bundle, tmp_path / "copy", progress=silent)
    assert not (tmp_path / "copy").exists()
    (part,) = tmp_path.glob(".copy.*.part")
    spoiled = max(part.rglob("*.*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    spoiled.write_bytes(bytes(spoiled.stat().st_size))
    with pytest.raises(IntegrityFailure, match=spoiled.name):
        copy_bundle(bundle, tmp_path / "copy", progress=silent)
    assert not (tmp_path / "copy").exists() and not part.exists()
    assert len(copied) == len(set(copied)) + 1  # the one that the full disk struck, and no other
    copy_bundle(bundle, tmp_path / "copy", progress=silent)
    assert verify_bundle(tmp_path / "copy").digest == digest_of(bundle)


def test_the_verb_publish(bundle: Path, stages: Stages, tmp_path: Path) -> None:
    def run(*arguments: str) -> object:
        result = CliRunner().invoke(publish_command, [str(bundle), *arguments, "--json"])
        return result.exception or json.loads(result.stdout)

    for target in ("s3://a", "hf://no-owner", "hf://../..", "dir:"):
        assert isinstance(run(target), UsageProblem), target
    assert "hf://ORG/NAME or ms://" in run("s3://a").remedy  # type: ignore[attr-defined]
    assert "does not know --tag" in str(run(f"dir:{tmp_path / 'copy'}", "--tag", "v1"))
    copied = run(f"dir:{tmp_path / 'copy'}", "--key", str(stages.public_key))
    assert isinstance(copied, dict)
    assert Path(copied["path"]).is_dir()
    folders = ["--hub-dir", str(tmp_path / "hub"), "--download-dir", str(tmp_path / "down")]
    rehearsed = run(f"hf://{REPO}", "--rehearse", *folders)
    assert isinstance(rehearsed, dict)
    assert rehearsed["tag"].startswith("bundle-")
    assert (tmp_path / "down" / "config.json").is_file()


def test_a_published_bundle_is_verified_from_the_hub(bundle: Path, stages: Stages, hub: LoopbackHub) -> None:
    done = send(bundle, hub)
    snapshot = download(REPO, done.tag, endpoint=hub.url)
    assert (snapshot / "config.json").is_symlink()
    assert verify_bundle(snapshot, stages.public_key).digest == digest_of(bundle)
    with pytest.raises(RemoteFailure, match="404"):
        download(REPO, "no-such-tag", endpoint=hub.url)
    with pytest.raises(RemoteFailure):
        download("rehearsal/none", None, endpoint=hub.url)


@pytest.mark.slow
def test_verifying_and_publishing_need_only_the_base_install(bundle: Path, tmp_path: Path) -> None:
    script = f"""
import sys
before = set(sys.modules)  # what the interpreter's own start brings
from packager.cli import run
assert run(["verify", {str(bundle)!r}]) == 0
folders = ["--hub-dir", {str(tmp_path / "hub")!r}, "--download-dir", {str(tmp_path / "down")!r}]
assert run(["publish", {str(bundle)!r}, "hf://{REPO}", "--rehearse", *folders]) == 0
from importlib import metadata
from packaging.requirements import Requirement
base, todo = set(), ["moe-packager"]
while todo:
    name = todo.pop().lower().replace("_", "-")
    if name in base:
        continue
    base.add(name)
    found = [Requirement(line) for line in metadata.requires(name) or ()]
    todo += [r.name for r in found if r.marker is None or r.marker.evaluate({{"extra": ""}})]
places = metadata.packages_distributions()
tops = {{module.split(".")[0] for module in set(sys.modules) - before}}
used = {{d.lower().replace("_", "-") for top in tops for d in places.get(top, ())}}
print(sorted(used - base), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
