"""How hidden states lie in a file: BF16, or FP8 with a scale for each token and layer.

A safetensors file holds `hidden_states` [tokens, layers, hidden], `token_ids` [tokens] (int64) and, for FP8
(E4M3), `scales` [tokens, layers] (FP32). The magnitude of a residual stream grows many times over from the
first layer to the last and differs from token to token, so one scale for a file would cost the small ones
their bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from packager.recipe import StatesDtype

if TYPE_CHECKING:
    from torch import Tensor

FILE_OVERHEAD = 512
"""Bytes of a file beside its tensors, at most: the safetensors header."""
E4M3_MAX = 448.0


def bytes_per_token(layers: int, hidden: int, dtype: StatesDtype) -> int:
    """Bytes that one token's states of `layers` layers take on disk, its id included."""
    return layers * (hidden * 2 if dtype == "bfloat16" else hidden + 4) + 8


def is_whole(path: Path, tokens: int, per_token: int) -> bool:
    """Whether a file of states is there with every byte that `tokens` tokens take, and no other."""
    try:
        with path.open("rb") as handle:
            header = int.from_bytes(handle.read(8), "little")
            return handle.seek(0, 2) == 8 + header + tokens * per_token
    except FileNotFoundError:
        return False


def encode_states(states: Tensor, dtype: StatesDtype) -> dict[str, Tensor]:
    """Tensors of a file, without the token ids, from states [tokens, layers, hidden] of any float dtype.

    FP8 keeps each value to 1/16 of itself or 2^-10 of its token's and layer's scale, whichever is larger
    (three bits of mantissa, subnormals below 2^-6); the scale is the largest magnitude / 448.
    """
    import torch

    if dtype == "bfloat16":
        return {"hidden_states": states.to(torch.bfloat16).contiguous()}
    wide = states.float()
    scales = wide.abs().amax(-1) / E4M3_MAX
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    codes = (wide / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return {"hidden_states": codes.contiguous(), "scales": scales.contiguous()}


def decode_states(tensors: Mapping[str, Tensor]) -> Tensor:
    """States [tokens, layers, hidden] in BF16 from the tensors of a file.

    Raises:
        ValueError: the tensors are not what `encode_states` gives.
    """
    import torch

    states, scales = tensors["hidden_states"], tensors.get("scales")
    if states.dim() != 3:
        raise ValueError(f"hidden_states has {states.dim()} dimensions, not three")
    if (states.dtype == torch.float8_e4m3fn) != (scales is not None):
        raise ValueError(f"hidden_states in {states.dtype} {'without' if scales is None else 'with'} scales")
    if scales is None:
        return states.to(torch.bfloat16)
    if scales.shape != states.shape[:2]:
        raise ValueError(f"scales of shape {tuple(scales.shape)} for states of {tuple(states.shape)}")
    return (states.float() * scales.unsqueeze(-1)).to(torch.bfloat16)
