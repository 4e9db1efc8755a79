"""How other catalogues and engines take a bundle: an entry for vLLM's recipes, notes on SGLang and Ascend.

The entry follows github.com/vllm-project/recipes as of 2026-08 (CONTRIBUTING.md, "YAML schema", and
taxonomy.yaml): one file a model, `models/<org>/<name>.yaml`, from which the site builds commands. It says
`verified` of no hardware: that is for whoever has run it there.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from packager.bundle.containers import ENGINE_IMAGE
from packager.bundle.lock import Lock
from packager.bundle.plugin_wheel import WHEEL_PATH
from packager.bundle.serve_profiles import Profile
from packager.recipe import Recipe
from packager.serving import vllm_command
from packager.serving.engine import sglang_command, speculative_config

CATALOGUE_PATH = "deploy/vllm-recipe.yaml"
NOTES_PATH = "deploy/OTHER-ENGINES.md"
_CATALOGUE_HEADER = """\
# An entry for vLLM's recipes (github.com/vllm-project/recipes), as models/{repository}.yaml there.
# Before it is proposed: run `node scripts/build-recipes-api.mjs`, and write `verified` for what it ran on.
"""
_DATES = "# Both dates are the day of the pull request.\n"


def build_date() -> datetime.datetime | None:
    """The time that SOURCE_DATE_EPOCH states (reproducible-builds.org); None: nobody stated one."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not seconds.isdecimal():
        return None
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def catalogue_entry(recipe: Recipe, lock: Lock, profile: Profile, *, weight_bytes: int) -> str | None:
    """The entry's text; None: the release does not go to a repository of Hugging Face.

    vLLM reads no draft from a folder of a hub repository, so the draft's argument names the local copy that
    the entry has its reader download.
    """
    if not recipe.publish.target.startswith("hf://"):
        return None
    repository = recipe.publish.target.removeprefix("hf://")
    organisation, _, name = repository.rpartition("/")
    spec, day = profile.spec, build_date()
    parameters = lock.stages["fp8"].manifest.metrics.get("parameters") or {}
    date = day.date() if day else None
    # All that is neither the model, its address nor the draft, as the one function writes it.
    plain = vllm_command(replace(spec, draft=None, tensor_parallel=1), target="cuda")
    base = plain[plain.index("--port") + 2 :]
    drafting = speculative_config(replace(spec, draft=Path(name) / spec.draft)) if spec.draft else None
    download = ["hf", "download", repository, "--local-dir", name]
    if recipe.publish.tag:
        download[3:3] = ["--revision", recipe.publish.tag]
    document: dict[str, Any] = {
        "meta": {
            "title": recipe.bundle.title,
            "slug": name.lower(),
            "provider": organisation,
            "description": recipe.bundle.description or recipe.bundle.title,
            "date_added": date,
            "date_updated": date,
            "difficulty": "intermediate",
            "tasks": ["text"],
        },
        "model": {
            "model_id": repository,
            "min_vllm_version": ENGINE_IMAGE.rpartition(":v")[2],
            # The site's own container command has no place for the plugin; the guide says what has.
            "install": {"docker": False},
            "architecture": "moe",
            **_parameter_counts(parameters),
            "context_length": recipe.context.length,
            "base_args": base,
            "base_env": {},
        },
        "dependencies": [
            {
                "note": "The bundle: its plugin is installed, and its draft read, from the local copy",
                "command": shlex.join(download),
            },
            {
                "note": "The config without remote code, and the EAGLE3 interface",
                "command": f"uv pip install --no-deps {name}/{WHEEL_PATH}",
            },
        ],
        "features": _drafting_feature(drafting),
        "opt_in_features": ["spec_decoding"] if drafting else [],
        "variants": {
            "default": {
                "precision": recipe.quantize.weights.lower(),
                "vram_minimum_gb": math.ceil(weight_bytes * 1.2 / 1e9),
                "description": f"{_size(weight_bytes)} of weights, the draft among them",
            }
        },
        "compatible_strategies": ["single_node_tp"],
        "strategy_overrides": {"single_node_tp": {"tp": profile.tensor_parallel}},
        "guide": _guide(recipe, repository, name),
    }
    head = _CATALOGUE_HEADER.format(repository=repository) + ("" if date else _DATES)
    return head + yaml.dump(document, Dumper=_Literal, sort_keys=False, allow_unicode=True, width=110)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _drafting_feature(drafting: dict[str, Any] | None) -> dict[str, Any]:
    if drafting is None:
        return {}
    return {
        "spec_decoding": {
            "description": "The EAGLE3 draft in the bundle's draft/ folder, from the local copy",
            "args": ["--speculative-config", json.dumps(drafting)],
        }
    }


