"""The loopback hub answers the unmodified huggingface_hub client as the real hub does."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from packager.errors import UsageProblem
from packager.publish import loopback_hub
from packager.publish.hub_store import HubError, HubStore
from packager.publish.loopback_hub import LoopbackHub
from packager.publish.xet_cas import files_of_shard

REPO = "rehearsal/tiny"
WEIGHTS = bytes(range(256)) * 2000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    client = HfApi(endpoint=hub.url, token="hf_rehearsal")
    client.create_repo(REPO)
    return client


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, data)


def push(api: HfApi, files: dict[str, bytes], revision: str = "main") -> str:
    operations = [add(path, data) for path, data in files.items()]
    return api.create_commit(REPO, operations, commit_message="add", revision=revision).oid


@pytest.mark.parametrize("transfer", ["xet", "lfs"])
def test_what_is_uploaded_comes_down_again_by_either_transfer(
    transfer: str, api: HfApi, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", transfer == "lfs")
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "draft/model.safetensors": os.urandom(3000)}
    files["README.md"] = "---\nlicense: mit\n---\n# 模型\n".encode()
    push(api, files)
    used_xet = any("xet-write-token" in path for _, path in hub.requests)
    assert used_xet == (transfer == "xet")
    target = Path(api.snapshot_download(REPO, local_dir=tmp_path / "with space é"))
    assert {p: (target / p).read_bytes() for p in files} == files
    cached = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert (cached / "model.safetensors").is_symlink()
    assert (cached / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_that_came_by_xet_also_goes_out_by_plain_http_in_ranges(
    api: HfApi, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(api, {"model.safetensors": WEIGHTS})
    address = f"{hub.url}/{REPO}/resolve/main/model.safetensors"
    whole = httpx.head(address)
    assert whole.status_code == 302
    assert whole.headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert int(whole.headers["X-Linked-Size"]) == len(WEIGHTS)
    ranges = {"bytes=100-199": WEIGHTS[100:200], "bytes=-7": WEIGHTS[-7:], "bytes=511990-": WEIGHTS[511990:]}
    for asked, expected in ranges.items():
        part = httpx.get(address, headers={"Range": asked}, follow_redirects=True)
        assert (part.status_code, part.content) == (206, expected)
    beyond = httpx.get(address, headers={"Range": "bytes=900000-"}, follow_redirects=True)
    assert beyond.status_code == 416
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    path = hf_hub_download(REPO, "model.safetensors", endpoint=hub.url, local_dir=tmp_path / "plain")
    assert Path(path).read_bytes() == WEIGHTS


def test_the_tree_lists_sizes_and_digests_as_git_and_lfs_have_them(api: HfApi) -> None:
    push(api, {"a/b/config.json": b"hello\n", "model.safetensors": WEIGHTS})
    tree = {f.path: f for f in api.list_repo_tree(REPO, recursive=True)}
    # `git hash-object` of "hello\n", a constant of git.
    assert tree["a/b/config.json"].blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"
    lfs = tree["model.safetensors"].lfs
    assert lfs is not None
    assert (lfs.sha256, lfs.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert {p.path for p in api.list_repo_tree(REPO)} == {".gitattributes", "a", "model.safetensors"}
    assert [p.path for p in api.list_repo_tree(REPO, "a", recursive=True)] == ["a/b", "a/b/config.json"]


def test_a_long_tree_comes_in_pages(api: HfApi, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback_hub, "_PAGE", 5)
    push(api, {f"f{i:02}.txt": b"x" for i in range(12)})
    hub.requests.clear()
    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 13
    assert len(hub.requests) == 3


def test_a_pull_request_stays_apart_from_main_until_it_is_opened_and_merged(api: HfApi) -> None:
    before = api.repo_info(REPO).sha
    request = api.create_pull_request(REPO, title="a release")
    assert (request.status, request.git_reference) == ("draft", "refs/pr/1")
    head = push(api, {"config.json": b"{}"}, revision="refs/pr/1")
    assert api.repo_info(REPO).sha == before
    assert api.repo_info(REPO, revision="refs/pr/1").sha == head
    with pytest.raises(HfHubHTTPError, match="draft"):
        api.merge_pull_request(REPO, 1)
    api.change_discussion_status(REPO, 1, "open")
    api.merge_pull_request(REPO, 1)
    merged = api.get_discussion_details(REPO, 1)
    assert merged.status == "merged"
    assert merged.merge_commit_oid == api.repo_info(REPO).sha
    assert api.file_exists(REPO, "config.json")
    assert [d.num for d in api.get_repo_discussions(REPO, discussion_type="pull_request")] == [1]


def test_a_merge_keeps_what_main_gained_meanwhile_and_refuses_a_conflict(api: HfApi) -> None:
    push(api, {"a.json": b"1", "b.json": b"1"})
    for _ in range(2):
        api.create_pull_request(REPO, title="change a")
    push(api, {"a.json": b"2"}, revision="refs/pr/1")
    push(api, {"a.json": b"3"}, revision="refs/pr/2")
    push(api, {"c.json": b"1"})
    for number in (1, 2):
        api.change_discussion_status(REPO, number, "open")
    api.merge_pull_request(REPO, 1)
    assert {"a.json", "b.json", "c.json"} < set(api.list_repo_files(REPO))
    with pytest.raises(HfHubHTTPError, match=r"a\.json"):
        api.merge_pull_request(REPO, 2)


def test_a_stale_parent_a_missing_upload_and_a_missing_file_each_leave_the_branch_as_it_was(
    api: HfApi, hub: LoopbackHub
) -> None:
    first = push(api, {"a.json": b"1"})
    second = push(api, {"a.json": b"2"})
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, [add("b.json", b"")], commit_message="late", parent_commit=first)
    with pytest.raises(HfHubHTTPError):
        api.create_commit(REPO, [add("b.json", b""), CommitOperationDelete("no.json")], commit_message="x")
    with pytest.raises(HubError, match="does not exist"):
        hub.store.add_commit(
            REPO, "main", title="x", message="", parent=None, regular={}, lfs={"w.bin": "00" * 32},
            deleted=(), deleted_folders=(),
        )  # fmt: skip
    assert api.repo_info(REPO).sha == second


def test_tags_name_a_commit_once(api: HfApi) -> None:
    first = push(api, {"a.json": b"1"})
    api.create_tag(REPO, tag="v1")
    push(api, {"a.json": b"2"})
    api.create_tag(REPO, tag="v1", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")
    assert api.repo_info(REPO, revision="v1").sha == first
    assert [(t.name, t.target_commit) for t in api.list_repo_refs(REPO).tags] == [("v1", first)]


def test_absent_things_are_the_errors_that_the_client_knows(api: HfApi, hub: LoopbackHub) -> None:
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("rehearsal/none")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="v9")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "none.json")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    api.create_repo(REPO, exist_ok=True)
    assert httpx.get(f"{hub.url}/../etc/passwd").status_code == 404


def test_writing_needs_a_token_and_a_private_repository_needs_one_to_be_read(
    api: HfApi, hub: LoopbackHub
) -> None:
    stranger = HfApi(endpoint=hub.url, token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_repo("rehearsal/other")
    with pytest.raises(RepositoryNotFoundError):
        stranger.create_commit(REPO, [add("a", b"")], commit_message="x")
    api.create_repo("rehearsal/hidden", private=True)
    assert api.repo_info("rehearsal/hidden").private
    with pytest.raises(RepositoryNotFoundError):
        stranger.repo_info("rehearsal/hidden")


def test_bytes_that_are_not_what_was_announced_are_refused(hub: LoopbackHub) -> None:
    oid = hashlib.sha256(b"right").hexdigest()
    assert httpx.put(f"{hub.url}/lfs/{oid}", content=b"wrong").status_code == 422
    assert hub.store.content_size(oid) is None
    # An iterator is sent in chunks, without a length.
    assert httpx.put(f"{hub.url}/lfs/{oid}", content=iter([b"ri", b"ght"])).status_code == 200
    assert hub.store.content_size(oid) == 5


def test_the_hub_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as first:
        api = HfApi(endpoint=first.url, token="t")
        api.create_repo(REPO)
        head = push(api, {"model.safetensors": WEIGHTS})
        threads = threading.active_count()
    assert threading.active_count() < threads
    with LoopbackHub(tmp_path / "hub") as second:
        api = HfApi(endpoint=second.url, token="t")
        assert api.repo_info(REPO).sha == head
        assert Path(
            api.hf_hub_download(REPO, "model.safetensors", local_dir=tmp_path / "d")
        ).stat().st_size == len(WEIGHTS)
        with pytest.raises(UsageProblem, match="port"):
            LoopbackHub(tmp_path / "other", port=int(second.url.rsplit(":", 1)[1])).start()


def test_faults_happen_as_asked(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path / "hub") as hub:
        host, port = hub.url.removeprefix("http://").split(":")

        def create(name: str) -> int:
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            body = f'{{"name": "{name}", "organization": "o", "type": "model"}}'
            connection.request("POST", "/api/repos/create", body, {"Authorization": "Bearer t"})
            reply = connection.getresponse()
            reply.read()
            return reply.status

        hub.fault = lambda *_: 503
        assert create("a") == 503
        hub.fault = lambda *_: "reset"
        with pytest.raises(ConnectionError):
            create("a")
        hub.fault = lambda *_: "cut-reply"
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            create("b")
        hub.fault = lambda *_: "lost-reply"
        with pytest.raises(ConnectionError):
            create("c")
        hub.fault = None
        assert [create(name) for name in "abc"] == [200, 409, 409]


def test_the_state_on_disk_is_whole_also_when_a_write_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HubStore(tmp_path)
    store.create_repo(REPO, private=False)
    before = store.resolve(REPO, "main")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HubStore, "_write_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add_commit(
            REPO, "main", title="x", message="", parent=None, regular={"a": b"1"}, lfs={}, deleted=(),
            deleted_folders=(),
        )  # fmt: skip
    assert HubStore(tmp_path).resolve(REPO, "main") == before


def test_a_shard_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not a Xet shard"):
        files_of_shard(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="ends early"):
        files_of_shard(b"HFRepoMetaData\0".ljust(48, b"\0"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    shutil.rmtree(tmp_path / "hf-cache", ignore_errors=True)
