"""A fault at every request of a publication, by Xet and by plain LFS; a kill at any moment; two who write."""

from __future__ import annotations

import os
import random
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants, set_client_factory
from huggingface_hub.utils import _http
from tiny_bundle import make_stages

from packager.artifact import MANIFEST_NAME, read_manifest
from packager.errors import RemoteFailure
from packager.publish.hub import Published, publish
from packager.publish.hub_http import Fault
from packager.publish.loopback_hub import LoopbackHub

REPO = "rehearsal/tiny"
FAULTS: tuple[Fault, ...] = (500, "stall", "reset", "lost-reply", "cut-reply")
KILLS = int(os.environ.get("PACKAGER_KILLS", "3"))
"""Kills in each way of upload."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    stages = make_stages(tmp_path_factory.mktemp("stages"))
    stages.bundle(stages.root / "bundle")
    return stages.root / "bundle"


@pytest.fixture(scope="module", autouse=True)
def _quick_client() -> Iterator[None]:
    """The client as it is, but with one set of root certificates for all, and no pause between retries."""
    trust = ssl.create_default_context()
    hook = {"request": [_http.hf_request_event_hook]}
    before = _http._GLOBAL_CLIENT_FACTORY
    set_client_factory(
        lambda: httpx.Client(event_hooks=hook, follow_redirects=True, timeout=None, verify=trust)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Longer than the client waits here; hf_xet has time limits of its own, of minutes.
        patch.setattr("packager.publish.hub_http.STALL_S", 0.4)
        yield
    set_client_factory(before)


@pytest.fixture(params=["xet", "lfs"])
def transfer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How contents are uploaded."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return str(request.param)


def send(
    bundle: Path, hub: LoopbackHub, attempts: int = 1, tag: str | None = None, answer_s: float = 0.3
) -> Published:
    return publish(
        bundle, REPO, endpoint=hub.url, token="t", attempts=attempts, wait_s=0, answer_s=answer_s, tag=tag,
        progress=lambda _: None,
    )  # fmt: skip


def expected_files(bundle: Path) -> set[str]:
    return {e.path for e in read_manifest(bundle).files} | {MANIFEST_NAME, "model.sig", ".gitattributes"}


def main_of(hub: LoopbackHub) -> set[str] | None:
    """Paths on main; None: no repository."""
    return set(hub.store.commit(REPO, "main").tree) if hub.store.exists(REPO) else None


def stored_bytes(hub: LoopbackHub) -> int:
    """All bytes of contents that ever arrived: by LFS as counted, by Xet as its blocks lie there."""
    blocks = (hub.store.root / "cas").glob("xet/xorbs/xorbs/**/*")
    return hub.store.received.total() + sum(p.stat().st_size for p in blocks if p.is_file())


def has_all(hub: LoopbackHub, bundle: Path) -> bool:
    """The hub has every large content, on whatever branch or on none."""
    large = [e.sha256 for e in read_manifest(bundle).files if e.path.endswith(".safetensors")]
    return all(hub.store.content_size(sha256) is not None for sha256 in large)


def nth_request(number: int, fault: Fault) -> Callable[[str, str], Fault | None]:
    """A fault at one request only, counted from 0."""
    seen = iter(range(10**6))
    return lambda *_: fault if next(seen) == number else None


@pytest.mark.slow
@pytest.mark.usefixtures("transfer")
@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_single_fault_at_any_request_one_rerun_completes_and_sends_nothing_twice(
    fault: Fault, bundle: Path, tmp_path: Path
) -> None:
    whole = expected_files(bundle)
    with LoopbackHub(tmp_path / "clean") as hub:
        send(bundle, hub)
        total, once = len(hub.requests), stored_bytes(hub)
    seen: set[str] = set()
    for at in range(total):
        with LoopbackHub(tmp_path / f"hub{at}") as hub:
            hub.fault = nth_request(at, fault)
            try:
                send(bundle, hub)
            except RemoteFailure:
                seen.add("failed")
            main = main_of(hub)
            assert main in (None, {".gitattributes"}, whole), f"request {at}: {hub.requests[at]}"
            seen.add("whole" if main == whole else "before")
            had_all, before = has_all(hub, bundle), stored_bytes(hub)
            done = send(bundle, hub)
            assert main_of(hub) == set(hub.store.commit(REPO, done.tag).tree) == whole
            sent = stored_bytes(hub) - before
            assert sent <= (0 if had_all else once), f"request {at}: {hub.requests[at]}"
            # A lost answer to an upload makes the client itself send that one content again.
            if not (fault == "lost-reply" and hub.requests[at][0] == "PUT"):
                assert before + sent <= once * (2 if hub.requests[at][0] == "PUT" else 1)
        shutil.rmtree(tmp_path / f"hub{at}")
    assert seen == {"failed", "whole", "before"}


@pytest.mark.slow
@pytest.mark.usefixtures("transfer")
@pytest.mark.parametrize("fault", ["reset", "lost-reply"])
def test_with_a_fault_at_every_request_in_turn_each_rerun_gets_further_and_main_is_never_half(
    fault: Fault, bundle: Path, tmp_path: Path
) -> None:
    whole = expected_files(bundle)
    struck: set[tuple[str, ...]] = set()
    with LoopbackHub(tmp_path / "hub") as hub:

        def strike_once(method: str, path: str) -> Fault | None:
            # After the merge the same requests are made again, and must be struck again.
            request = (method, path, "whole" if main_of(hub) == whole else "before")
            if request in struck:
                return None
            struck.add(request)
            return fault

        hub.fault = strike_once
        failures = 0
        for _ in range(60):
            try:
                done = send(bundle, hub)
                break
            except RemoteFailure:
                failures += 1
                assert main_of(hub) in (None, {".gitattributes"}, whole), hub.requests[-1]
        assert main_of(hub) == set(hub.store.commit(REPO, done.tag).tree) == whole
    assert len(struck) > 20
    assert failures > 10


@pytest.mark.slow
def test_after_a_kill_at_a_random_moment_main_is_as_before_or_complete_and_a_rerun_completes(
    transfer: str, bundle: Path, tmp_path: Path
) -> None:
    whole = expected_files(bundle)
    script = (
        "import sys; from pathlib import Path; from packager.publish.hub import publish;"
        f"publish(Path({str(bundle)!r}), {REPO!r}, endpoint=sys.argv[1], token='t', progress=lambda _: None)"
    )
    environment = os.environ | {
        "HF_HUB_DISABLE_XET": str(int(transfer == "lfs")),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
    }
    with LoopbackHub(tmp_path / "clean") as hub:
        send(bundle, hub)
        total, once = len(hub.requests), stored_bytes(hub)
    moments = random.Random(20)
    outcomes = []
    for number in range(KILLS):
        # Spread over the requests, not over the time: most of that is the start of Python.
        last = int((number + moments.random()) * total / KILLS)
        with LoopbackHub(tmp_path / f"hub{number}") as hub:
            reached = threading.Event()

            def note(
                *_: str, event: threading.Event = reached, hub: LoopbackHub = hub, last: int = last
            ) -> None:
                if len(hub.requests) > last:
                    event.set()

            hub.fault = note
            child = subprocess.Popen([sys.executable, "-c", script, hub.url], env=environment)
            assert reached.wait(60)
            time.sleep(moments.uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
            child.wait()
            hub.fault = None
            main = main_of(hub)
            assert main in (None, {".gitattributes"}, whole)
            had_all, before = has_all(hub, bundle), stored_bytes(hub)
            outcomes.append((child.returncode, main == whole, had_all))
            done = send(bundle, hub)
            assert main_of(hub) == set(hub.store.commit(REPO, done.tag).tree) == whole
            assert stored_bytes(hub) - before <= (0 if had_all else once)
            assert len(hub.store.state(REPO).discussions) == 1
        shutil.rmtree(tmp_path / f"hub{number}")
    print(f"{transfer}: {KILLS} kills; (exit, main complete, contents there): {sorted(outcomes)}")
    assert {there for _, _, there in outcomes} == {True, False}


def test_a_commit_of_somebody_else_between_comparing_and_merging_is_noticed(
    bundle: Path, tmp_path: Path
) -> None:
    whole = expected_files(bundle)
    with LoopbackHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token="t")

        def commit_before(end: str) -> Callable[[str, str], None]:
            left = [1]

            def intrude(method: str, path: str) -> None:
                if method == "POST" and path.endswith(end) and left:
                    left.pop()
                    hub.store.add_commit(
                        REPO, "main", title="meanwhile", message="", parent=None,
                        regular={"theirs.txt": end.encode()}, lfs={}, deleted=(), deleted_folders=(),
                    )  # fmt: skip

            return intrude

        # Before the last look at main: noticed in time, and the second attempt takes it into account.
        hub.fault = commit_before("/commit/refs%2Fpr%2F1")
        lines: list[str] = []
        publish(bundle, REPO, endpoint=hub.url, token="t", wait_s=0, progress=lines.append)
        assert any("changed meanwhile" in line for line in lines)
        assert main_of(hub) == whole
        assert [d.status for d in hub.store.state(REPO).discussions] == ["closed", "merged"]
        # Between that look and the merge: told, and the same command makes main the bundle alone.
        newer = make_stages(tmp_path / "newer", seed=1)
        newer.bundle(tmp_path / "b")
        hub.fault = commit_before("/merge")
        with pytest.raises(RemoteFailure, match=r"after merging:\n  theirs\.txt: stray") as caught:
            send(tmp_path / "b", hub, attempts=3)
        assert "run again" in caught.value.remedy
        send(tmp_path / "b", hub)
        assert main_of(hub) == whole
        assert api.list_repo_refs(REPO).tags[-1].target_commit == hub.store.resolve(REPO, "main")


def test_two_who_publish_the_same_bundle_at_once_make_it_once(bundle: Path, tmp_path: Path) -> None:
    done: list[Published] = []
    with LoopbackHub(tmp_path / "hub") as hub:
        HfApi(endpoint=hub.url, token="t").create_repo(REPO)

        def one_of_two() -> None:
            # No server stalls here: a slow machine must not count as one.
            done.append(send(bundle, hub, attempts=8, answer_s=60))

        both = [threading.Thread(target=one_of_two) for _ in range(2)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        assert main_of(hub) == expected_files(bundle)
        assert len({published.revision for published in done}) == 1
        assert len(done) == 2


def test_a_hidden_rule_of_the_repository_drops_no_file(bundle: Path, tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.url, token="t")
        api.create_repo(REPO)
        rules = CommitOperationAdd(".gitignore", b"*.json\ndraft/*\n")
        api.create_commit(REPO, [rules], commit_message="rules")
        send(bundle, hub)
        assert main_of(hub) == expected_files(bundle)
