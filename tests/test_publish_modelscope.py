"""A bundle on ModelScope: published through its SDK to a hub on loopback, back, and verified."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_bundle
from faulty_proxy import FAULTS, FaultyProxy
from loopback_modelscope import TOKEN, Hub

from packager.artifact import read_manifest
from packager.bundle.verify import verify_bundle
from packager.errors import RemoteFailure, UsageProblem
from packager.publish import modelscope


@pytest.fixture(autouse=True)
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    import modelscope_hub

    modelscope_hub.set_default_config(modelscope_hub.HubConfig())


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    made = Hub()
    with made.running() as host:
        yield made, host


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("modelscope")
    stages = tiny_bundle.make_stages(root / "stages")
    stages.bundle(root / "bundle")
    return root / "bundle"


def publish(bundle: Path, host: str, **options: object) -> modelscope.PublishedThere:
    return modelscope.publish(
        bundle,
        "org/tiny",
        endpoint=f"http://{host}",
        wait_s=0.0,
        progress=lambda _: None,
        **options,  # type: ignore[arg-type]
    )


def test_a_bundle_goes_to_modelscope_in_one_commit_and_back(
    hub: tuple[Hub, str], bundle: Path, tmp_path: Path
) -> None:
    state, host = hub
    done = publish(bundle, host, private=True)
    again = publish(bundle, host)
    repository = state.repositories["org/tiny"]
    assert done.digest == read_manifest(bundle).digest and not done.already_there and again.already_there
    assert len(repository.commits) == 2 and set(repository.tags) == {done.tag} and repository.visibility == 1
    assert len(state.uploads) == len(set(state.uploads)) and done.uploaded_bytes > 0

    folder = modelscope.download("org/tiny", done.tag, tmp_path / "got", endpoint=f"http://{host}")
    assert verify_bundle(folder).digest == done.digest


def test_a_tag_is_never_moved_and_a_stranger_is_told_to_log_in(
    hub: tuple[Hub, str], bundle: Path, tmp_path: Path
) -> None:
    _, host = hub
    publish(bundle, host, tag="v1")
    stages = tiny_bundle.make_stages(tmp_path / "stages", seed=1)
    stages.bundle(tmp_path / "bundle")
    with pytest.raises(UsageProblem, match="names another content"):
        publish(tmp_path / "bundle", host, tag="v1")
    publish(tmp_path / "bundle", host, tag="v2")
    with pytest.raises(UsageProblem, match="who is asking"):
        publish(bundle, host, token="ms-wrong")
    with pytest.raises(RemoteFailure, match="no org/tiny"):
        modelscope.download("org/tiny", "v9", tmp_path / "none", endpoint=f"http://{host}")


@pytest.mark.slow
def test_any_request_may_fail_and_master_is_as_before_or_complete(bundle: Path) -> None:
    counted = Hub()
    with counted.running() as host:
        proxy = FaultyProxy(host)
        with proxy.running() as front:
            publish(bundle, front)
    complete = counted.repositories["org/tiny"].commits[-1]
    for number in range(len(proxy.seen)):
        state = Hub()
        with state.running() as host:
            faulty = FaultyProxy(host)
            faulty.faults[number] = FAULTS[number % len(FAULTS)]
            with faulty.running() as front:
                with contextlib.suppress(RemoteFailure):
                    publish(bundle, front, attempts=1)
                repository = state.repositories.get("org/tiny")
                if repository is not None:
                    assert repository.tree("master") in ({".gitattributes": b""}, complete)
                done = publish(bundle, front)
        assert state.repositories["org/tiny"].commits == [{".gitattributes": b""}, complete]
        assert state.repositories["org/tiny"].tree(done.tag) == complete
        assert len(state.uploads) == len(set(state.uploads))
