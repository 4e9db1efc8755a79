"""Every verb that reads a checkpoint reads one on a hub too, with the result that the folder gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants
from quantizing import contents
from quantizing import run as convert

from packager.artifact import file_sha256
from packager.checkpoint import Checkpoint, hub
from packager.cli import run
from packager.publish.loopback_hub import LoopbackHub
from packager.recipe import QuantizeSpec

BF16, FP8, INT4 = "rehearsal/bf16", "rehearsal/fp8", "rehearsal/int4"
WRITING = {
    "relabel": (FP8, "relabel", "{}", "{out}", "--dialect", "deepseek"),
    "dequantize": (FP8, "dequantize", "{}", "{out}"),
    "dequantize-int4": (INT4, "dequantize", "{}", "{out}"),
    "extend-context": (FP8, "extend-context", "{}", "{out}", "--length", "256"),
    "extend-context-unsealed": (BF16, "extend-context", "{}", "{out}", "--length", "256"),
}
READING = {
    "diff": (BF16, "diff", "{}", "{fp8}"),
    "diff-second": (FP8, "diff", "{bf16}", "{}"),
    "verify": (BF16, "verify", "{fp8}", "--against", "{}", "--all"),
    "verify-int4": (INT4, "verify", "{}", "--against", "{bf16}", "--all"),
}
VERBS = {**WRITING, **READING}


pytestmark = pytest.mark.usefixtures("impatient_hub")


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Repository -> the folder with the same files."""
    base = tmp_path_factory.mktemp("folders")
    convert(tiny_checkpoint, base / "fp8")
    convert(tiny_checkpoint, base / "int4", QuantizeSpec(shard_bytes=60_000, scheme="int4-g128"))
    return {BF16: tiny_checkpoint, FP8: base / "fp8", INT4: base / "int4"}


@pytest.fixture(scope="module")
def pushed(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LoopbackHub, dict[str, str]]]:
    """A hub, and repository -> commit."""
    with LoopbackHub(tmp_path_factory.mktemp("hub"), storage_host=True) as running:
        api = HfApi(endpoint=running.url, token="t")
        commits = {}
        patch = pytest.MonkeyPatch()
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for repo, folder in folders.items():
            api.create_repo(repo)
            operations = [CommitOperationAdd(path, data) for path, data in contents(folder).items()]
            commits[repo] = str(api.create_commit(repo, operations, commit_message="add").oid)
        patch.undo()
        yield running, commits


