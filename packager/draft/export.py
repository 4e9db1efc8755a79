"""A trained head as the one checkpoint that vLLM and SGLang both load."""

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
