"""A trained head as the one checkpoint that vLLM and SGLang both load, or in speculators' form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.artifact import ArtifactWriter
from packager.draft.validator import require_valid
from packager.draft.vocabulary import VocabularyMap
from packager.errors import BadInput

if TYPE_CHECKING:
    from packager.draft.head import Eagle3Head


def draft_tensors(head: Eagle3Head, vocabulary: VocabularyMap) -> dict[str, Any]:
    """The exported tensors: BF16 weights under their engine names, `d2t` (int64 offsets), `t2d` (bool).

    Raises:
        BadInput: a weight is not finite.
    """
    import torch

    tensors = {
        name: parameter.detach().to(torch.bfloat16).contiguous()
        for name, parameter in head.named_parameters()
    }
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(
                f"the trained weight {name} is not finite", "Lower draft.learning_rate and train again."
            )
    tensors["d2t"] = torch.tensor(vocabulary.offsets, dtype=torch.int64)
    tensors["t2d"] = torch.tensor(vocabulary.reachable, dtype=torch.bool)
    return tensors


def write_draft(
    writer: ArtifactWriter, head: Eagle3Head, vocabulary: VocabularyMap, target_config: dict[str, Any]
) -> None:
    """Write config.json and model.safetensors into an open artifact and have the validator look at them.

    Raises:
        BadInput: the validator finds something, or a weight is not finite.
    """
    from safetensors.torch import save

    writer.write_json("config.json", head.config)
    writer.write_bytes("model.safetensors", save(draft_tensors(head, vocabulary), {"format": "pt"}))
    require_valid(Path(writer.path), target_config)


def speculators_config(
    config: dict[str, Any], target_config: dict[str, Any], *, verifier: str, tokens: int
) -> dict[str, Any]:
    """config.json in the form of speculators 0.9, from that of our own export.

    `vllm serve DRAFT` reads from it the target to serve and how many tokens to draft. The library's classes
    write it, so that its own readers take it.

    Args:
        config: our draft's config.json.
        target_config: the target's config.json.
        verifier: hub name or folder of the target, as engines are to open it.
        tokens: draft tokens a step.
    """
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    ours = ("architectures", "model_type", "draft_vocab_size", "rope_theta", "rope_scaling", "torch_dtype")
    layer = LlamaConfig(
        **{name: value for name, value in config.items() if name not in ours and "eagle" not in name},
        dtype=config["torch_dtype"],
    )
    made = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=config["draft_vocab_size"],
        norm_before_residual=False,
        target_hidden_size=config["hidden_size"],
        eagle_aux_hidden_state_layer_ids=list(config["eagle_aux_hidden_state_layer_ids"]),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=tokens)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(
                name_or_path=verifier, architectures=list(target_config.get("architectures") or [])
            ),
        ),
    )
    found: dict[str, Any] = made.to_dict()
    return found


def write_speculators(
    writer: ArtifactWriter,
    head: Eagle3Head,
    vocabulary: VocabularyMap,
    target_config: dict[str, Any],
    *,
    verifier: str,
    tokens: int,
) -> None:
    """As `write_draft`, in the form of the speculators library; see `speculators_config`.

    Raises:
        BadInput: the validator finds something, or a weight is not finite.
    """
    from safetensors.torch import save

    tensors = {
        name.replace("midlayer.", "layers.0.", 1): tensor
        for name, tensor in draft_tensors(head, vocabulary).items()
    }
    config = speculators_config(dict(head.config), target_config, verifier=verifier, tokens=tokens)
    writer.write_json("config.json", config)
    writer.write_bytes("model.safetensors", save(tensors, {"format": "pt"}))
    require_valid(Path(writer.path), target_config)
