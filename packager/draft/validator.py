"""What is wrong with a draft checkpoint, ours or somebody else's, before an engine finds out or does not.

Published drafts of this model line carried token ids beyond the vocabulary, no `rope_theta`, a horizon
shorter than the target's, and their optimizer state; engines load all of these without a word. Runs without
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packager.checkpoint.header import TensorInfo
from packager.checkpoint.source import Checkpoint, read_json_object
from packager.draft.config import ARCHITECTURE, TOKEN_IDS, rope_of, tensor_shapes, window_of
from packager.draft.forms import Form, flat_config, form_of, is_speculators, our_name
from packager.errors import BadInput
from packager.layouts import FLOATS

_ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM")
_VLLM_ONLY = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
_LEFTOVERS = ("training_state*", "optimizer*", "scheduler*", "rng_state*", "*.pt", "*.pth", "*.bin", "*.pkl")
_NEEDED = (
    "vocab_size",
    "draft_vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
)


def validate_draft(draft_dir: Path, target_config: Mapping[str, Any]) -> list[str]:
    """Every problem of the draft in `draft_dir` for a target with config.json `target_config`; [] if none.

    Takes every form of `packager.draft.forms`. Checks configuration (architecture, sizes, token ids, rotary
    embedding, horizon, aux layers of both engines, options that SGLang lacks), tensors (names, shapes,
    dtypes), the vocabulary map (range, injectivity, `t2d` agreeing with `d2t`) and left-over files.

    Raises:
        BadInput: no config.json, or weights that are missing or unsound as files.
    """
    raw = read_json_object(draft_dir / "config.json")
    config = flat_config(raw)
    problems = _speculators_problems(raw) if is_speculators(raw) else []
    problems += _config_problems(config, target_config, portable=not is_speculators(raw))
    problems += _leftovers(draft_dir)
    missing = [name for name in _NEEDED if not isinstance(config.get(name), int)]
    if missing:
        return [*problems, f"config.json has no {', '.join(missing)}"]
    checkpoint = Checkpoint.open(draft_dir)
    return problems + _tensor_problems(checkpoint, _with_aux(config), form_of(raw, checkpoint.tensors))


def _speculators_problems(config: Mapping[str, Any]) -> list[str]:
    """What vLLM's reader of the speculators form needs beside the layer's config."""
    problems = []
    kind = config["speculators_model_type"]
    if kind != "eagle3":
        problems.append(f"speculators_model_type is {kind}, not eagle3")
    stated = config.get("speculators_config") or {}
    methods = stated.get("proposal_methods") or [{}]
    if not methods[0].get("speculative_tokens"):
        problems.append("speculators_config names no speculative_tokens")
    if not (stated.get("verifier") or {}).get("name_or_path"):
        problems.append("speculators_config names no verifier: `vllm serve DRAFT` would not find the target")
    if "norm_before_residual" not in config:
        problems.append(
            "norm_before_residual is left out: vLLM takes it as on, the speculators library as off"
        )
    return problems


def _with_aux(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with aux ids at the top level, as vLLM resolves them."""
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    ids = config.get("eagle_aux_hidden_state_layer_ids") or nested or [0, 0, 0]
    return {**config, "eagle_aux_hidden_state_layer_ids": ids}


def _leftovers(draft_dir: Path) -> list[str]:
    found = sorted({path.name for pattern in _LEFTOVERS for path in draft_dir.glob(pattern)})
    return [f"{name} does not belong into a published draft" for name in found]


