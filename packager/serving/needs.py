"""What a machine must have for a profile of serve.yaml: the plan's bytes, at hand where it is started."""

from __future__ import annotations

from math import ceil

from pydantic import BaseModel, ConfigDict, Field

from packager.serving.plan import ModelBytes
from validation.hardware import GB, Hardware, hardware_file

GIB = 1 << 30
COMPUTE_CAPABILITY = "8.0"
"""Activations are BF16, which GPUs compute from Ampere on. FP8 units come with 8.9; below, vLLM 0.32 reads
the weights as FP8 and computes in BF16 (W8A16, from 7.5 on)."""
CPU_CACHE_BYTES = GIB
"""What the KV cache takes of main memory at least: see `packager.serving.cpu.cpu_environment`."""
CPU_OVERHEAD_BYTES = 2 * GIB
"""Two processes of vLLM 0.32 with torch, beside weights and cache, and some to spare: serving the nano with
its draft took 2.4 GiB in all (proportional set size), of which 1 GiB is the cache."""


class Needs(BaseModel):
    """Memory on each GPU, or free in main memory, for one request at a time."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gpus: int = Field(default=0, ge=0)
    """0: the processor serves it."""
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d+$")
    weights_bytes: int = Field(ge=0)
    """Of the target, on each GPU."""
    dequantized_bytes: int | None = Field(default=None, ge=0)
    """Of the target in BF16, which a processor without kernels for the weights serves instead."""
    draft_bytes: int = Field(default=0, ge=0)
    kv_bytes_per_token: int = Field(ge=0)
    least_kv_bytes: int = Field(default=0, ge=0)
    """Taken for the KV cache however short the context."""
    overhead_bytes: int = Field(ge=0)
    """Assumed for activations, graphs, communication, the processes themselves."""
    memory_utilization: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU's memory that the engine takes."""

    def kv_bytes(self, tokens: int) -> int:
        """KV cache of one request of `tokens`."""
        return max(self.least_kv_bytes, tokens * self.kv_bytes_per_token)

    def memory(self, tokens: int, *, dequantized: bool = False, utilization: float | None = None) -> int:
        """Bytes that each GPU must have, or that must be free in main memory, for one request of `tokens`."""
        weights = self.weights_bytes
        if dequantized and self.dequantized_bytes is not None:
            weights = self.dequantized_bytes
        used = weights + self.draft_bytes + self.kv_bytes(tokens) + self.overhead_bytes
        return ceil(used / (utilization or self.memory_utilization))


def needs_on_gpus(model: ModelBytes, ways: int) -> Needs:
    """Of a model split over `ways` GPUs, by the figures that `plan.fit` lays it on cards with."""
    share = hardware_file().engine
    return Needs(
        gpus=ways,
        compute_capability=COMPUTE_CAPABILITY,
        weights_bytes=ceil(model.weights / ways),
        draft_bytes=ceil(model.draft / ways),
        kv_bytes_per_token=ceil(model.kv_per_card(ways)),
        overhead_bytes=int(share.reserve_gb * GB),
        memory_utilization=share.memory_utilization,
    )


def needs_on_cpu(model: ModelBytes, dequantized: int | None) -> Needs:
    """Of a model in main memory; `dequantized`: bytes of its weights in BF16, if they are quantized."""
    return Needs(
        weights_bytes=model.weights,
        dequantized_bytes=dequantized,
        draft_bytes=model.draft,
        kv_bytes_per_token=ceil(model.kv_per_card(1)),
        least_kv_bytes=CPU_CACHE_BYTES,
        overhead_bytes=CPU_OVERHEAD_BYTES,
    )


def smallest_card(needs: Needs, tokens: int, *, utilization: float | None = None) -> Hardware | None:
    """As many of the smallest known card as do for `needs`; of cards alike in memory, the fastest."""
    wanted = needs.memory(tokens, utilization=utilization)
    cards = hardware_file().cards
    enough = [key for key, card in cards.items() if card.memory_gb * GB >= wanted]
    if not enough or not needs.gpus:
        return None
    key = min(
        enough, key=lambda one: (cards[one].memory_gb, -cards[one].bandwidth_tb_s, -cards[one].bf16_tflops)
    )
    return Hardware(key=key, count=needs.gpus, card=cards[key])
