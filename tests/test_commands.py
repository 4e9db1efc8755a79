"""Every command that a document or a card shows is parsed by its own tool."""

from __future__ import annotations

import shutil

import click
import pytest
from shown_commands import (
    ENGINES,
    ROOT,
    TOOLS,
    block_commands,
    check_inline,
    inline_commands,
    parse,
    unmarked_commands,
)
from tiny_bundle import Stages, make_stages

DOCUMENTS = ("README.md", "CONTRIBUTING.md")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    made = make_stages(tmp_path_factory.mktemp("stages"))
    made.bundle(made.root / "bundle")
    return made


def _shown(stages: Stages) -> list[list[str]]:
    files = [ROOT / name for name in DOCUMENTS]
    files += [stages.root / "bundle" / name for name in ("README.md", "README.zh.md")]
    return [words for file in files for words in block_commands(file.read_text(encoding="utf-8"))]


def test_every_command_shown_is_one_that_its_tool_understands(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stages.root / "bundle")
    shutil.copy(stages.public_key, "PUBLISHER.pub")  # model_signing looks for it while it parses
    shown = _shown(stages)
    assert {words[0] for words in shown} == set(TOOLS)  # an unknown tool fails here
    for words in shown:
        if words[0] not in ENGINES:
            parse(words)


@pytest.mark.slow
def test_every_engine_command_shown_is_parsed_by_the_engine(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.chdir(stages.root / "bundle")
    for words in _shown(stages):
        if words[0] in ENGINES:
            parse(words)
            with pytest.raises(SystemExit):
                parse([*words, "--no-such-option"])


def test_verbs_and_options_named_within_sentences_exist() -> None:
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert unmarked_commands(text) == [], "commands stand in blocks marked `bash`"
        for command in inline_commands(text, "packager"):
            check_inline(command)
    with pytest.raises(AssertionError, match="no option --hardwear"):
        check_inline("packager plan SOURCE --hardwear 2xh20")
    with pytest.raises(AssertionError, match="no verb validated"):
        check_inline("packager validated accuracy")


@pytest.mark.parametrize(
    "wrong",
    [
        "packager verfy .",
        "packager serve . --contxt native",
        "packager release",
        "hf downlod org/name",
        "hf download org/name --locl-dir x",
        "pip install 'moe-packager[serv]'",
        "make demonstration",
    ],
)
def test_a_command_that_its_tool_would_refuse_is_found(wrong: str) -> None:
    [words] = block_commands(f"```bash\n{wrong}\n```\n")
    with pytest.raises((AssertionError, click.ClickException, SystemExit)):
        parse(words)