def _config_problems(config: Mapping[str, Any], target: Mapping[str, Any], *, portable: bool) -> list[str]:
    """Problems of a flat config; `portable`: SGLang is to load it too."""
    problems: list[str] = []
    architectures = config.get("architectures") or []
    if not any(name in _ARCHITECTURES for name in architectures):
        problems.append(f"architectures {architectures} is not one of {', '.join(_ARCHITECTURES)}")
    if config.get("num_hidden_layers") != 1:
        problems.append(
            f"num_hidden_layers is {config.get('num_hidden_layers')}, a portable EAGLE3 draft has 1"
        )
    for key in ("vocab_size", "hidden_size"):
        if config.get(key) != target[key]:
            problems.append(f"{key} is {config.get(key)}, the target's is {target[key]}")
    size = config.get("draft_vocab_size")
    if isinstance(size, int) and not 0 < size <= target["vocab_size"]:
        problems.append(
            f"draft_vocab_size {size} is not within the target's vocabulary of {target['vocab_size']}"
        )
    for key in TOKEN_IDS:
        problems += _token_problems(key, config.get(key), target)
    problems += _rope_problems(config, target)
    problems += _aux_problems(config, target, portable)
    if window_of(config) is None and (
        config.get("sliding_window") or "sliding_attention" in (config.get("layer_types") or [])
    ):
        problems.append(
            f"sliding_window {config.get('sliding_window')} with layer_types {config.get('layer_types')}: "
            "vLLM has the window only with both of them, and would attend to everything"
        )
    if not portable:
        return problems
    nested = config.get("eagle_config") or {}
    for key in _VLLM_ONLY:
        if config.get(key) or nested.get(key):
            problems.append(f"{key} is on: SGLang does not know it and would compute something else")
    return problems


def _token_problems(key: str, value: Any, target: Mapping[str, Any]) -> list[str]:
    problems = []
    for token in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(token, int) or not 0 <= token < target["vocab_size"]:
            problems.append(f"{key} {token} is beyond the target's vocabulary of {target['vocab_size']}")
    if not problems and value is not None and target.get(key) is not None and value != target[key]:
        problems.append(f"{key} is {value}, the target's is {target[key]}")
    return problems


def _rope_problems(config: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    problems = []
    ours, theirs = rope_of(config), rope_of(target)
    if ours["rope_theta"] is None:
        problems.append("no rope_theta: engines fall back to 10000")
    places = (config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {})
    thetas = sorted({place["rope_theta"] for place in places if place.get("rope_theta") is not None})
    if len(thetas) > 1:
        problems.append(f"rope_theta is given twice, differently ({thetas}); which one counts is up to luck")
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key) and not (key == "rope_theta" and ours[key] is None):
            problems.append(f"rope {key} is {ours.get(key)}, the target's is {theirs.get(key)}")
    if config.get("rope_parameters") and config.get("rope_scaling"):
        old = rope_of({"rope_scaling": config["rope_scaling"], "rope_theta": ours["rope_theta"]})
        if old != ours:
            problems.append(
                "rope_scaling and rope_parameters contradict each other; which one counts is up to luck"
            )
    scaling = config.get("rope_scaling") or {}
    kinds = {str(scaling[name]) for name in ("type", "rope_type") if scaling.get(name)}
    if len(kinds) > 1:
        problems.append(f"rope_scaling has two types: {', '.join(sorted(kinds))}")
    horizon = config.get("max_position_embeddings")
    if not isinstance(horizon, int) or horizon < target["max_position_embeddings"]:
        problems.append(
            f"max_position_embeddings is {horizon}, the target reaches {target['max_position_embeddings']}"
        )
    return problems


def _aux_problems(config: Mapping[str, Any], target: Mapping[str, Any], portable: bool) -> list[str]:
    layers = target["num_hidden_layers"]
    top = config.get("eagle_aux_hidden_state_layer_ids")
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if not top and not nested:
        return [f"no aux layer ids: engines fall back to 2, {layers // 2}, {layers - 3}"]
    problems = []
    for name, ids, low, high in (
        ("aux layer ids", top, 0, layers),
        ("eagle_config's aux ids", nested, -1, layers - 1),
    ):
        if ids and (list(ids) != sorted(set(ids)) or ids[0] < low or ids[-1] > high):
            problems.append(f"{name} {ids} are not ascending layers of a target with {layers}")
    if top and nested and [layer + 1 for layer in nested] != list(top):
        problems.append(
            f"aux layer ids {top} for vLLM and {nested} (plus one) for SGLang are different layers"
        )
    if (not top or not nested) and portable:
        lacking, reader = (
            ("eagle_config", "SGLang") if not nested else ("the top level", "vLLM, which adds nothing,")
        )
        problems.append(f"aux layer ids are missing from {lacking}: {reader} would read other layers")
    return problems


