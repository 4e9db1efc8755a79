"""What a directory says about how it wants to be served: a bundle's serve.yaml, or a plain checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from packager.checkpoint.source import CONFIG_NAME, read_json_object
from packager.errors import BadInput, UsageProblem
from packager.recipe import SpeculationRange, check_speculation
from packager.serving.cpu import Device, device
from packager.serving.engine import ServeSpec
from packager.serving.needs import Needs

SERVE_NAME = "serve.yaml"


class Profile(BaseModel):
    """Settings for one kind of hardware. Its ready-made command line is for people: ours is built anew."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    device: Device
    tensor_parallel: int = Field(default=1, ge=1)
    speculation: tuple[SpeculationRange, ...] = ()
    """Draft tokens by number of requests; without it `num_speculative_tokens` for any number."""
    speculation_max_context: int | None = Field(default=None, gt=0)
    needs: Needs | None = None
    """None: the file says nothing of it, as those of older releases."""

    @model_validator(mode="after")
    def _ascending(self) -> Profile:
        check_speculation(self.speculation)
        return self


class ContextProfile(BaseModel):
    """A length that the bundle is served at, and with which rotary embedding."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    max_model_len: int = Field(gt=0)
    rotary: Literal["trained", "extended"]
    """`extended`: the bundle's files as they are. `trained`: as before the context was extended, from the
    same weights; see `packager.context.trained_view`."""


class ContextMeasured(BaseModel):
    """How far the evidence bears the extended context out."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    tokens: int | None = Field(default=None, ge=0)
    """Records up to here were read rightly; None: no length was."""
    min_accuracy: float | None = None


class ServeFile(BaseModel):
    """serve.yaml of a bundle, as far as serving needs it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = Field(ge=1, le=1)
    engine: str
    engine_versions: str
    served_name: str = "model"
    model: str
    draft: str | None = None
    num_speculative_tokens: int | None = Field(default=None, ge=1)
    max_model_len: int | None = Field(default=None, gt=0)
    contexts: dict[str, ContextProfile] = {}
    default_context: str | None = None
    context_measured: ContextMeasured | None = None
    default_profile: str
    profiles: dict[str, Profile]

    @model_validator(mode="after")
    def _has_its_default(self) -> ServeFile:
        if self.contexts and self.default_context not in self.contexts:
            raise ValueError(
                f"default_context {self.default_context!r} is none of {', '.join(self.contexts)}"
            )
        return self


def read_serve_file(path: Path) -> ServeFile:
    """Read a bundle's serve.yaml. Raises BadInput: not YAML, a key missing or wrong, a path that escapes."""
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = ServeFile.model_validate(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise BadInput(f"cannot read {path}: {err}") from None
    except ValidationError as err:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in err.errors()]
        raise BadInput(f"{path} is not a serve file:\n" + "\n".join(lines)) from None
    if found.engine != "vllm":
        raise BadInput(f"{path} asks for the engine {found.engine!r}; only vllm is known here")
    for part in (found.model, found.draft):
        if part is not None and not (path.parent / part).resolve().is_relative_to(path.parent.resolve()):
            raise BadInput(f"{path} names {part!r}, which lies outside the bundle")
    return found


def spec_for(
    directory: Path,
    *,
    profile: str | None = None,
    with_draft: bool = True,
    target: Device | None = None,
) -> ServeSpec:
    """How `directory` is served on `target`; None: on this machine.

    A bundle's default profile is taken if it is for that device, else the first that is; whether it fits,
    `packager.serving.choose` says.

    Raises:
        BadInput: neither a bundle nor a checkpoint.
        UsageProblem: a profile that the bundle does not have.
    """
    path = directory / SERVE_NAME
    if not path.is_file():
        if not (directory / CONFIG_NAME).is_file():
            raise BadInput(
                f"{directory} holds neither {SERVE_NAME} nor {CONFIG_NAME}",
                "Give the folder of a bundle or of a checkpoint.",
            )
        if profile is not None:
            raise UsageProblem(
                f"{directory} is a plain checkpoint: it has no profiles", "Leave out --profile."
            )
        return ServeSpec(model=directory)
    found = read_serve_file(path)
    kind = target or device()
    chosen = found.profiles[_profile_name(found, profile, path, kind)]
    return ServeSpec(
        model=directory / found.model,
        served_name=found.served_name,
        draft=directory / found.draft if found.draft and with_draft else None,
        num_speculative_tokens=found.num_speculative_tokens or ServeSpec.num_speculative_tokens,
        speculation=chosen.speculation,
        speculation_max_context=chosen.speculation_max_context,
        max_model_len=found.max_model_len,
        tensor_parallel=chosen.tensor_parallel if kind == "cuda" else 1,
    )


@dataclass(frozen=True)
class Context:
    """What is served of the lengths that a directory allows."""

    name: str | None
    """Of the bundle's profile; None: the directory has no profiles."""
    max_model_len: int | None
    """Tokens; None: what the checkpoint says."""
    trained_rotary: bool = False
    """Whether the files must first be brought back to what they were before the context was extended."""


def context_for(directory: Path, wanted: str | None = None) -> Context:
    """The length and rotary embedding for `wanted`: a context profile's name, a number of tokens, or None.

    A number takes the shortest profile that holds it, since static YaRN costs short contexts accuracy. None
    is the bundle's default.

    Raises:
        UsageProblem: neither a number nor a profile of this bundle, or more tokens than it reaches.
        BadInput: see `read_serve_file`.
    """
    path = directory / SERVE_NAME
    contexts: dict[str, ContextProfile] = {}
    name: str | None = None
    if path.is_file():
        found = read_serve_file(path)
        contexts, name = found.contexts, found.default_context
    tokens = int(wanted) if wanted is not None and wanted.isdecimal() else None
    if not contexts:
        if wanted is None or tokens:
            return Context(None, tokens)
        raise UsageProblem(
            f"{directory} has no context profile {wanted!r}", "Give a number of tokens, or leave it out."
        )
    if tokens:
        fitting = [one for one, profile in contexts.items() if profile.max_model_len >= tokens]
        if not fitting:
            longest = max(profile.max_model_len for profile in contexts.values())
            raise UsageProblem(f"{directory} reaches {longest} tokens, not {tokens}", "Ask for fewer.")
        name = min(fitting, key=lambda one: contexts[one].max_model_len)
    elif wanted is not None:
        if wanted not in contexts:
            raise UsageProblem(
                f"{path} has no context profile {wanted!r}", f"It has: {', '.join(contexts)}; or give tokens."
            )
        name = wanted
    assert name is not None
    chosen = contexts[name]
    return Context(name, tokens or chosen.max_model_len, chosen.rotary == "trained")


def _profile_name(found: ServeFile, wanted: str | None, path: Path, kind: Device) -> str:
    if wanted is not None or found.default_profile not in found.profiles:
        if wanted in found.profiles:
            return str(wanted)
        raise UsageProblem(
            f"{path} has no profile {wanted or found.default_profile!r}",
            f"It has: {', '.join(found.profiles)}.",
        )
    if found.profiles[found.default_profile].device == kind:
        return found.default_profile
    return next((name for name, one in found.profiles.items() if one.device == kind), found.default_profile)


def is_fp8(model: Path) -> bool:
    """Whether a checkpoint's weights are quantized to FP8, by its config."""
    quantization = read_json_object(model / CONFIG_NAME).get("quantization_config")
    if not isinstance(quantization, dict):
        return False
    return quantization.get("quant_method") == "fp8" or quantization.get("format") == "float-quantized"
