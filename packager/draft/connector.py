# ruff: noqa: ARG002, ARG003  (signatures are vLLM's)
"""KV connector that writes the target's hidden states to disk, on CPU and CUDA.

vLLM's `extract_hidden_states` method keeps the states of chosen layers in a paged cache of their own, one
slot a token. When a request finishes, this connector reads its slots and writes one safetensors file. vLLM's
own `ExampleHiddenStatesConnector` does the same with pinned memory and CUDA events, which a CPU build lacks.

Named in `KVTransferConfig` as `kv_connector="HiddenStatesConnector"`,
`kv_connector_module_path="packager.draft.connector"`, with `kv_connector_extra_config` of `directory` and
`dtype` (`bfloat16` or `float8`). A request names its file in
`SamplingParams.extra_args["kv_transfer_params"]["states_file"]`; one that does not is not captured.

A file holds what packager/draft/states_file.py describes, for prompt and output without the last output
token, which never was an input. It appears under its name only when complete.

Interface: vllm/distributed/kv_transfer/kv_connector/v1/base.py (vLLM 0.32).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

from packager.draft.states_file import encode_states


@dataclass
class FinishedRequest:
    """A request whose states are complete in the cache: its file name, its input tokens, its cache blocks."""

    request_id: str
    file: str
    token_ids: list[int]
    blocks: list[int]


@dataclass
class FinishedRequests(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler hands to the worker with each step."""

    requests: list[FinishedRequest] = field(default_factory=list)


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Store-only connector. vLLM makes one instance in the scheduler and one in each worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        found = [i for i, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
        if not found and len(groups) == 1:  # same block size as the attention layers: merged with them
            found = [0]
        if len(found) != 1:
            raise ValueError(
                f"expected one hidden-states cache group among {len(groups)}, found {len(found)}"
            )
        self._group = found[0]
        self._directory = Path(self._kv_transfer_config.get_from_extra_config("directory", "."))
        self._dtype = self._kv_transfer_config.get_from_extra_config("dtype", "bfloat16")
        self._waiting: list[FinishedRequest] = []  # scheduler side
        self._cache: torch.Tensor | None = None  # worker side: [blocks, layers, block size, hidden]
        self._writes = True

    # Worker side.

    def get_finished_count(self) -> int:
        """Only tensor-parallel rank 0 writes, so each request is reported once."""
        return 1

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        (name,) = layers
        self._cache = kv_caches[name]
        self._writes = get_tensor_model_parallel_rank() == 0

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is ever loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is ever loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """The model has put the states into the cache already; they are read when the request is finished."""

    def wait_for_save(self) -> None:
        """Writing happens in `get_finished`."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Write the states of the requests the scheduler named with this step; report them as sent."""
        if not self._writes or not self.has_connector_metadata():
            return None, None
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, FinishedRequests)
        for request in metadata.requests:
            self._write(request)
        return {request.request_id for request in metadata.requests} or None, None

    def _write(self, request: FinishedRequest) -> None:
        assert self._cache is not None
        size = self._cache.shape[2]
        tokens = len(request.token_ids)
        blocks = torch.tensor(request.blocks, dtype=torch.long)[: -(-tokens // size)]
        # [blocks, layers, size, hidden] -> [tokens, layers, hidden]; the copy is synchronous on every device.
        states = self._cache[blocks.to(self._cache.device)].transpose(1, 2).flatten(0, 1)[:tokens]
        tensors = {name: tensor.cpu() for name, tensor in encode_states(states, self._dtype).items()}
        tensors["token_ids"] = torch.tensor(request.token_ids)
        path = self._directory / request.file
        partial = path.with_suffix(".partial")
        save_file(tensors, partial)
        os.replace(partial, path)  # noqa: PTH105

    # Scheduler side.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """No external tokens, so no state."""

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        metadata = FinishedRequests(self._waiting)
        self._waiting = []
        return metadata

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """True keeps the request's blocks until the worker has reported it as sent."""
        name = (request.kv_transfer_params or {}).get("states_file")
        if name is None or not block_ids:
            return False, None
        file = Path(name).name  # a bare name: a request must not write outside the directory
        self._waiting.append(
            FinishedRequest(request.request_id, file, list(request.all_token_ids)[:-1], list(block_ids))
        )
        return True, {"states_file": file}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._group >= len(block_ids):  # never scheduled
            return False, None
        return self.request_finished(request, block_ids[self._group])

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Token-major within a block, so that one token's states lie together."""
        return "LBNHC"
