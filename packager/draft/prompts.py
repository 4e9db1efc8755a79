"""Prompts for the target: read from chat files, and turned into token ids before an engine starts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packager.errors import BadInput

_REMEDY = (
    'Give JSONL, or one JSON array, of chats: {"messages": [{"role": "user", "content": …}]}, '
    '{"conversations": [{"from": "human", "value": …}]} or {"prompt": …}.'
)
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_NO_LIMIT = 10**9
"""Tokenizers without a length of their own state 10^30."""


def read_prompts_file(path: Path) -> list[dict[str, Any]]:
    """Prompts of a chat file. Raises as `read_prompts`, and BadInput where the file cannot be read."""
    try:
        with path.open(encoding="utf-8") as lines:
            return read_prompts(lines, str(path))
    except UnicodeDecodeError as err:
        raise BadInput(f"{path} is not UTF-8: {err}", _REMEDY) from None
    except OSError as err:
        raise BadInput(f"no prompts at {path}: {err.strerror}", _REMEDY) from None


def read_prompts(lines: Iterable[str], where: str) -> list[dict[str, Any]]:
    """Prompts from the lines of JSONL or of one JSON array; equal messages count once.

    A chat is `messages` (or `prompt`, if it is a list) of `role` and `content`, ShareGPT's `conversations` of
    `from` and `value`, or a text `prompt`. It may have an `id`, a `task` (or `domain`) and a `language`.
    Answers at its end are left out: the target answers anew. The id of a chat without one is a hash of its
    messages, so that it falls on the same side of the split wherever it comes from.

    Returns:
        Mappings with `id`, `messages` (role and content), `task`, `language`.

    Raises:
        BadInput: a chat that is not JSON, has no messages, an unknown role or nobody who asks; or no chat.
    """
    found: dict[str, dict[str, Any]] = {}
    for place, raw in _chats(lines, where):
        messages = _messages(raw, place)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not any(message["role"] == "user" for message in messages) or messages[-1]["role"] == "system":
            raise BadInput(f"{place}: nobody asks anything", _REMEDY)
        key = json.dumps(messages, sort_keys=True, ensure_ascii=False)
        found.setdefault(
            key,
            {
                "id": str(raw.get("id", hashlib.sha256(key.encode()).hexdigest()[:16])),
                "messages": messages,
                "task": str(raw.get("task", raw.get("domain", "general"))),
                "language": str(raw.get("language", "unknown")),
            },
        )
    if not found:
        raise BadInput(f"{where} holds no prompts", _REMEDY)
    return list(found.values())


def _chats(lines: Iterable[str], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every chat with its place in the file."""
    rest = iter(lines)
    for number, line in enumerate(rest, 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            yield from _array("".join((line, *rest)), where)
            return
        place = f"{where}, line {number}"
        try:
            raw = json.loads(line)
        except ValueError as err:
            raise BadInput(f"{place} is not JSON: {err}", _REMEDY) from None
        if not isinstance(raw, dict):
            raise BadInput(f"{place} has no `messages`: it is no object", _REMEDY)
        yield place, raw


def _array(text: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        chats = json.loads(text)
    except ValueError as err:
        raise BadInput(f"{where} is not a JSON array: {err}", _REMEDY) from None
    for number, raw in enumerate(chats, 1):
        place = f"{where}, chat {number}"
        if not isinstance(raw, dict):
            raise BadInput(f"{place} has no `messages`: it is no object", _REMEDY)
        yield place, raw


def _messages(raw: Mapping[str, Any], place: str) -> list[dict[str, str]]:
    """The messages of a chat in any of the forms, as role and content."""
    prompt = raw.get("prompt")
    if "messages" not in raw and isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if "messages" not in raw and "conversations" in raw:
        turns, role, content = raw["conversations"], "from", "value"
    else:
        turns, role, content = raw.get("messages", prompt), "role", "content"
    if not isinstance(turns, list) or not turns:
        raise BadInput(f"{place} has no `messages` of role and content", _REMEDY)
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in (role, content)):
            raise BadInput(f"{place} has no `messages` of {role} and {content}, both texts", _REMEDY)
        name = _SHAREGPT.get(turn[role], turn[role]) if role == "from" else turn[role]
        if name not in ROLES:  # a chat template passes over a role that it does not know without a word
            raise BadInput(f"{place}: the role {name!r} is none of {', '.join(ROLES)}", _REMEDY)
        messages.append({"role": name, "content": turn[content]})
    return messages


@dataclass(frozen=True)
class Tokenized:
    """Prompts as the target is given them."""

    prompts: list[dict[str, Any]]
    """The prompts that leave room for a response, each with its `prompt_ids`."""
    too_long: list[int]
    """Tokens of each prompt that does not."""


def context_length(target: Path, config: Mapping[str, Any], engine: Mapping[str, Any]) -> int:
    """Tokens that the engine serves: the least of its own setting, the model's and the tokenizer's length."""
    lengths = [config["max_position_embeddings"], engine.get("max_model_len")]
    side = target / "tokenizer_config.json"
    if side.exists():
        lengths.append(json.loads(side.read_text(encoding="utf-8")).get("model_max_length"))
    return min(length for length in lengths if isinstance(length, int) and 0 < length < _NO_LIMIT)


def tokenize(
    prompts: Sequence[Mapping[str, Any]], target: Path, *, length: int, vocabulary: int
) -> Tokenized:
    """Apply the target's chat template and tokenizer to `prompts`.

    Raises:
        BadInput: no tokenizer or chat template, a template that fails on a chat or drops what is asked, a
        token beyond the target's `vocabulary`, or no prompt that leaves room for two tokens within `length`.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    from packager.bailing.hf_config import register

    register()
    # It says of every longer prompt that it is longer; here that is said once, for all.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    remedy = "Give a chat checkpoint with its tokenizer and chat_template."
    try:
        tokenizer = AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError, KeyError) as err:
        raise BadInput(f"{target} has no tokenizer that can be read: {err}", remedy) from None
    if not tokenizer.chat_template:
        raise BadInput(f"the tokenizer of {target} has no chat template", remedy)
    kept: list[dict[str, Any]] = []
    too_long: list[int] = []
    for prompt in prompts:
        try:
            text = tokenizer.apply_chat_template(
                prompt["messages"], add_generation_prompt=True, tokenize=False
            )
        except (TemplateError, TypeError, ValueError) as err:
            raise BadInput(f"the chat template of {target} fails on prompt {prompt['id']}: {err}") from None
        if (asked := prompt["messages"][-1]["content"].strip()) and asked not in text:
            raise BadInput(
                f"the chat template of {target} drops what prompt {prompt['id']} asks",
                "Its template does not fit these roles: give a chat checkpoint, or other chats.",
            )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if (highest := max(ids)) >= vocabulary:
            raise BadInput(
                f"prompt {prompt['id']} has token {highest}, beyond the target's vocabulary of {vocabulary}",
                "The tokenizer is another model's: give the checkpoint its own.",
            )
        if length - len(ids) < 2:  # a response of one token has nothing to draft
            too_long.append(len(ids))
        else:
            kept.append({**prompt, "prompt_ids": ids})
    if not kept:
        raise BadInput(
            f"no prompt leaves room for a response: the shortest has {min(too_long)} tokens, the target "
            f"serves {length}",
            "Give shorter prompts, or extend the target's context.",
        )
    return Tokenized(kept, too_long)
