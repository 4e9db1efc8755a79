"""`serve.yaml` and the commands on the card: both come from the one function that builds engine commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from packager.recipe import Recipe, SpeculationRange
from packager.serving import ServeSpec, vllm_command

if TYPE_CHECKING:
    from validation.longcontext import ContextClaim

ENGINE_VERSIONS = ">=0.32,<0.33"
"""vLLM releases that the plugin of this package is tested with."""
HOST, PORT = "127.0.0.1", 8000


@dataclass(frozen=True)
class Profile:
    """How the bundle is served on one kind of hardware."""

    name: str
    device: Literal["cpu", "cuda"]
    tensor_parallel: int
    speculation: tuple[SpeculationRange, ...]
    """Draft tokens by number of requests; empty: the same for any number."""
    command: tuple[str, ...]
    """Run inside the bundle's directory."""
    spec: ServeSpec
    """What `command` was made from."""

    @property
    def shell(self) -> str:
        """The command as one pastes it into a shell."""
        return shlex.join(self.command)


def served_name(recipe: Recipe) -> str:
    """The model name that clients give: the last part of the target, or the recipe's name."""
    return recipe.publish.target.rstrip("/").rsplit("/", 1)[-1] or recipe.name


def measured_speculation(evidence: Mapping[str, Any]) -> tuple[SpeculationRange, ...]:
    """The draft length by batch that the evidence (its manifest's metrics) found fastest; () if it says
    none."""
    return tuple(SpeculationRange.model_validate(one) for one in evidence.get("speculation") or ())


def profiles(recipe: Recipe, *, draft: bool, measured: tuple[SpeculationRange, ...] = ()) -> list[Profile]:
    """The recipe's hardware first, then the other device for those who have that.

    `measured` is what the evidence found to be the fastest draft length by batch. It holds for the hardware
    it was measured on, which is the recipe's, and the recipe's own `serve.speculation` comes before it.
    """
    match = re.fullmatch(r"(\d+)x\w+", recipe.hardware)
    count = int(match[1]) if match else 1
    own: Literal["cpu", "cuda"] = "cpu" if recipe.hardware == "cpu" else "cuda"
    other: Literal["cpu", "cuda"] = "cuda" if own == "cpu" else "cpu"
    made = [_profile(recipe, recipe.hardware, own, count, draft, measured)]
    if own == "cpu":
        made.append(_profile(recipe, "1xgpu", other, 1, draft, ()))
    return made


def _profile(
    recipe: Recipe,
    name: str,
    device: Literal["cpu", "cuda"],
    tensor_parallel: int,
    draft: bool,
    measured: tuple[SpeculationRange, ...],
) -> Profile:
    spec = ServeSpec(
        model=Path(),
        served_name=served_name(recipe),
        draft=Path("draft") if draft else None,
        num_speculative_tokens=recipe.draft.num_speculative_tokens,
        speculation=recipe.serve.speculation or measured,
        speculation_max_context=recipe.serve.speculation_max_context,
        max_model_len=recipe.context.length,
        tensor_parallel=tensor_parallel,
    )
    ranges = spec.speculation if draft else ()
    command = vllm_command(spec, host=HOST, port=PORT, python="python", target=device)
    return Profile(name, device, tensor_parallel, ranges, tuple(command), spec)


def _speculation(recipe: Recipe, profile: Profile, draft: bool) -> dict[str, Any]:
    """The profile's settings that say when not to draft; only those that there are."""
    found: dict[str, Any] = {}
    if profile.speculation:
        found["speculation"] = [one.model_dump(exclude_none=True) for one in profile.speculation]
    if draft and recipe.serve.speculation_max_context is not None:
        found["speculation_max_context"] = recipe.serve.speculation_max_context
    return found


def serve_yaml(
    recipe: Recipe,
    *,
    draft: bool,
    measured: tuple[SpeculationRange, ...] = (),
    trained_length: int | None = None,
    claim: ContextClaim | None = None,
) -> str:
    """The text of `serve.yaml`; `measured` as in `profiles`, `trained_length` in tokens, as the context
    stage found it; `claim`: how far the evidence bears the context out."""
    made = profiles(recipe, draft=draft, measured=measured)
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
        **_measured_section(claim),
        "default_profile": made[0].name,
        "profiles": {
            profile.name: {
                "device": profile.device,
                "tensor_parallel": profile.tensor_parallel,
                **_speculation(recipe, profile, draft),
                "args": list(profile.command),
            }
            for profile in made
        },
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


def _measured_section(claim: ContextClaim | None) -> dict[str, Any]:
    """How far records were read rightly: beyond `tokens` the context served is not borne out."""
    if claim is None:
        return {}
    return {
        "context_measured": {
            "tokens": claim.held,
            "longest_record_read": claim.measured,
            "min_accuracy": claim.min_accuracy,
        }
    }


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
