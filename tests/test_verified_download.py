"""A bundle as users get it: downloaded by the hub's own tool, verified, served; and every file of it guarded.

The weights are the nano's own, so that structure and sizes are those of a model.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_bundle import Stages, digest_of, make_stages

from packager.bundle.verify import verify_bundle
from packager.errors import BadInput, IntegrityFailure
from packager.nano import CHECKPOINT
from packager.publish.hub import publish
from packager.publish.loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow
REPO = "rehearsal/nano"


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    extra = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
    return make_stages(tmp_path_factory.mktemp("stages"), extra=extra, context={"length": 1024})


@pytest.fixture(scope="module")
def bundle(stages: Stages) -> Path:
    stages.bundle(stages.root / "bundle")
    return stages.root / "bundle"


def test_every_file_is_guarded_by_our_verifier_and_by_the_stock_one(
    bundle: Path, stages: Stages, tmp_path: Path
) -> None:
    """Each file in turn: one bit flipped, removed, renamed; and one file added. Ours names the file."""
    from model_signing import verifying

    root = Path(shutil.copytree(bundle, tmp_path / "copy"))

    def stock() -> None:
        config = verifying.Config().use_elliptic_key_verifier(public_key=stages.public_key)
        config.verify(root, root / "model.sig")

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    changes: dict[str, Callable[[Path], object]] = {
        "flipped": flip,
        "removed": Path.unlink,
        "renamed": lambda file: file.rename(file.with_name("renamed-" + file.name)),
        "added": lambda file: file.with_name("added-" + file.name).write_bytes(b"{}"),
    }
    files = sorted(path for path in root.rglob("*") if path.is_file())
    assert len(files) >= 17
    for file in files:
        relative = file.relative_to(root).as_posix()
        before = file.read_bytes()
        for name, change in changes.items():
            change(file)
            with pytest.raises((IntegrityFailure, BadInput)) as ours:
                verify_bundle(root, stages.public_key)
            assert file.name in ours.value.message, (name, relative)
            assert ours.value.remedy
            # Of its own file the stock verifier says only that it cannot be read, or is not valid.
            refusals = Exception if relative == "model.sig" else ValueError
            with pytest.raises(refusals, match=None if relative == "model.sig" else file.name):
                stock()
            for other in ("renamed-", "added-"):
                file.with_name(other + file.name).unlink(missing_ok=True)
            file.write_bytes(before)
    stock()
    verify_bundle(root, stages.public_key)


@pytest.fixture(scope="module")
def hub(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, str]]:
    """A hub that the bundle was published to, and the commit."""
    from huggingface_hub import constants

    patch = pytest.MonkeyPatch()
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as running:
        done = publish(bundle, REPO, endpoint=running.url, token="t", progress=lambda _: None)
        patch.undo()
        yield running, done.revision


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | variables
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment
    )


def packager(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "packager", *arguments, **variables)


@pytest.mark.parametrize("place", ["cache", "local-dir"])
def test_what_hf_downloads_verifies_and_serves_also_where_the_path_has_spaces_and_other_letters(
    place: str, bundle: Path, stages: Stages, hub: tuple[LoopbackHub, str], tmp_path: Path
) -> None:
    home = tmp_path / "Größe 模型 · два слова"
    home.mkdir()
    key = Path(shutil.copyfile(stages.public_key, home / "clé.pub"))
    online = {"HF_ENDPOINT": hub[0].url, "HF_HOME": str(home / "hf home"), "HF_TOKEN": "t"}
    where = ["--local-dir", home / "mein Modell"] if place == "local-dir" else []
    got = run(Path(sys.executable).parent / "hf", "download", REPO, *where, "--quiet", **online)
    assert got.returncode == 0, got.stderr
    path = Path(got.stdout.strip().splitlines()[-1])
    assert path.is_relative_to(home)
    assert (path / "config.json").is_symlink() == (place == "cache")

    offline = {"HF_HOME": online["HF_HOME"], "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    named = [path] if place == "local-dir" else [path, REPO, f"{REPO}@{hub[1]}"]
    for name in named:
        checked = packager("verify", name, "--key", key, "--json", **offline)
        assert checked.returncode == 0, checked.stderr
        document = json.loads(checked.stdout)
        assert document["digest"] == digest_of(bundle)
        assert document["signature"].startswith("valid")
        assert "BailingMoeV2ForCausalLM" in document["structure"]

    printed = packager("serve", path, "--print-command", "--cache", home / "Zwischen lager", **offline)
    assert printed.returncode == 0, printed.stderr
    command = shlex.split(printed.stdout)
    assert str(path.resolve()) in [str(Path(part).resolve()) for part in command if part.startswith("/")]

    (path / "draft/config.json").resolve().write_bytes(b"{}")
    damaged = packager("verify", path, **offline)
    assert damaged.returncode == 5
    assert "draft/config.json: changed" in damaged.stderr
    assert "--force-download" in damaged.stderr
    again = damaged.stderr.split("Get the changed files again: ")[1].split(";")[0].replace("ORG/NAME", REPO)
    hf = [str(Path(sys.executable).parent / "hf"), *shlex.split(again)[1:]]
    assert run(*hf, **online).returncode == 0
    mended = packager("verify", path, "--key", key, **offline)
    assert mended.returncode == 0, "the remedy that was named mends it: " + mended.stderr

    (path / "chat_template.jinja").unlink()
    cut = packager("verify", path, **offline)
    assert cut.returncode == 5
    again = cut.stderr.split("Finish the download: ")[1].splitlines()[0].replace("ORG/NAME", REPO)
    assert run(hf[0], *shlex.split(again)[1:], **online).returncode == 0
    assert packager("verify", path, "--key", key, **offline).returncode == 0