def _tensor_problems(checkpoint: Checkpoint, config: Mapping[str, Any], form: Form) -> list[str]:
    problems: list[str] = []
    if form == "layers":
        problems.append("tensors are named layers.0.*: older SGLang knows midlayer.* only")
    tensors = {our_name(name, form): info for name, info in checkpoint.tensors.items()}
    expected = tensor_shapes(config)
    optional: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config["vocab_size"], config["hidden_size"])
    }
    if config["draft_vocab_size"] == config["vocab_size"]:
        optional |= {name: expected.pop(name) for name in ("d2t", "t2d")}
    if form == "speculators":  # the library keeps the target's own beside the draft's
        optional |= {
            "verifier_norm.weight": (config["hidden_size"],),
            "verifier_lm_head.weight": (config["draft_vocab_size"], config["hidden_size"]),
        }
    for name, shape in (expected | optional).items():
        info = tensors.get(name)
        if info is None:
            if name in expected:
                problems.append(f"tensor {name} is missing")
        elif info.shape != shape:
            problems.append(f"tensor {name} has shape {list(info.shape)}, expected {list(shape)}")
        elif info.dtype not in _dtypes(name):
            problems.append(f"tensor {name} is {info.dtype}, expected {' or '.join(_dtypes(name))}")
    for name in sorted(tensors.keys() - expected.keys() - optional.keys()):
        hint = " (older SGLang knows midlayer.* only)" if name.startswith("layers.0.") else ""
        problems.append(f"tensor {name} is unknown to the engines{hint}")
    return problems + _map_problems(checkpoint, config)


def _dtypes(name: str) -> tuple[str, ...]:
    return {"d2t": ("I64",), "t2d": ("BOOL",)}.get(name, FLOATS)


def _map_problems(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """The vocabulary map, where its tensors are of the right kind."""
    import numpy as np

    offsets: TensorInfo | None = checkpoint.tensors.get("d2t")
    if offsets is None or offsets.dtype != "I64" or offsets.shape != (config["draft_vocab_size"],):
        return []
    problems = []
    with checkpoint.reader() as reader:
        targets = reader.array(offsets) + np.arange(offsets.shape[0])
        outside = targets[(targets < 0) | (targets >= config["vocab_size"])]
        if outside.size:
            problems.append(
                f"d2t maps {outside.size} draft tokens beyond the vocabulary (one to {outside[0]})"
            )
        if (twice := targets.size - np.unique(targets).size) > 0:
            problems.append(f"d2t is not injective: {twice} draft tokens share a target token with another")
        reach = checkpoint.tensors.get("t2d")
        if (
            not problems
            and reach is not None
            and reach.shape == (config["vocab_size"],)
            and reach.dtype == "BOOL"
        ):
            wanted = np.zeros(config["vocab_size"], dtype=bool)
            wanted[targets] = True
            if (reader.array(reach).astype(bool) != wanted).any():
                problems.append("t2d marks other tokens than d2t reaches")
    return problems


def require_valid(draft_dir: Path, target_config: Mapping[str, Any]) -> None:
    """Raise BadInput listing every problem of the draft."""
    if problems := validate_draft(draft_dir, target_config):
        raise BadInput(
            f"{draft_dir} is not a draft for this target:\n"
            + "\n".join(f"  {problem}" for problem in problems),
            "Export it again, or train a draft for this target.",
        )
