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
from packager.serving.needs import Needs, needs_on_cpu, needs_on_gpus, smallest_card
from packager.serving.plan import COUNTS, ModelBytes, fit, held_precision, model_bytes, split_problem
from validation.errors import MeasurementError
from validation.hardware import Hardware, parse_hardware

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
    needs: Needs | None = None
    """None: the model's sizes are not known."""

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


@dataclass(frozen=True)
class ServedBytes:
    """What is served, in bytes of the precision that it is stored in, and of BF16."""

    stored: ModelBytes
    dequantized: int | None
    """Of the target's weights in BF16; None: they are stored so."""


def served_bytes(model: Path, draft: Path | None) -> ServedBytes:
    """Bytes of a checkpoint and its draft, by the shards' headers, as `packager plan` counts them.

    Raises:
        BadInput: the architecture is not one that is known here.
    """
    from packager.checkpoint.source import CONFIG_NAME, read_json_object
    from packager.layouts import Described

    config = Described.parse(read_json_object(model / CONFIG_NAME), str(model / CONFIG_NAME))
    precision = held_precision(config)
    stored = model_bytes(config, precision, directory=model, draft=draft)
    return ServedBytes(stored, None if precision == "bf16" else model_bytes(config, "bf16").weights)


def profiles(
    recipe: Recipe,
    *,
    draft: bool,
    measured: tuple[SpeculationRange, ...] = (),
    served: ServedBytes | None = None,
) -> list[Profile]:
    """The recipe's hardware first, then what else it can be served on.

    `measured` is what the evidence found to be the fastest draft length by batch. It holds for the hardware
    it was measured on, which is the recipe's, and the recipe's own `serve.speculation` comes before it.

    With `served`, each says what it needs; and a release for GPUs names the other numbers of them that the
    model can be split over and fits: of the recipe's card, else of the smallest known one that holds it.
    """
    match = re.fullmatch(r"(\d+)x\w+", recipe.hardware)
    count = int(match[1]) if match else 1
    if recipe.hardware == "cpu":
        return [
            _profile(recipe, "cpu", "cpu", 1, draft, measured, served),
            _profile(recipe, "1xgpu", "cuda", 1, draft, (), served),
        ]
    made = [_profile(recipe, recipe.hardware, "cuda", count, draft, measured, served)]
    for other in _others(recipe, count, served):
        made.append(_profile(recipe, other.label, "cuda", other.count, draft, (), served))
    return made


def _others(recipe: Recipe, own: int, served: ServedBytes | None) -> list[Hardware]:
    """Other numbers of cards that hold the model with one request of the whole context."""
    try:
        cards = parse_hardware(recipe.hardware)
    except MeasurementError:  # hardware of a kind that cards.yaml does not know
        return []
    if served is None:
        return []
    found = []
    for ways in COUNTS:
        model = served.stored
        if ways == own or split_problem(model.layout, ways, model.precision) is not None:
            continue
        same = cards.with_count(ways)
        fits = fit(model, same, recipe.context.length).problem is None
        least = same if fits else smallest_card(needs_on_gpus(model, ways), recipe.context.length)
        if least is not None:
            found.append(least)
    return found


def _profile(
    recipe: Recipe,
    name: str,
    device: Literal["cpu", "cuda"],
    tensor_parallel: int,
    draft: bool,
    measured: tuple[SpeculationRange, ...],
    served: ServedBytes | None,
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
    needs = None
    if served is not None and device == "cuda":
        needs = needs_on_gpus(served.stored, tensor_parallel)
    elif served is not None:
        needs = needs_on_cpu(served.stored, served.dequantized)
    return Profile(name, device, tensor_parallel, ranges, tuple(command), spec, needs)


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
    served: ServedBytes | None = None,
) -> str:
    """The text of `serve.yaml`; `measured` and `served` as in `profiles`, `trained_length` in tokens, as the
    context stage found it; `claim`: how far the evidence bears the context out."""
    made = profiles(recipe, draft=draft, measured=measured, served=served)
    contexts = _contexts_section(recipe, trained_length)
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
        **contexts,
        **_measured_section(claim),
        "default_profile": made[0].name,
        "profiles": {
            profile.name: {
                "device": profile.device,
                "tensor_parallel": profile.tensor_parallel,
                **_speculation(recipe, profile, draft),
                **_needs_section(recipe, profile, contexts.get("contexts")),
                "args": list(profile.command),
            }
            for profile in made
        },
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)


def _needs_section(
    recipe: Recipe, profile: Profile, contexts: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, Any]:
    """Memory that a profile takes, and in all for each context: of each GPU, or of main memory, where weights
    may have to be dequantized."""
    if profile.needs is None:
        return {}
    lengths = {name: one["max_model_len"] for name, one in (contexts or {}).items()}
    return {
        "needs": {
            **profile.needs.model_dump(exclude_none=True),
            "memory_bytes": {
                name: profile.needs.memory(length, dequantized=True)
                for name, length in (lengths or {"extended": recipe.context.length}).items()
            },
        }
    }


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

    Static YaRN changes short contexts too, so those can be served as trained, from the same weights. The
    profiles' arguments are those of `extended`; as trained takes a config of its own, which `packager serve`
    makes.
    """
    if trained_length is None:
        return {}
    return {
        "contexts": {
            "native": {
                "max_model_len": trained_length,
                "rotary": "trained",
                "serve": "packager serve . --context native",
            },
            "extended": {
                "max_model_len": recipe.context.length,
                "rotary": "extended",
                "serve": "packager serve . --context extended",
            },
        },
        "default_context": "extended",
    }