@pytest.fixture
def server(pushed: tuple[LoopbackHub, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    running, _ = pushed
    running.fault = None
    running.requests.clear()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    return running


def arguments(verb: str, source: object, folders: dict[str, Path], out: Path) -> list[str]:
    """The command line of a verb that reads `source`."""
    return [
        part.format(source, out=out, fp8=folders[FP8], bf16=folders[BF16]) for part in VERBS[verb][1:]
    ] + ["--json"]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("verb", VERBS)
def test_a_branch_on_a_hub_gives_what_the_folder_gives_and_is_named_by_its_commit(
    verb: str,
    pushed: tuple[LoopbackHub, dict[str, str]],
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo = VERBS[verb][0]
    here, there = tmp_path / "here", tmp_path / "there"
    assert run(arguments(verb, folders[repo], folders, here)) == 0
    expected = json.loads(capsys.readouterr().out)
    assert run(arguments(verb, f"hf://{repo}@main", folders, there)) == 0
    said = capsys.readouterr()
    pinned = f"hf://{repo}@{pushed[1][repo]}"
    assert pinned in said.err
    found = json.loads(said.out)
    named = {"path", "source", "against", "first", "second"}
    assert [key for key in found if found[key] == pinned and key in named]
    assert {k: v for k, v in found.items() if k not in named} == {
        k: v for k, v in expected.items() if k not in named
    }
    if verb in WRITING:
        assert contents(there) == contents(here)
        assert Checkpoint.open(there).digest() == expected["digest"]
    assert not Path(constants.HF_HUB_CACHE).exists(), "nothing is downloaded beside the output"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("verb", VERBS)
def test_a_repository_or_revision_that_is_not_there_exits_6_and_leaves_nothing(
    verb: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    for source, says in (
        ("hf://rehearsal/none@main", "no repository rehearsal/none"),
        (f"hf://{VERBS[verb][0]}@v9", "404"),
    ):
        assert run(arguments(verb, source, folders, out)) == 6
        assert says in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("early", [0, 1 << 18], ids=["in-order-only", "early-kept"])
@pytest.mark.parametrize("verb", sorted({*WRITING} - {"dequantize-int4"}))  # there a shape is altered first
def test_altered_bytes_of_a_hub_never_end_in_a_sealed_output(
    verb: str,
    early: int,
    server: LoopbackHub,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "_EARLY_PIECE", early)
    repo, out = VERBS[verb][0], tmp_path / "out"
    shards = Checkpoint.open(folders[repo]).shards
    seen = 0

    def alter_after_the_headers(_: str, path: str) -> str | None:
        nonlocal seen
        seen += path.startswith("/objects/")
        return "altered-reply" if path.startswith("/objects/") and seen > len(shards) else None

    server.fault = alter_after_the_headers  # type: ignore[assignment]
    assert run(arguments(verb, f"hf://{repo}@main", folders, out)) == 5
    assert "not those that the hub lists" in capsys.readouterr().err
    assert not (out / "manifest.json").exists()
    assert not list(out.glob("*.safetensors"))
    server.fault = None
    assert run(arguments(verb, f"hf://{repo}@main", folders, out)) == 0
    assert run(arguments(verb, folders[repo], folders, tmp_path / "here")) == 0
    assert contents(out) == contents(tmp_path / "here")


def test_an_output_begun_from_the_hub_is_finished_without_asking_again_for_finished_shards(
    server: LoopbackHub, folders: dict[str, Path], tmp_path: Path
) -> None:
    out, shards = tmp_path / "out", sorted(path.name for path in folders[FP8].glob("*.safetensors"))
    last = file_sha256(folders[FP8] / shards[-1])
    command = arguments("extend-context", f"hf://{FP8}@main", folders, out)
    gone = False

    def lost(_: str, path: str) -> int | None:
        nonlocal gone
        gone = gone or (last in path and (out / shards[0]).exists())
        return 503 if gone else None

    server.fault = lost  # type: ignore[assignment]
    assert run(command) == 6
    server.fault = None
    server.requests.clear()
    assert run(command) == 0
    read = [path for method, path in server.requests if method == "GET" and "/objects/" in path]
    first = file_sha256(folders[FP8] / shards[0])
    assert sum(first in path for path in read) == 1, "its header"
    assert run(arguments("extend-context", folders[FP8], folders, tmp_path / "here")) == 0
    assert contents(out) == contents(tmp_path / "here")


@pytest.mark.usefixtures("server")
def test_dequantizing_from_a_hub_reads_no_byte_a_second_time_to_check_it(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
) -> None:
    asked: list[int] = []
    original = hub._HubFile.fill

    def spy(self: hub._HubFile, view: memoryview, position: int) -> None:
        asked.append(view.nbytes)
        original(self, view, position)

    monkeypatch.setattr(hub._HubFile, "fill", spy)
    Checkpoint.open(f"hf://{FP8}@main")
    headers = sum(asked)
    asked.clear()
    assert run(arguments("dequantize", f"hf://{FP8}@main", folders, tmp_path / "out")) == 0
    assert sum(asked) - headers <= sum(path.stat().st_size for path in folders[FP8].iterdir())


@pytest.mark.usefixtures("server")
def test_a_sample_reads_from_a_hub_what_it_looks_at_and_no_more(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
) -> None:
    asked: list[int] = []
    original = hub._Answer.__init__

    def spy(self: hub._Answer, folder: hub.HubFolder, path: str, begin: int, end: int, size: int) -> None:
        asked.append(end - begin)
        original(self, folder, path, begin, end, size)

    monkeypatch.setattr(hub._Answer, "__init__", spy)
    command = ["verify", str(folders[FP8]), "--against", f"hf://{BF16}@main"]
    read = {}
    for much in (["--sample", "2"], ["--all"]):
        asked.clear()
        assert run([*command, *much]) == 0
        read[much[0]] = sum(asked)
    weights = sum(path.stat().st_size for path in folders[BF16].glob("*.safetensors"))
    assert read["--sample"] < 0.6 * weights < read["--all"] < 1.5 * weights
    damaged = tmp_path / "damaged"
    shutil.copytree(folders[FP8], damaged)
    shard = max(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    command[1] = str(damaged)
    assert run([*command, "--all"]) == 5
