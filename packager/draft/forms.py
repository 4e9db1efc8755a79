"""The forms EAGLE3 drafts are published in, each read as the flat config and tensor names of our own export.

midlayer     `midlayer.*`, flat config.json: what every release of vLLM and SGLang loads; ours
layers       the same with `layers.0.*`: vLLM, and SGLang from the releases that know it
speculators  `layers.0.*`, the speculators library's config.json around `transformer_layer_config`: vLLM
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

Form = Literal["midlayer", "layers", "speculators"]

_CARRIED = ("norm_before_fc", "fc_norm", "norm_output", "target_hidden_size")


def is_speculators(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the speculators library."""
    return "speculators_model_type" in config


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The flat config of any form.

    Of the speculators form it is what vLLM 0.32 makes of it (transformers_utils/configs/speculators/algos.py,
    update_eagle3): an option that the file leaves out has the reader's default, which for
    `norm_before_residual` is on.
    """
    if not is_speculators(config):
        return dict(config)
    flat = dict(config.get("transformer_layer_config") or {})
    kind = flat.get("model_type", "llama")
    architecture = {"llama": "Eagle3LlamaForCausalLM", "qwen3": "Eagle3Qwen3ForCausalLM"}.get(str(kind))
    flat["architectures"] = [architecture or f"speculators {config['speculators_model_type']} over {kind}"]
    flat["draft_vocab_size"] = config.get("draft_vocab_size")
    flat["norm_before_residual"] = config.get("norm_before_residual", True)
    flat |= {name: config[name] for name in _CARRIED if config.get(name) is not None}
    if ids := config.get("eagle_aux_hidden_state_layer_ids"):
        flat["eagle_aux_hidden_state_layer_ids"] = list(ids)
    return flat


def form_of(config: Mapping[str, Any], tensors: Iterable[str]) -> Form:
    """The form of a draft with this config.json and these tensor names."""
    if is_speculators(config):
        return "speculators"
    names = list(tensors)
    inner = any(name.startswith("midlayer.") for name in names)
    return "layers" if not inner and any(name.startswith("layers.0.") for name in names) else "midlayer"


def our_name(name: str, form: Form) -> str:
    """A tensor's name in our own export."""
    return name if form == "midlayer" else name.replace("layers.0.", "midlayer.", 1)
