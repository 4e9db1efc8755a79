"""Proof that captured states are those of the layers meant, by the project's own transformers forward.

Engines count layers in different ways (SGLang adds one to an id that vLLM takes as it is), and a draft served
with states of a neighbouring layer loads, runs and is hardly ever accepted. So the states of the first
prompts are compared, by cosine, with what every layer of the checkpoint computes for the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.checkpoint.memory import available_memory
from packager.checkpoint.source import Checkpoint
from packager.errors import BadInput, RemoteFailure

if TYPE_CHECKING:
    from torch import Tensor

    from packager.bailing.layerwise import LayerwiseForward

MIN_COSINE = 0.97
"""States of no layer of this checkpoint fall below it. Measured against the FP32 forward: the nano served by
vLLM in BF16 0.9987 at the least; with FP8 activations (computed in torch) and FP8 states 0.9968; 32 untrained
layers 0.9987. Layers are told apart by which fits best, since neighbours in a deep model differ less than
that."""
PROMPTS = 2
"""How many responses are computed again: the first ones, which are there before the others."""
TOKENS = 96
"""Tokens of each: the model is causal, so the first ones need no others."""


def prove_layers(
    target: Path, layers: Sequence[int], records: Sequence[Mapping[str, Any]], directory: Path
) -> dict[str, Any]:
    """Compare the states of the first `records`, in `directory`, with the checkpoint's forward.

    Args:
        target: the checkpoint that was served.
        layers: ids that were captured, in their order in the states files; id j means the input of layer j.
        records: of `responses.jsonl`, by index.
        directory: where the states files are.

    Returns:
        `proved`; and if so `prompts`, `tokens`, `min_cosine` and for each of `layers` its `cosine` (mean over
        tokens), of the other layer that fits best `next_layer` and `next_cosine`, and `tokens_fit_best`, how
        many tokens fit this layer best; if not, the `reason`.

    Raises:
        RemoteFailure: states fit another layer better than their own, or none.
        BadInput: a states file is missing or damaged.
    """
    from packager.bailing.layerwise import LayerwiseForward

    try:
        model = LayerwiseForward(Checkpoint.open(target))
    except BadInput as err:
        return {"proved": False, "reason": f"no reference forward: {err.message}"}
    need, free = model.peak_bytes, available_memory()
    if need > free:
        return {
            "proved": False,
            "reason": f"a layer takes {need / 1e9:.1f} GB of memory in FP32, {free / 1e9:.1f} GB are free",
        }
    cosines = _cosines(model, layers, records[:PROMPTS], directory)
    votes = cosines.argmax(1)
    found = []
    for place, layer in enumerate(layers):
        row = cosines[place].mean(-1).tolist()
        best = max(range(len(row)), key=row.__getitem__)
        _require(layer, best, row)
        next_best = max((other for other in range(len(row)) if other != layer), key=row.__getitem__)
        found.append(
            {
                "layer": layer,
                "cosine": round(row[layer], 4),
                "next_layer": next_best,
                "next_cosine": round(row[next_best], 4),
                "tokens_fit_best": int((votes[place] == layer).sum()),
            }
        )
    return {
        "proved": True,
        "prompts": min(PROMPTS, len(records)),
        "tokens": cosines.shape[-1],
        "min_cosine": MIN_COSINE,
        "layers": found,
    }


def _require(layer: int, best: int, row: Sequence[float]) -> None:
    remedy = (
        "The engine counts layers in another way than the draft will: use the version that the package pins, "
        "delete the work directory and prepare again."
    )
    if best != layer and row[best] >= MIN_COSINE:
        raise RemoteFailure(
            f"what the engine captured as layer {layer} is layer {best}: cosine {row[best]:.4f} there, "
            f"{row[layer]:.4f} at layer {layer}",
            remedy,
        )
    if row[layer] < MIN_COSINE:
        raise RemoteFailure(
            f"what the engine captured as layer {layer} fits no layer: cosine {row[best]:.4f} at layer "
            f"{best}, the best, and {row[layer]:.4f} at layer {layer}; {MIN_COSINE} is the least",
            remedy,
        )


def _cosines(
    model: LayerwiseForward, layers: Sequence[int], records: Sequence[Mapping[str, Any]], directory: Path
) -> Tensor:
    """Cosine [captured ids, layers + 1, tokens] of each captured state with the input of each layer and the
    last output."""
    import torch

    from packager.draft.states import load_layers, sample_of

    prompts, captured = [], []
    for record in records:
        sample = sample_of(record, directory)
        states = load_layers(sample, len(layers))[:TOKENS].float()
        prompts.append(list(sample.ids[: len(states)]))
        captured.append(states)
    ours = torch.cat(captured)  # [tokens, captured ids, hidden]
    rows = [
        torch.cosine_similarity(ours, torch.cat(computed).unsqueeze(1), dim=-1)
        for computed in model.inputs(prompts)
    ]
    return torch.stack(rows).permute(2, 0, 1)


def describe(proof: Mapping[str, Any]) -> list[str]:
    """Lines for people."""
    if not proof["proved"]:
        return [f"layer ids were not proved: {proof['reason']}"]
    return [
        f"captured id {row['layer']} is layer {row['layer']}: cosine {row['cosine']:.4f} over "
        f"{proof['tokens']} tokens, the best for {row['tokens_fit_best']} of them (next: layer "
        f"{row['next_layer']}, {row['next_cosine']:.4f})"
        for row in proof["layers"]
    ]
