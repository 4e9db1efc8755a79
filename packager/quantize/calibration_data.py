"""Calibration text: JSONL of the user's, through the checkpoint's chat template, into token ids."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_KINDS = ("messages", "prompt", "text")
_REMEDY = (
    'Give one JSON object a line: {"messages": [{"role": …, "content": …}, …]}, {"prompt": …} or {"text": …}.'
)


@dataclass(frozen=True)
class Line:
    """One line of a calibration file."""

    number: int
    messages: tuple[dict[str, Any], ...]
    """A chat; empty: `text` is used as it is."""
    text: str = ""


def read_lines(path: Path) -> list[Line]:
    """All lines of a JSONL file; empty ones are skipped.

    A line has `messages` (a chat), `prompt` (the same as a chat of one user message) or `text` (taken as it
    is, without the chat template); other keys are ignored.

    Raises:
        BadInput: no such file, or a line, named by its number, that is none of these; or no line at all.
    """
    try:
        content = path.read_bytes()
    except OSError as err:
        raise BadInput(f"cannot read {path}: {err.strerror}", _REMEDY) from None
    found = []
    for number, raw in enumerate(content.split(b"\n"), 1):
        if raw.strip():
            try:
                found.append(_line(number, raw))
            except ValueError as err:
                raise BadInput(f"{path}, line {number}: {err}", _REMEDY) from None
    if not found:
        raise BadInput(f"{path} has no lines", _REMEDY)
    return found


def _line(number: int, raw: bytes) -> Line:
    try:
        value = json.loads(raw)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as err:
        raise ValueError(f"not JSON: {err}") from None
    kinds = [kind for kind in _KINDS if kind in value] if isinstance(value, dict) else []
    if len(kinds) != 1:
        raise ValueError(f"needs exactly one of {', '.join(_KINDS)}; it has {' and '.join(kinds) or 'none'}")
    found = value[kinds[0]]
    if kinds[0] == "messages":
        if not isinstance(found, list) or not found or not all(map(_is_message, found)):
            raise ValueError("`messages` is no list of objects with the strings `role` and `content`")
        return Line(number, tuple(found))
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"`{kinds[0]}` is no text")
    if kinds[0] == "prompt":
        return Line(number, ({"role": "user", "content": found},))
    return Line(number, (), found)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def choose(lines: list[Line], samples: int, seed: int) -> list[Line]:
    """At most `samples` lines, drawn by `seed`, in the order of the file."""
    if len(lines) <= samples:
        return lines
    return [lines[index] for index in sorted(random.Random(seed).sample(range(len(lines)), samples))]


def tokenize(
    lines: list[Line], tokenizer: PreTrainedTokenizerFast, sequence_length: int, origin: str
) -> list[list[int]]:
    """Token ids of each line, its first `sequence_length`.

    A chat that does not end with the assistant gets the template's prompt for an answer.

    Raises:
        BadInput: the tokenizer has no chat template, or the template refuses a line, or nothing is left of
            one; with the line's number.
    """
    found = []
    for line in lines:
        try:
            ids = _ids(line, tokenizer)
        except Exception as err:  # whatever a checkpoint's own template raises
            raise BadInput(
                f"{origin}, line {line.number}: the chat template does not take it: {err}",
                "Correct the line, or give `text`, which passes by the chat template.",
            ) from None
        if not ids:
            raise BadInput(f"{origin}, line {line.number}: no token is left of it", _REMEDY)
        found.append(ids[:sequence_length])
    return found


def _ids(line: Line, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    if not line.messages:
        return list(tokenizer(line.text)["input_ids"])
    return list(
        tokenizer.apply_chat_template(
            list(line.messages),
            add_generation_prompt=line.messages[-1]["role"] != "assistant",
            tokenize=True,
            return_dict=False,
        )
    )
