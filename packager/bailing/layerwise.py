"""The transformers forward of a checkpoint one layer at a time, so that one layer has to fit in memory.

For proofs at full size: the layers are those of `packager.bailing.hf_model`, computed in FP32 on the CPU from
the checkpoint's own tensors; FP8 and INT8 weights are multiplied by their scales, activations are not
quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from packager.bailing.hf_config import BailingMoeConfig, BailingMoeV2Config
from packager.bailing.hf_model import BailingMoeV2DecoderLayer, MoE, Positions, model_fields
from packager.checkpoint.header import TensorInfo
from packager.checkpoint.source import Checkpoint, TensorReader
from packager.errors import BadInput

_BLOCK = 128
_CODES = {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8}
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class LayerwiseForward:
    """A checkpoint whose layers can be computed one after another.

    Raises:
        BadInput: the config asks for what the transformers model does not have, a tensor is missing, or it is
            stored in a way that is not read here (packed INT4).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        raw = checkpoint.config()
        kinds = {kind.model_type: kind for kind in (BailingMoeV2Config, BailingMoeConfig)}
        if (kind := kinds.get(raw.get("model_type", ""))) is None:
            raise BadInput(f"model_type {raw.get('model_type')!r} is not BailingMoeV2's")
        self._checkpoint = checkpoint
        try:
            self._fields = model_fields(kind(**raw))
        except ValueError as err:
            raise BadInput(str(err)) from None
        self.layers: int = self._fields["num_hidden_layers"]
        with torch.device("meta"):
            self._names = [
                list(BailingMoeV2DecoderLayer(self._fields, index).state_dict())
                for index in range(self.layers)
            ]
        for index, names in enumerate(self._names):
            for name in names:
                self._check(f"model.layers.{index}.{name}")
        self._check("model.word_embeddings.weight")

    def _check(self, name: str) -> None:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise BadInput(f"{self._checkpoint.name} has no tensor {name}")
        if info.dtype in _CODES:
            scale = self._scale(name)
            if scale is None or scale.dtype not in _FLOATS:
                raise BadInput(f"{self._checkpoint.name} has no scale that can be read for {name}")
        elif info.dtype not in _FLOATS:
            raise BadInput(f"{name} is stored as {info.dtype}")

    def _scale(self, name: str) -> TensorInfo | None:
        found = self._checkpoint.tensors
        return found.get(f"{name}_scale_inv") or found.get(f"{name}_scale")

    @property
    def peak_bytes(self) -> int:
        """Memory that the largest layer, or the embedding, takes in FP32, with one tensor read twice over."""
        tensors = self._checkpoint.tensors
        sizes = [
            [prod(tensors[f"model.layers.{index}.{name}"].shape) for name in names]
            for index, names in enumerate(self._names)
        ]
        embedding = prod(tensors["model.word_embeddings.weight"].shape)
        return 4 * max(2 * embedding, *(sum(layer) + 2 * max(layer) for layer in sizes))

    def routing(self, prompts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """The experts that the tokens of all prompts, one after another, are sent to: of each layer that has
        experts [tokens, k] (int64)."""
        chosen: dict[int, list[Tensor]] = {}

        def watch(index: int, layer: BailingMoeV2DecoderLayer) -> None:
            if isinstance(layer.mlp, MoE):
                found = chosen.setdefault(index, [])
                layer.mlp.gate.register_forward_hook(lambda _gate, _given, out: found.append(out[0]))

        for _ in self.inputs(prompts, watch):
            pass
        return {index: torch.cat(found) for index, found in chosen.items()}

    def inputs(
        self,
        prompts: Sequence[Sequence[int]],
        watch: Callable[[int, BailingMoeV2DecoderLayer], None] | None = None,
    ) -> Iterator[list[Tensor]]:
        """The residual stream of each prompt, [tokens, hidden] in FP32: first what enters layer 0, then layer
        1 …, and at last what leaves the last layer, before the final norm. `watch` is given each layer, and
        its number, before it is computed."""
        with self._checkpoint.reader() as reader, torch.no_grad():
            embedding = self._read(reader, "model.word_embeddings.weight")
            states = [embedding[torch.tensor(ids)].unsqueeze(0) for ids in prompts]
            del embedding
        yield [state[0] for state in states]
        where = Positions(self._fields)
        positions = [where(torch.tensor([ids]), None) for ids in prompts]
        for index, names in enumerate(self._names):
            with self._checkpoint.reader() as reader, torch.no_grad():
                with torch.device("meta"):
                    layer = BailingMoeV2DecoderLayer(self._fields, index)
                layer.load_state_dict(
                    {name: self._read(reader, f"model.layers.{index}.{name}") for name in names}, assign=True
                )
                if watch is not None:
                    watch(index, layer)
                states = [layer(state, at) for state, at in zip(states, positions, strict=True)]
            yield [state[0] for state in states]

    def _read(self, reader: TensorReader, name: str) -> Tensor:
        info = self._checkpoint.tensors[name]
        values = _values(reader, info)
        if info.dtype not in _CODES:
            return values
        stored = self._scale(name)
        assert stored is not None  # checked
        scale = _values(reader, stored)
        if scale.numel() == 1:
            return values * scale
        scale = scale.reshape(len(scale), -1)
        if scale.shape[1] > 1:  # blocks of 128 x 128; else a scale a row, or blocks of one column of them
            scale = scale.repeat_interleave(_BLOCK, 1)[:, : values.shape[1]]
        if len(scale) != len(values):
            scale = scale.repeat_interleave(_BLOCK, 0)[: len(values)]
        return values * scale


def _values(reader: TensorReader, info: TensorInfo) -> Tensor:
    """A tensor's numbers as FP32, codes without their scale; torch widens them on all cores."""
    kind = (_CODES | _FLOATS)[info.dtype]
    return torch.from_numpy(reader.bytes(info)).view(kind).reshape(info.shape).float()
