"""Somebody else's draft: what form it has, what is wrong with it, and what keeps it from being measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packager.checkpoint.source import CONFIG_NAME, Checkpoint, read_json_object
from packager.draft.forms import flat_config, form_of
from packager.draft.validator import validate_draft
from packager.errors import BadInput

_LOADED = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Qwen3ForCausalLM")
"""Architectures of EAGLE3 drafts that vLLM 0.32 serves beside this target (models/registry.py)."""


@dataclass(frozen=True)
class DraftFindings:
    """What the files of a draft say."""

    form: str
    """A form of `packager.draft.forms`, or `unreadable`."""
    problems: list[str]
    """All of them; most do not keep an engine from loading the draft."""
    obstacles: list[str]
    """Why it cannot be served here at all; empty: it can be tried."""


def look_at(draft: Path, target: Path) -> DraftFindings:
    """Check the files of `draft`, in any form, for the checkpoint in `target`.

    Raises:
        BadInput: `target` is no checkpoint, or `draft` no folder.
    """
    wanted = Checkpoint.open(target).config()
    if not draft.is_dir():
        raise BadInput(f"{draft} is not a folder", "Give the folder of a draft.")
    try:
        config = read_json_object(draft / CONFIG_NAME)
    except BadInput as err:
        return DraftFindings("unreadable", [err.message], [err.message])
    flat, obstacles = flat_config(config), []
    names: list[str] = []
    try:
        names = list(Checkpoint.open(draft).tensors)
    except BadInput as err:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in draft.glob(pattern))
        why = (
            f"its weights are pickled ({pickled[0]}), which is never opened here" if pickled else err.message
        )
        obstacles.append(why)
    architectures = flat.get("architectures") or []
    if not any(name in _LOADED for name in architectures):
        obstacles.append(f"vLLM has no draft class for {architectures}")
    for key in ("hidden_size", "vocab_size"):
        expected = flat.get("target_hidden_size", flat.get(key)) if key == "hidden_size" else flat.get(key)
        if isinstance(expected, int) and expected != wanted[key]:
            obstacles.append(f"it was made for a target with {key} {expected}; this one has {wanted[key]}")
    try:
        problems = validate_draft(draft, wanted)
    except BadInput as err:
        problems = [err.message]
    return DraftFindings(form_of(config, names), problems, obstacles)