def _parameter_counts(parameters: dict[str, Any]) -> dict[str, str]:
    """In billions, as the catalogue has it; nothing where the quantization did not count them."""
    names = {"total": "parameter_count", "active": "active_parameters"}
    return {field: f"{parameters[key] / 1e9:.3g}B" for key, field in names.items() if parameters.get(key)}


def _guide(recipe: Recipe, repository: str, name: str) -> str:
    return (
        "## Overview\n\n"
        f"{' '.join((recipe.bundle.description or recipe.bundle.title).split())}\n\n"
        "No code from the repository is run: the plugin that vLLM needs is a wheel in it, which the\n"
        "publisher's signature covers. Its figures, measured and inherited, are on the model card.\n\n"
        "## Containers\n\n"
        f"With Docker, build the image with the plugin: `docker build -t {name.lower()} {name}/deploy`;\n"
        f"`{name}/deploy` also has a compose file and a Kubernetes manifest.\n\n"
        "## References\n\n"
        f"- [Model card](https://huggingface.co/{repository})\n"
    )


class _Literal(yaml.SafeDumper):
    """YAML that keeps text of several lines as lines."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Literal.add_representer(str, _text)


def other_engines(recipe: Recipe, profile: Profile) -> str:
    """The text of OTHER-ENGINES.md: SGLang's command and what differs there; what Ascend can and cannot load.

    Sources: SGLang's server_args 0.5.23 and its sglang.srt.plugins; vllm-ascend's support matrix and its pull
    requests 4036 and 5718, all read 2026-11 and none run by this package.
    """
    spec = profile.spec
    command = shlex.join(sglang_command(spec))
    differences = ["the engine does not take draft lengths by batch"] if profile.speculation else []
    if spec.speculation_max_context is not None:
        differences.append(f"it does not stop drafting at {spec.speculation_max_context} tokens")
    if recipe.draft.sliding_window is not None and spec.draft:
        window = recipe.draft.sliding_window
        differences.append(
            f"it does not read the draft's window: add `--speculative-draft-window-size {window}`"
        )
    if recipe.quantize.scheme == "fp8-block" and recipe.quantize.dialect == "compressed-tensors":
        differences.append(
            "a release that does not know block scales in compressed-tensors refuses the weights: "
            "`packager relabel . OUT --dialect deepseek` writes the same bytes under the other names"
        )
    lines = "".join(f"- {line[0].upper()}{line[1:]}.\n" for line in differences) or "- Nothing is known to.\n"
    return (
        f"# {' '.join(recipe.bundle.title.split())}: other engines\n\n"
        "Nothing below was measured: the evidence is of vLLM. It is what those engines' sources say.\n\n"
        "## SGLang\n\n"
        "SGLang has the model and its EAGLE3 interface, but not the configuration; without the plugin it\n"
        "would ask for remote code. In its environment, from the bundle's folder (options of 0.5.23):\n\n"
        f"```\npip install --no-deps --no-index {WHEEL_PATH}\n{command}\n```\n\n"
        "SGLang finds the plugin through the entry point group `sglang.srt.plugins`\n"
        "(https://docs.sglang.io/docs/hardware-platforms/plugin). What differs from vLLM:\n\n"
        f"{lines}\n"
        f"{_ascend(recipe)}"
    )


def _ascend(recipe: Recipe) -> str:
    matrix = "https://docs.vllm.ai/projects/ascend/en/latest/user_guide/support_matrix/supported_models.html"
    pulls = (
        "[4036](https://github.com/vllm-project/vllm-ascend/pull/4036), "
        "[5718](https://github.com/vllm-project/vllm-ascend/pull/5718)"
    )
    head = (
        f"## Ascend\n\nvllm-ascend's support matrix ({matrix})\n"
        "does not list this architecture; for A2 and A3 it lists BF16 and INT8 (W8A8).\n"
    )
    int8 = f"It loads compressed-tensors W8A8 of linear and expert layers ({pulls})"
    if recipe.quantize.scheme == "w8a8":
        return f"{head}{int8}, which is what this bundle holds.\n"
    return (
        f"{head}So these {recipe.quantize.weights} weights are not for those devices. {int8}:\n"
        "`packager quantize SOURCE OUT --scheme w8a8` makes such weights from the same source.\n"
    )
