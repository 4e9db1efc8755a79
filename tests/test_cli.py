"""The command line: lazy, and every failure a message with the right exit code."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from packager import __version__
from packager.cli import VERBS, packager, run
from packager.errors import BadInput, GateFailed, IntegrityFailure, PackagerError, RemoteFailure, UsageProblem
from validation.errors import MeasurementError, ServerUnreachable


def _python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def failing_verb(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`packager verify` raises whatever is put into this list."""
    raised: list[BaseException] = []

    @click.command()
    def command() -> None:
        raise raised[0]

    monkeypatch.setattr(type(packager), "get_command", lambda *_: command)
    return raised


def test_help_lists_every_verb_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in VERBS)
    assert "4 a gate failed" in said


def test_help_imports_neither_torch_nor_pydantic_nor_any_verb() -> None:
    loaded = json.loads(
        _python(
            "import contextlib, io, json, sys\n"
            "from packager.cli import run\n"
            "with contextlib.redirect_stdout(io.StringIO()): run(['--help'])\n"
            "print(json.dumps(sorted(sys.modules)))"
        )
    )
    assert not {"torch", "pydantic", "numpy", "yaml", "rich", "vllm", "transformers"} & set(loaded)
    assert [name for name in loaded if name.startswith("packager.cli.")] == []


def test_every_verb_has_help_and_json() -> None:
    for verb in VERBS:
        command = packager.get_command(click.Context(packager), verb)
        assert command is not None
        leaves = list(command.commands.values()) if isinstance(command, click.Group) else [command]
        assert leaves
        for leaf in leaves:
            assert leaf.help, f"{verb} {leaf.name} has no help"
            options = {name for parameter in leaf.params for name in parameter.opts}
            assert "--json" in options, f"{verb} {leaf.name} has no --json"


def test_the_readme_shows_every_verb() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"| `packager {verb} " not in readme] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_an_unknown_verb_is_named_and_a_near_one_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantise"]) == 2
    captured = capsys.readouterr()
    assert "there is no verb 'quantise'. Did you mean 'quantize'?" in captured.err
    assert captured.out == ""


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["release", "--no-such-option"]) == 2
    assert "what to do: See `packager release --help`." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageProblem("m", "r"), 2),
        (BadInput("m", "r"), 3),
        (GateFailed("m", "r"), 4),
        (IntegrityFailure("m", "r"), 5),
        (RemoteFailure("m", "r"), 6),
        (MeasurementError("m", "r"), 3),
        (ServerUnreachable("m", "r"), 6),
        (PackagerError("m", "r"), 1),
    ],
)
def test_an_expected_failure_says_what_happened_and_what_to_do(
    failing_verb: list[BaseException],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    failing_verb.append(error)
    assert run(["verify"]) == code
    assert capsys.readouterr().err == "error: m\nwhat to do: r\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_is_no_bug(
    failing_verb: list[BaseException], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    failing_verb.append(OSError(number, "no", "/some/file"))
    assert run(["verify"]) == 3
    said = capsys.readouterr().err
    assert "/some/file" in said
    assert "what to do:" in said
    assert "Traceback" not in said


def test_an_extra_that_is_not_installed_is_named(
    failing_verb: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_verb.append(ModuleNotFoundError("No module named 'vllm'", name="vllm"))
    assert run(["verify"]) == 2
    assert "pip install 'moe-packager[serve]'" in capsys.readouterr().err


def test_an_unexpected_failure_is_called_a_bug_and_leaves_a_trace(
    failing_verb: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_verb.append(ZeroDivisionError("by zero"))
    assert run(["verify"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert f"this is a bug in packager {__version__} (ZeroDivisionError)" in said


def test_an_interrupt_ends_with_130(failing_verb: list[BaseException]) -> None:
    failing_verb.append(KeyboardInterrupt())
    assert run(["verify"]) == 130


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m packager --help | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode in (0, 141)
    assert done.stderr == ""
