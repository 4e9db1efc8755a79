"""BailingMoeV2 for vLLM with the EAGLE3 interface that the stock class lacks.

Without a draft the stock forward runs, unchanged. With one, the same layers run and the inputs of the layers
that the draft names are handed back beside the final state. Written against vLLM 0.32
(vllm/model_executor/models/bailing_moe.py and the EAGLE3 interface in interfaces.py beside it).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models import bailing_moe as stock
from vllm.model_executor.models.interfaces import EagleModelMixin, SupportsEagle3
from vllm.sequence import IntermediateTensors


# The stock class is already decorated for torch.compile, and its constructor compiles `self.forward`,
# whichever class that comes from: no second decorator here.
class BailingMoeV2Model(stock.BailingMoeModel, EagleModelMixin):  # type: ignore[misc]
    """The decoder; returns auxiliary hidden states once a draft has asked for them."""

    @property
    def embed_tokens(self) -> nn.Module:
        """Input embedding, under the name by which vLLM's proposer shares it with the draft."""
        return self.word_embeddings  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """As the stock forward; with auxiliary layers set, `(hidden, [aux, ...])`.

        Each auxiliary state is the residual stream that enters layer j, (tokens, hidden_size) in the model's
        dtype, for each j named, in ascending order; j = number of layers is the state before the final norm.
        """
        if not self.aux_hidden_state_layers:
            return super().forward(input_ids, position_ids, intermediate_tensors, inputs_embeds)
        if get_pp_group().world_size > 1:
            raise NotImplementedError("EAGLE3 with BailingMoeV2 does not run with pipeline parallelism")

        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        aux = self._maybe_add_hidden_state([], self.start_layer, hidden, residual)
        own_layers = islice(self.layers, self.start_layer, self.end_layer)
        for index, layer in enumerate(own_layers, self.start_layer):
            hidden, residual = layer(hidden, position_ids, residual)
            self._maybe_add_hidden_state(aux, index + 1, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden, aux


@contextmanager
def _decoder_class(replacement: type[nn.Module]) -> Iterator[None]:
    """Let the stock constructor build `replacement` as its decoder.

    It names the decoder class as a global of its module. Running that constructor, not a copy of it, keeps
    stock behaviour on every vLLM release; should the name go, this fails loudly.
    """
    original = stock.BailingMoeModel
    stock.BailingMoeModel = replacement
    try:
        yield
    finally:
        stock.BailingMoeModel = original


class BailingMoeV2ForCausalLM(stock.BailingMoeV2ForCausalLM, SupportsEagle3):  # type: ignore[misc]
    """The stock causal language model around a decoder that can feed an EAGLE3 draft."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with _decoder_class(BailingMoeV2Model):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
