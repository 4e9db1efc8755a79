"""A checkpoint on a hub is read by byte ranges, whatever faults come between, and is never half believed."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import write_checkpoint
from huggingface_hub import CommitOperationAdd, HfApi, constants, snapshot_download
from quantizing import contents

from packager.artifact import ArtifactWriter
from packager.checkpoint import Checkpoint, hub, hub_faults
from packager.checkpoint.hub_name import HubName
from packager.checkpoint.source import INDEX_NAME, open_folder
from packager.cli import run
from packager.errors import BadInput, IntegrityFailure, RemoteFailure, UsageProblem
from packager.publish.hub_http import Fault, Reply
from packager.publish.loopback_hub import LoopbackHub

REPO = "rehearsal/source"
FAULTS: list[Fault] = [
    500,
    503,
    Reply(429, {"error": "too many requests"}, {"Retry-After": "0"}),
    "reset",
    "lost-reply",
    "cut-reply",
    "short-reply",
]


pytestmark = pytest.mark.usefixtures("impatient_hub")


def push(server: LoopbackHub, files: dict[str, bytes], repo: str = REPO, *, private: bool = False) -> str:
    """Commit files to a repository through the client; returns the commit."""
    api = HfApi(endpoint=server.url, token="t")
    api.create_repo(repo, exist_ok=True, private=private)
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return str(api.create_commit(repo, operations, commit_message="add").oid)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", storage_host=True) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def source(server: LoopbackHub, tiny_checkpoint: Path) -> str:
    """The tiny checkpoint on the hub, by its commit."""
    return f"hf://{REPO}@{push(server, contents(tiny_checkpoint))}"


def _names(faults: list[Fault]) -> str:
    names = [str(fault.status) if isinstance(fault, Reply) else str(fault) for fault in faults]
    return names[0] if len(names) == 1 else "each in turn"


class Nth:
    """A hook that injects a fault at one request, counted from 0, and remembers whether it came to that."""

    def __init__(self, number: int, fault: Fault) -> None:
        self.number, self.fault = number, fault
        self.count = 0
        self._guard = threading.Lock()

    def __call__(self, *_: str) -> Fault | None:
        with self._guard:
            self.count += 1
            return self.fault if self.count == self.number + 1 else None


def everything(source: str) -> dict[str, bytes]:
    """Digest, config, side files and every tensor, in order."""
    checkpoint = Checkpoint.open(source)
    found = {"digest": checkpoint.digest().encode(), "config": json.dumps(checkpoint.config()).encode()}
    found |= {side.name: side.read_bytes() for side in checkpoint.side_files()}
    with checkpoint.reader() as reader:
        found |= {name: reader.bytes(info).tobytes() for name, info in checkpoint.tensors.items()}
    return found


def test_a_hub_source_is_the_same_checkpoint_as_the_directory(
    source: str, tiny_checkpoint: Path, server: LoopbackHub
) -> None:
    assert everything(source) == everything(str(tiny_checkpoint))
    gets = [path for method, path in server.requests if method == "GET" and path.startswith("/objects/")]
    assert len(gets) < len(Checkpoint.open(source).tensors), "a file read in order takes few requests"
    assert Checkpoint.open(source).name == source
    with pytest.raises(UsageProblem, match="not on this machine"):
        _ = Checkpoint.open(source).path


@pytest.mark.parametrize("ending", ["@main", "@v1", ""])
def test_a_branch_or_tag_is_resolved_once_and_the_commit_is_what_is_read(
    source: str, server: LoopbackHub, ending: str
) -> None:
    api = HfApi(endpoint=server.url, token="t")
    api.create_tag(REPO, tag="v1")
    checkpoint = Checkpoint.open(f"hf://{REPO}{ending}")
    assert checkpoint.name == source
    push(server, {"config.json": b"{}"})
    assert checkpoint.config()["model_type"] == "bailing_moe"


@pytest.mark.parametrize("ranges", [1, 7, 4096])
def test_any_range_and_any_order_give_the_same_bytes(source: str, tiny_checkpoint: Path, ranges: int) -> None:
    local, remote = Checkpoint.open(tiny_checkpoint), Checkpoint.open(source)
    order = np.random.default_rng(0).permutation(sorted(local.tensors))[:6]
    with local.reader() as here, remote.reader() as there:
        for name in order:
            info = local.tensors[str(name)]
            for begin in range(0, min(info.nbytes, 20 * ranges), ranges):
                end = min(begin + ranges, info.nbytes)
                assert there.bytes(info, begin, end).tobytes() == here.bytes(info, begin, end).tobytes()
            assert b"".join(map(bytes, there.chunks(info, 5000))) == here.bytes(info).tobytes()
            assert np.array_equal(there.array(info), here.array(info))


def test_several_readers_in_threads_of_a_pickled_copy_read_the_same_under_a_hail_of_faults(
    source: str, server: LoopbackHub, tiny_checkpoint: Path
) -> None:
    want = everything(str(tiny_checkpoint))
    random, guard = np.random.default_rng(0), threading.Lock()
    hail: list[Fault] = []

    def fault(*_: str) -> Fault | None:
        with guard:
            if random.random() > 0.15:
                return None
            hail.append(FAULTS[int(random.integers(len(FAULTS)))])
            return hail[-1]

    server.fault = fault
    remote = pickle.loads(pickle.dumps(Checkpoint.open(source)))

    def read(names: list[str]) -> bool:
        with remote.reader() as reader:
            return all(reader.bytes(remote.tensors[name]).tobytes() == want[name] for name in names)

    names = list(remote.tensors)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [names[at::4] for at in range(4)]))
    assert len(hail) > 5


@pytest.mark.parametrize(
    "faults", [FAULTS, *(pytest.param([fault], marks=pytest.mark.slow) for fault in FAULTS)], ids=_names
)
def test_a_fault_at_any_single_request_changes_no_byte(
    faults: list[Fault], source: str, server: LoopbackHub, tiny_checkpoint: Path
) -> None:
    want = everything(str(tiny_checkpoint))
    named = source.replace(source.partition("@")[2], "main")
    number = 0
    while True:
        fault = faults[number % len(faults)]
        server.fault = hook = Nth(number, fault)
        assert everything(named) == want, f"{fault} at request {number}"
        if hook.count <= number:
            break
        number += 1
    assert number > 12


@pytest.mark.slow
def test_a_conversion_from_the_hub_survives_a_fault_at_every_request(
    source: str, server: LoopbackHub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert run(["quantize", str(tiny_checkpoint), str(tmp_path / "local")]) == 0
    want = contents(tmp_path / "local")
    number = 0
    while True:
        out = tmp_path / f"out-{number}"
        server.fault = hook = Nth(number, FAULTS[number % len(FAULTS)])
        assert run(["quantize", source, str(out)]) == 0
        assert contents(out) == want
        shutil.rmtree(out)
        if hook.count <= number:
            break
        number += 1
    assert number > 12
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_broken_connection_goes_on_at_the_byte_where_it_broke(
    server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "larger", vocab_size=20000)
    source = f"hf://{REPO}@{push(server, contents(path))}"
    info = Checkpoint.open(path).tensors["lm_head.weight"]
    checkpoint = Checkpoint.open(source)
    asked: list[str] = []
    original = hub._Answer.__init__

    def spy(self: hub._Answer, folder: hub.HubFolder, path: str, begin: int, end: int, size: int) -> None:
        asked.append(f"{begin}-{end}")
        original(self, folder, path, begin, end, size)

    monkeypatch.setattr(hub._Answer, "__init__", spy)
    broken = iter(["cut-reply", "short-reply", None, None])
    server.fault = lambda _, path: next(broken) if path.startswith("/objects/") else None  # type: ignore[assignment,return-value]
    with checkpoint.reader() as reader:
        assert reader.bytes(info).nbytes == info.nbytes == 20000 * 128 * 2
    begins = [int(part.partition("-")[0]) for part in asked]
    start = begins[0]
    # A reset drops what the client has not taken yet, so the second beginning is not exactly the half.
    assert len(begins) == 3
    assert start < begins[1] <= start + info.nbytes // 2 < begins[2]


def test_a_fault_that_stays_ends_with_one_clear_error(
    source: str, server: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint.open(source)
    server.requests.clear()
    server.fault = lambda *_: 503
    with checkpoint.reader() as reader, pytest.raises(RemoteFailure, match=r"503.*6 attempts"):
        reader.bytes(checkpoint.tensors["lm_head.weight"])
    assert len(server.requests) == hub_faults.ATTEMPTS
    assert run(["inspect", source]) == 6
    assert "503" in capsys.readouterr().err
    server.stop()
    assert run(["inspect", source]) == 6
    assert "no hub can be reached" in capsys.readouterr().err


def test_waits_grow_are_spread_and_heed_what_the_hub_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(hub_faults, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(hub_faults.time, "sleep", waits.append)
    patience = hub_faults.Patience()
    for _ in range(hub_faults.ATTEMPTS - 1):
        patience.wait(hub_faults.PassingFault("x"))
    assert all(2**at / 2 <= wait <= 2**at for at, wait in enumerate(waits))
    assert len({wait / 2**at for at, wait in enumerate(waits)}) > 1
    with pytest.raises(RemoteFailure, match="6 attempts"):
        patience.wait(hub_faults.PassingFault("x"))
    patience.progress(1 << 20)
    patience.wait(hub_faults.PassingFault("x", asked_wait_s=17))
    assert waits[-1] == 17
    assert hub_faults.asked_wait_s({"Retry-After": "12"}) == 12
    assert hub_faults.asked_wait_s({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert hub_faults.asked_wait_s({"Retry-After": "soon"}) == 0
    assert hub_faults.asked_wait_s({"RateLimit": '"api";r=0;t=55'}) == 55
    assert hub_faults.asked_wait_s({"RateLimit": '"api";r=3;t=55'}) == 0


def _read_all(checkpoint: Checkpoint) -> None:
    with checkpoint.reader() as reader:
        for info in checkpoint.tensors.values():
            reader.bytes(info)


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("no-range", RemoteFailure, "did not answer a request for bytes"),
        ("altered-reply", IntegrityFailure, "not those that the hub lists"),
        (Reply(206, {"a": 1}, {"Content-Range": "bytes 0-8/9"}), RemoteFailure, "did not answer a request"),
        (Reply(416, None, {"Content-Range": "bytes */5"}), RemoteFailure, "has no bytes"),
    ],
    ids=["ignored", "altered", "other", "shorter"],
)
def test_bytes_other_than_those_asked_for_are_an_error(
    source: str, server: LoopbackHub, fault: Fault, error: type[Exception], says: str
) -> None:
    checkpoint = Checkpoint.open(source)
    server.fault = lambda _, path: fault if path.startswith("/objects/") else None
    with pytest.raises(error, match=says):
        _read_all(checkpoint)


def test_an_encoded_answer_is_an_error(source: str, server: LoopbackHub) -> None:
    checkpoint = Checkpoint.open(source)
    info = next(iter(checkpoint.tensors.values()))
    header = checkpoint.shards[info.shard]
    begin = header.data_start + info.begin
    stated = f"bytes {begin}-{begin + info.nbytes - 1}/{header.size}"
    server.fault = lambda _, path: (
        Reply(206, None, {"Content-Range": stated, "Content-Encoding": "gzip"})
        if path.startswith("/objects/")
        else None
    )
    with checkpoint.reader() as reader, pytest.raises(RemoteFailure, match="gzip"):
        reader.bytes(info)


@pytest.mark.parametrize("header", ["X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit"])
def test_a_file_that_is_no_longer_what_was_listed_is_an_error(
    source: str, server: LoopbackHub, header: str
) -> None:
    checkpoint = Checkpoint.open(source)
    shard = next(iter(checkpoint.shards))
    listed = open_folder(source).sizes()[shard]
    commit = source.partition("@")[2]
    stated = {"X-Linked-Etag": '"' + "0" * 64 + '"', "X-Linked-Size": str(listed), "X-Repo-Commit": commit}
    stated |= {header: {"X-Linked-Size": str(listed + 1), "X-Repo-Commit": "0" * 40}.get(header, '"0"')}
    fresh = hub.HubFolder(HubName(REPO, commit))
    server.fault = lambda method, _: (
        Reply(302, None, stated | {"Location": server.storage_url}) if method == "HEAD" else None
    )
    with pytest.raises(RemoteFailure, match="not what the hub listed"):
        fresh.headers([shard])


def test_a_client_that_is_offline_by_choice_is_a_usage_problem(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageProblem, match="HF_HUB_OFFLINE"):
        Checkpoint.open(source)


def test_a_damaged_small_file_is_noticed(source: str, server: LoopbackHub) -> None:
    checkpoint = Checkpoint.open(source)
    server.fault = lambda _, path: "altered-reply" if path.endswith("config.json") else None
    with pytest.raises(IntegrityFailure, match="config"):
        checkpoint.config()
    with pytest.raises(IntegrityFailure, match="config"):
        checkpoint.digest()


def test_links_that_expire_are_asked_for_again(
    source: str, server: LoopbackHub, tiny_checkpoint: Path
) -> None:
    checkpoint = Checkpoint.open(source)
    want = everything(str(tiny_checkpoint))
    with checkpoint.reader() as reader:
        for name, info in checkpoint.tensors.items():
            server.signature += 1
            assert reader.bytes(info).tobytes() == want[name]


@pytest.mark.parametrize(
    "listing",
    [
        {"error": "none"},
        [1],
        [{"type": "file"}],
        [{"type": "file", "path": "config.json", "size": "9", "oid": "0" * 40}],
        [{"type": "file", "path": "config.json", "size": -1, "oid": "0" * 40}],
        [{"type": "file", "path": "config.json", "size": True, "oid": "0" * 40}],
        [{"type": "file", "path": "config.json", "size": 9, "oid": None}],
        [{"type": "file", "path": "config.json", "size": 9, "oid": "0" * 40, "lfs": {"oid": "x", "size": 9}}],
    ],
    ids=str,
)
def test_a_listing_that_no_hub_would_send_is_refused(
    source: str, server: LoopbackHub, listing: object
) -> None:
    server.fault = lambda _, path: Reply(200, listing) if "/tree/" in path else None
    with pytest.raises((RemoteFailure, BadInput)):
        Checkpoint.open(source)


def test_a_file_that_is_listed_with_an_absurd_size_takes_no_memory(source: str, server: LoopbackHub) -> None:
    listing = [
        {"type": "file", "path": name, "size": 1 << 50, "oid": "0" * 40}
        for name in ("config.json", "tokenizer.json", INDEX_NAME)
    ]
    server.fault = lambda _, path: Reply(200, listing) if "/tree/" in path else None
    with pytest.raises(BadInput, match="not read"):
        Checkpoint.open(source)
    with pytest.raises(BadInput, match="too many"):
        open_folder(source).read("tokenizer.json")


def test_a_private_repository_needs_a_token_and_the_token_stays_with_the_hub(
    server: LoopbackHub, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = push(server, contents(tiny_checkpoint), "rehearsal/hidden", private=True)
    source = f"hf://rehearsal/hidden@{commit}"
    with pytest.raises(RemoteFailure, match="401") as caught:
        Checkpoint.open(source)
    assert "HF_TOKEN" in caught.value.remedy
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    # The storage host of the loopback hub refuses whoever sends it a token.
    assert everything(source) == everything(str(tiny_checkpoint))


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [({"X-Error-Code": "GatedRepo"}, 403, "is gated"), ({}, 403, "403"), ({}, 401, "401")],
)
def test_a_refusal_says_what_is_missing_and_is_not_tried_again(
    source: str, server: LoopbackHub, headers: dict[str, str], status: int, says: str
) -> None:
    server.requests.clear()
    server.fault = lambda *_: Reply(status, {"error": "no"}, headers)
    with pytest.raises(RemoteFailure, match=says) as caught:
        Checkpoint.open(source)
    assert "HF_TOKEN" in caught.value.remedy
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "name",
    [
        "hf://name",
        "hf://",
        "hf:///a/b",
        "hf://a/b@",
        "hf://a/b/c@main",
        "hf://a/b@../x",
        "hf://a/b@x y",
        "hf://a/../b",
        "s3://a/b",
        "hf://a/b@" + "x" * 300,
        "hf://a/b@main\n",
    ],
)
def test_a_malformed_name_is_a_usage_problem(name: str) -> None:
    with pytest.raises(UsageProblem, match="does not name a checkpoint"):
        Checkpoint.open(name)


@pytest.mark.parametrize("name", ["a/b", "/a/b", "./hf", "hf", "a:b", "C:\\x", "dir/hf:/x"])
def test_a_path_is_no_hub_name(name: str) -> None:
    assert HubName.parse(name) is None


def test_a_name_that_went_through_a_path_still_means_the_hub() -> None:
    assert HubName.parse(Path("hf://a/b@c")) == HubName("a/b", "c")


def test_what_is_not_there_is_named(source: str, server: LoopbackHub) -> None:
    assert Checkpoint.open(source).shards
    with pytest.raises(RemoteFailure, match="no repository rehearsal/none"):
        Checkpoint.open("hf://rehearsal/none@main")
    for revision in ("v9", "0" * 40):
        with pytest.raises(RemoteFailure, match="404"):
            Checkpoint.open(f"hf://{REPO}@{revision}")
    commit = push(server, {"README.md": b"hello"}, "rehearsal/empty")
    with pytest.raises(BadInput, match="not a checkpoint"):
        Checkpoint.open(f"hf://rehearsal/empty@{commit}")


def test_an_unsound_checkpoint_on_a_hub_is_refused_as_one_on_disk_is(
    server: LoopbackHub, tiny_checkpoint: Path
) -> None:
    files = contents(tiny_checkpoint)
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    files[shards[0]] = files[shards[0]][:-1]
    files[shards[1]] = b"\xff" * 40
    del files[shards[2]]
    files["extra.safetensors"] = b""
    commit = push(server, files)
    with pytest.raises(BadInput) as caught:
        Checkpoint.open(f"hf://{REPO}@{commit}")
    for part in (f"missing shard {shards[2]}", "truncated", "the header claims", "extra.safetensors is not"):
        assert part in caught.value.message
    index = json.loads(files[INDEX_NAME])
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    commit = push(server, {INDEX_NAME: json.dumps(index).encode()})
    with pytest.raises(BadInput, match="no shard of this folder"):
        Checkpoint.open(f"hf://{REPO}@{commit}")


def test_a_header_longer_than_the_first_request_is_read_whole(
    server: LoopbackHub, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_HEADER_GUESS", 16)
    source = f"hf://{REPO}@{push(server, contents(tiny_checkpoint))}"
    assert everything(source) == everything(str(tiny_checkpoint))


def test_a_single_file_that_is_no_lfs_file_is_read_too(server: LoopbackHub, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "one")
    api = HfApi(endpoint=server.url, token="t")
    api.create_repo(REPO)
    commit = server.store.add_commit(
        REPO, "main", title="x", message="", parent=None, regular=contents(path), lfs={}, deleted=(),
        deleted_folders=(),
    )  # fmt: skip
    source = f"hf://{REPO}@{commit}"
    assert everything(source) == everything(str(path))
    checkpoint = Checkpoint.open(source)
    server.fault = lambda _, path: "altered-reply" if path.endswith(".safetensors") else None
    with pytest.raises(IntegrityFailure):
        _read_all(checkpoint)


def test_a_sealed_artifact_on_a_hub_has_the_digest_of_its_manifest(
    server: LoopbackHub, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    sealed = tmp_path / "sealed"
    with ArtifactWriter(sealed, stage="import", recipe_digest="sha256:0", inputs={}) as writer:
        for name, data in contents(tiny_checkpoint).items():
            writer.write_bytes(name, data)
        manifest = writer.seal({}, tools={})
    commit = push(server, contents(sealed))
    assert Checkpoint.open(f"hf://{REPO}@{commit}").digest() == manifest.digest
    assert Checkpoint.open(sealed).digest() == manifest.digest
    commit = push(server, {"tokenizer.json": b'{"version": "2.0"}', "stray.json": b"{}"})
    with pytest.raises(IntegrityFailure) as caught:
        Checkpoint.open(f"hf://{REPO}@{commit}").digest()
    assert "changed: tokenizer.json" in caught.value.message
    assert "stray: stray.json" in caught.value.message


def _json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    capsys.readouterr()
    assert run([*arguments, "--json"]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.parametrize(
    "verb",
    [("inspect", "{}"), ("plan", "{}", "--precision", "bf16"), ("quantize", "{}", "--dry-run")],
    ids=lambda verb: verb[0],
)
def test_verbs_that_read_headers_tell_the_same_of_a_hub(
    verb: tuple[str, ...],
    source: str,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def differing(document: dict[str, object]) -> dict[str, object]:
        return {
            k: v
            for k, v in document.items()
            if k not in ("path", "source", "serve_command", "sglang_command")
        }

    here = _json(capsys, *(part.format(tiny_checkpoint) for part in verb))
    there = _json(capsys, *(part.format(source) for part in verb))
    assert differing(there) == differing(here)
    assert there.get("path", there.get("source", source)) == source


def test_a_snapshot_in_the_hub_cache_is_the_same_source(
    source: str, server: LoopbackHub, tiny_checkpoint: Path
) -> None:
    snapshot = Path(snapshot_download(REPO, endpoint=server.url, cache_dir=constants.HF_HUB_CACHE))
    assert all(path.is_symlink() for path in snapshot.iterdir())
    assert everything(str(snapshot)) == everything(str(tiny_checkpoint))
    assert snapshot.name == source.partition("@")[2]
    shard = next(iter(Checkpoint.open(snapshot).shards))
    shutil.move((snapshot / shard).resolve(), snapshot.parent / "gone")
    with pytest.raises(BadInput, match=f"missing shard {shard}"):
        Checkpoint.open(snapshot)
