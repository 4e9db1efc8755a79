"""`serve.yaml` and the commands on the card: both come from the one function that builds engine commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from packager.recipe import Recipe
from packager.serving import ServeSpec, vllm_command

ENGINE_VERSIONS = ">=0.32,<0.33"
"""vLLM releases that the plugin of this package is tested with."""
HOST, PORT = "127.0.0.1", 8000


@dataclass(frozen=True)
class Profile:
    """How the bundle is served on one kind of hardware."""

    name: str
    device: Literal["cpu", "cuda"]
    tensor_parallel: int
    command: tuple[str, ...]
    """Run inside the bundle's directory."""

    @property
    def shell(self) -> str:
        """The command as one pastes it into a shell."""
        return shlex.join(self.command)


def served_name(recipe: Recipe) -> str:
    """The model name that clients give: the last part of the target, or the recipe's name."""
    return recipe.publish.target.rstrip("/").rsplit("/", 1)[-1] or recipe.name


def profiles(recipe: Recipe, *, draft: bool) -> list[Profile]:
    """The recipe's hardware first, then the other device for those who have that."""
    match = re.fullmatch(r"(\d+)x\w+", recipe.hardware)
    count = int(match[1]) if match else 1
    own: Literal["cpu", "cuda"] = "cpu" if recipe.hardware == "cpu" else "cuda"
    other: Literal["cpu", "cuda"] = "cuda" if own == "cpu" else "cpu"
    made = [_profile(recipe, recipe.hardware, own, count, draft)]
    if own == "cpu":
        made.append(_profile(recipe, "1xgpu", other, 1, draft))
    return made


def _profile(
    recipe: Recipe, name: str, device: Literal["cpu", "cuda"], tensor_parallel: int, draft: bool
) -> Profile:
    spec = ServeSpec(
        model=Path(),
        served_name=served_name(recipe),
        draft=Path("draft") if draft else None,
        num_speculative_tokens=recipe.draft.num_speculative_tokens,
        max_model_len=recipe.context.length,
        tensor_parallel=tensor_parallel,
    )
    command = vllm_command(spec, host=HOST, port=PORT, python="python", target=device)
    return Profile(name, device, tensor_parallel, tuple(command))


def serve_yaml(recipe: Recipe, *, draft: bool, trained_length: int | None = None) -> str:
    """The text of `serve.yaml`. `trained_length` in tokens, as the context stage found it."""
    made = profiles(recipe, draft=draft)
    document: dict[str, Any] = {
        "schema_version": 1,
        "engine": "vllm",
        "engine_versions": ENGINE_VERSIONS,
        "plugin": "moe-packager",
        "trust_remote_code": False,
        "served_name": served_name(recipe),
        "model": ".",
        "draft": "draft" if draft else None,
        "num_speculative_tokens": recipe.draft.num_speculative_tokens if draft else None,
        "max_model_len": recipe.context.length,
        **_contexts_section(recipe, trained_length),
        "default_profile": made[0].name,
        "profiles": {
            profile.name: {
                "device": profile.device,
                "tensor_parallel": profile.tensor_parallel,
                "args": list(profile.command),
            }
            for profile in made
        },
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


def _contexts_section(recipe: Recipe, trained_length: int | None) -> dict[str, Any]:
    """The context profiles; none where the trained length is not known.

    Static YaRN changes short contexts too, so those can be served as trained, from the same weights.
    """
    if trained_length is None:
        return {}
    return {
        "contexts": {
            "native": {"max_model_len": trained_length, "rotary": "trained"},
            "extended": {"max_model_len": recipe.context.length, "rotary": "extended"},
        },
        "default_context": "extended",
    }
