"""Imports go down only, and light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Higher may import lower. Rooms of one level do not import one another, except in the pairs below.
LEVEL = {
    "errors": 0,
    "recipe": 1,
    "optimizer": 1,
    "artifact": 1,
    "checkpoint": 2,
    "layouts": 2,
    "bailing": 2,
    "quantize": 3,
    "context": 3,
    "draft": 3,
    "serving": 3,
    "nano": 3,
    "proof": 3,
    "bundle": 4,
    "publish": 5,
    "release": 6,
    "cli": 7,
}
# A layout is stated in terms of tensors on disk; BailingMoeV2's is one of several.
PAIRS = {("layouts", "checkpoint"), ("bailing", "checkpoint"), ("bailing", "layouts")}
MAY_VALIDATE = {"cli", "release", "serving", "bundle"}
HEAVY = (
    "torch",
    "transformers",
    "vllm",
    "scipy",
    "matplotlib",
    "speculators",
    "llmcompressor",
    "datasets",
    "ray",
)


def _imports(text: str, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Every module that a file's text imports anywhere, with its line; relative imports made absolute."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            if module == "packager" or not node.module:
                for alias in node.names:
                    yield f"{module}.{alias.name}", node.lineno
            else:
                yield module, node.lineno


def _room(path: Path) -> str:
    return path.relative_to(ROOT / "packager").parts[0].removesuffix(".py")


def _complaints(room: str, text: str, package: tuple[str, ...]) -> list[str]:
    found = []
    for module, line in _imports(text, package):
        parts = module.split(".")
        if parts[0] == "validation" and room not in MAY_VALIDATE:
            found.append(f"line {line} imports {module}")
        if parts[0] != "packager" or len(parts) < 2 or parts[1] in (room, "__version__"):
            continue
        if LEVEL[parts[1]] >= LEVEL[room] and (room, parts[1]) not in PAIRS:
            found.append(f"line {line} imports {module}")
    return found


def test_every_room_has_a_level() -> None:
    rooms = {_room(path) for path in (ROOT / "packager").rglob("*.py")} - {"__init__", "__main__"}
    assert rooms <= set(LEVEL)


def test_imports_go_down_only() -> None:
    found = []
    for path in sorted((ROOT / "packager").rglob("*.py")):
        relative = path.relative_to(ROOT)
        if _room(path) not in ("__init__", "__main__"):
            text = path.read_text(encoding="utf-8")
            found += [f"{relative}: {line}" for line in _complaints(_room(path), text, relative.parts[:-1])]
    assert found == []


@pytest.mark.parametrize(
    ("room", "text"),
    [
        ("artifact", "from packager.release import release"),
        ("quantize", "from packager.draft.head import Eagle3Head"),
        ("quantize", "def f() -> None:\n    from ..context import extend"),
        ("bundle", "from packager import publish"),
        ("draft", "import validation.gates"),
        ("errors", "import packager.recipe"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_found(room: str, text: str) -> None:
    assert len(_complaints(room, text, ("packager", room))) == 1


def test_an_import_that_goes_down_is_not() -> None:
    text = "from packager.quantize import quantize\nfrom .plan import plan_release\nimport validation.gates"
    assert _complaints("release", text, ("packager", "release")) == []


def test_the_proof_shares_no_code_with_what_it_proves() -> None:
    independent = {"files", "dialect", "reference", "integers", "recompute"}
    allowed = {"packager.errors", "packager.proof", *(f"packager.proof.{name}" for name in independent)}
    found = []
    for name in sorted(independent):
        text = (ROOT / f"packager/proof/{name}.py").read_text(encoding="utf-8")
        for module, line in _imports(text, ("packager", "proof")):
            if module.split(".")[0] in ("packager", "torch", "safetensors") and module not in allowed:
                found.append(f"{name}.py:{line} imports {module}")
    assert found == []
    script = (
        "import sys, packager.proof.recompute\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'packager'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert set(ast.literal_eval(done.stdout)) == allowed | {"packager"}


def test_validation_imports_nothing_from_packager() -> None:
    found = []
    for path in sorted((ROOT / "validation").rglob("*.py")):
        relative = path.relative_to(ROOT)
        for module, line in _imports(path.read_text(encoding="utf-8"), relative.parts[:-1]):
            if module.split(".")[0] == "packager":
                found.append(f"{relative}:{line}")
    assert found == []


def test_no_room_is_a_junk_drawer() -> None:
    for package in ("packager", "validation"):
        names = {path.stem for path in (ROOT / package).rglob("*")}
        assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("package", ["packager", "validation"])
def test_nothing_trusts_code_in_a_checkpoint_or_unpickles(package: str) -> None:
    found = []
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                off = isinstance(node.value, ast.Constant) and node.value.value is False
                found += [] if off else [f"{path.relative_to(ROOT)}:{node.value.lineno}"]
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if "pickle" in names:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_all_verbs_and_the_release_import_without_torch() -> None:
    script = (
        "import importlib, sys\n"
        "from packager.cli import VERBS, module_of\n"
        "for verb in VERBS: importlib.import_module(module_of(verb))\n"
        "import packager.release\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
