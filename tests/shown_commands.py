"""Commands as documents show them, each parsed by the tool that it is for; nothing is run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
SHELLS = ("bash", "sh", "shell", "console")
_WORD = re.compile(r"[a-z][a-z-]*")


def block_commands(markdown: str) -> Iterator[list[str]]:
    """The commands of every block that is said to be for a shell, as words."""
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "fence" and token.info.strip() in SHELLS:
            yield from script_commands(token.content)


def script_commands(script: str) -> Iterator[list[str]]:
    """The commands of a script of plain lines; `\\` continues one, `$` may prompt for it."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words


def unmarked_commands(markdown: str) -> list[str]:
    """First lines of indented blocks that begin with a tool known here: they would escape the checks."""
    blocks = [t.content for t in MarkdownIt("commonmark").parse(markdown) if t.type == "code_block"]
    return [block.split("\n")[0] for block in blocks if block.split()[0] in TOOLS]


def inline_commands(markdown: str, tool: str) -> Iterator[str]:
    """Code within sentences and tables that begins with a tool's name."""
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        for child in token.children or ():
            if child.type == "code_inline" and child.content.startswith(f"{tool} "):
                yield child.content


def parse(words: Sequence[str]) -> None:
    """Have the command's own tool read it.

    Raises:
        KeyError: the tool is not known here.
        Exception: whatever its parser raises.
    """
    TOOLS[words[0]](list(words[1:]))


def click_command(root: click.Command, words: list[str]) -> click.Context:
    """Follow a Click command line to its leaf and parse the rest, as running it would, without running it."""
    command, context = root, click.Context(root, info_name=root.name)
    while isinstance(command, click.Group):
        assert words, f"{context.command_path} needs a verb"
        _, found, words = command.resolve_command(context, words)  # raises UsageError: no such verb
        assert found is not None
        command = found
        if isinstance(command, click.Group):
            context = click.Context(command, parent=context, info_name=command.name)
    return command.make_context(command.name, list(words), parent=context)


def check_inline(text: str) -> None:
    """A command within a sentence: its verb exists, and so does each option; values may be placeholders."""
    from packager.cli import packager

    words = text.replace("\\|", "|").split()[1:]
    command: click.Command = packager
    context = click.Context(packager)
    while isinstance(command, click.Group) and words and _WORD.fullmatch(words[0]):
        parent, name = command, words.pop(0)
        alternatives = [name]
        while words[:1] == ["|"] or (len(words) > 1 and words[0] == "|"):
            alternatives.append(words[1])
            words = words[2:]
        for each in alternatives:
            found = parent.get_command(context, each)
            assert found is not None, f"{text}: no verb {each}"
            command = found
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0].rstrip("],") in options, f"{text}: no option {word}"


def _packager(words: list[str]) -> None:
    from packager.cli import packager

    click_command(packager, words)


def _hf(words: list[str]) -> None:
    from huggingface_hub.cli.hf import app

    click_command(app, words)


def _model_signing(words: list[str]) -> None:
    from model_signing._cli import main

    click_command(main, words)


def _pip(words: list[str]) -> None:
    # In a process of its own: pip imports another distutils than vLLM's dependencies can live with.
    script = (
        "import json, sys; from pip._internal.commands import create_command; "
        "print(json.dumps(create_command(sys.argv[1]).parse_args(sys.argv[2:])[1]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = json.loads(done.stdout)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for argument in arguments:
        if match := re.fullmatch(r"moe-packager\[([\w,-]+)\]", argument):
            assert set(match[1].split(",")) <= set(project["optional-dependencies"]), argument


def _make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(words) <= set(targets), words


def _curl(words: list[str]) -> None:
    address, *options = words
    assert re.fullmatch(r"http://[\w.]+:\d+/v1/chat/completions", address), address
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    assert pairs.keys() == {"-H", "-d"}, pairs
    assert json.loads(pairs["-d"])["messages"][0]["role"] == "user"


def _vllm(words: list[str]) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert words.pop(0) == "serve"
    validate_parsed_serve_args(make_arg_parser(FlexibleArgumentParser()).parse_args(words))


def _python(words: list[str]) -> None:
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"], words
    _vllm(["serve", *words[2:]])


TOOLS: dict[str, Callable[[list[str]], None]] = {
    "packager": _packager,
    "hf": _hf,
    "model_signing": _model_signing,
    "pip": _pip,
    "make": _make,
    "curl": _curl,
    "vllm": _vllm,
    "python": _python,
}
ENGINES = ("vllm", "python")
"""Tools whose parser takes long to import."""
