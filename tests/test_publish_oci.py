"""A bundle in a container registry: pushed by the ORAS client to a real registry, back, and verified."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tiny_bundle
from click.testing import CliRunner
from faulty_proxy import FAULTS, FaultyProxy

from packager.artifact import read_manifest
from packager.bundle.verify import verify_bundle
from packager.cli import packager
from packager.errors import IntegrityFailure, RemoteFailure, UsageProblem
from packager.publish import oci

REGISTRY = shutil.which("docker-registry") or shutil.which("registry")
needs_registry = pytest.mark.skipif(REGISTRY is None, reason="no container registry is installed")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a registry with an empty store."""
    root = tmp_path_factory.mktemp("registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(root / "store")}, "delete": {"enabled": True}},
        "http": {"addr": host, "relativeurls": True},
    }
    (root / "config.yml").write_text(json.dumps(config))
    assert REGISTRY is not None
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([REGISTRY, "serve", str(root / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(200):
            try:
                if httpx.get(f"http://{host}/v2/", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.02)
        else:
            pytest.fail((root / "log").read_text())
        yield host
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("oci")
    stages = tiny_bundle.make_stages(root / "stages")
    stages.bundle(root / "bundle")
    return root / "bundle"


def push(bundle: Path, target: str, **options: object) -> oci.Pushed:
    return oci.push(bundle, target, wait_s=0.0, progress=lambda _: None, **options)  # type: ignore[arg-type]


@needs_registry
def test_a_bundle_goes_to_a_registry_and_back_with_one_digest(
    registry: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = push(bundle, f"{registry}/org/tiny")
    again = push(bundle, f"{registry}/org/tiny")
    elsewhere = push(bundle, f"{registry}/other/place:v1")
    assert pushed.digest == read_manifest(bundle).digest
    assert not pushed.already_there and again.already_there and again.uploaded_bytes == 0
    assert pushed.reference.split("@")[1] == elsewhere.reference.split("@")[1]

    folder = oci.pull(f"{registry}/org/tiny:{pushed.tag}", tmp_path, progress=lambda _: None)
    assert verify_bundle(folder).digest == pushed.digest
    assert oci.pull(pushed.reference, tmp_path, progress=lambda _: None) == folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = CliRunner().invoke(packager, ["verify", f"oci://{registry}/org/tiny:{pushed.tag}", "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout)["digest"] == pushed.digest

    # The manifest is one that other tools read: OCI's, with ModelPack's types and ORAS's titles.
    raw = httpx.get(
        f"http://{registry}/v2/org/tiny/manifests/{pushed.tag}",
        headers={"Accept": oci.MANIFEST_TYPE},
        trust_env=False,
    ).json()
    titles = {x["annotations"]["org.opencontainers.image.title"] for x in raw["layers"]}
    assert raw["artifactType"] == oci.ARTIFACT_TYPE and "model.sig" in titles and "manifest.json" in titles


@needs_registry
def test_the_stock_oras_client_pulls_what_we_push(
    registry: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from oras.client import OrasClient

    pushed = push(bundle, f"{registry}/org/stock")
    client = OrasClient(hostname=registry, insecure=True)
    monkeypatch.chdir(tmp_path)  # it writes nowhere else
    client.pull(target=f"{registry}/org/stock:{pushed.tag}", outdir=str(tmp_path / "out"))
    assert verify_bundle(tmp_path / "out").digest == pushed.digest


@needs_registry
def test_a_tag_is_never_moved_and_nothing_foreign_is_taken(
    registry: str, bundle: Path, tmp_path: Path
) -> None:
    push(bundle, f"{registry}/org/fixed:v1")
    stages = tiny_bundle.make_stages(tmp_path / "stages", seed=1)
    stages.bundle(tmp_path / "bundle")
    with pytest.raises(UsageProblem, match="names another content"):
        push(tmp_path / "bundle", f"{registry}/org/fixed:v1")
    with pytest.raises(RemoteFailure, match="no org/fixed at v2"):
        oci.pull(f"{registry}/org/fixed:v2", tmp_path, progress=lambda _: None)
    manifests = f"http://{registry}/v2/org/fixed/manifests"
    headers = {"Accept": oci.MANIFEST_TYPE, "Content-Type": oci.MANIFEST_TYPE}
    hostile = httpx.get(f"{manifests}/v1", headers=headers, trust_env=False).json()
    hostile["layers"][0]["annotations"] = {"org.opencontainers.image.title": "../../evil.json"}
    reply = httpx.put(f"{manifests}/evil", json=hostile, headers=headers, trust_env=False)
    assert reply.status_code == 201
    with pytest.raises(IntegrityFailure, match="evil"):
        oci.pull(f"{registry}/org/fixed:evil", tmp_path, progress=lambda _: None)


@needs_registry
@pytest.mark.slow
def test_any_request_may_fail_and_the_tag_is_whole_or_absent(
    registry: str, bundle: Path, tmp_path: Path
) -> None:
    proxy = FaultyProxy(registry)
    with proxy.running() as host:
        push(bundle, f"{host}/count/all")
        requests = len(proxy.seen)
        for number in range(requests):
            proxy.forget()
            kind = proxy.faults[number] = FAULTS[number % len(FAULTS)]
            where = f"fault/r{number}"
            with contextlib.suppress(RemoteFailure):  # a request that only asks may do without its body
                push(bundle, f"{host}/{where}", attempts=1)
            assert proxy.faults == {}
            state = httpx.get(f"http://{registry}/v2/{where}/tags/list", trust_env=False).json()
            proxy.forget()
            done = push(bundle, f"{host}/{where}")
            assert done.already_there == bool(state.get("tags")), (number, kind)
            # What the registry had was not sent again: no blob travels twice in one push.
            sent = [path for method, path, _ in proxy.seen if method == "PATCH"]
            assert len(sent) == len(set(sent))
    folder = oci.pull(f"{registry}/fault/r0:{done.tag}", tmp_path, progress=lambda _: None)
    assert verify_bundle(folder).digest == done.digest


@needs_registry
@pytest.mark.slow
def test_a_killed_push_leaves_no_tag_and_is_finished_by_the_same_command(registry: str, bundle: Path) -> None:
    proxy = FaultyProxy(registry)
    kills = int(os.environ.get("PACKAGER_KILLS", "3"))
    with proxy.running() as host:
        for kill in range(kills):
            command = [sys.executable, "-m", "packager", "publish", str(bundle), f"oci://{host}/kill/k{kill}"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            proxy.forget()
            while process.poll() is None and len(proxy.seen) < 3 + 7 * kill % 40:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            tags = httpx.get(f"http://{registry}/v2/kill/k{kill}/tags/list", trust_env=False).json()
            done = push(bundle, f"{host}/kill/k{kill}")
            assert done.already_there == bool(tags.get("tags"))


@pytest.mark.parametrize(
    "text", ["tiny", "host/Upper", "host.example/../x", "host.example/a:b:c", "host.example/"]
)
def test_what_is_no_reference_is_said(text: str) -> None:
    with pytest.raises(UsageProblem, match="does not name a place"):
        oci.parse_reference(text)


def test_a_registry_that_is_not_there_is_named(bundle: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(RemoteFailure, match=f"no registry answers at {host}"):
        push(bundle, f"{host}/org/tiny", attempts=2)
