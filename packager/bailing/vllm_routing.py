"""Uniform random routing for vLLM's CPU build, whose expert kernels want 32-bit expert ids.

vLLM 0.32 simulates routing for speed measurements (`VLLM_MOE_ROUTING_SIMULATION_STRATEGY`); its own
`uniform_random` gives 64-bit ids unless the kernel asks for a type, and those of a processor ask for none and
fail ("expected scalar type Int but found Long"). Only measuring servers register this one.
"""

from __future__ import annotations

from typing import Any

from packager.bailing.vllm_plugin import UNIFORM_ON_CPU


def register() -> None:
    """Add the strategy to vLLM's. Idempotent."""
    import torch
    from vllm.model_executor.layers.fused_moe.router import routing_simulator_router as stock

    class Uniform(stock.DistributionBasedRouting):  # type: ignore[misc]
        """The stock strategy with 32-bit ids where no type is asked for."""

        def route_tokens(
            self, hidden_states: Any, router_logits: Any, top_k: int, indices_type: Any = None
        ) -> Any:
            return super().route_tokens(hidden_states, router_logits, top_k, indices_type or torch.int32)

    stock.RoutingSimulator.register_strategy(UNIFORM_ON_CPU, Uniform("uniform"))
