"""vLLM general plugin: BailingMoeV2 without trust_remote_code, and with EAGLE3.

vLLM calls `register` (entry point group `vllm.general_plugins`) in every process it starts.
"""

from __future__ import annotations

import os

ARCHITECTURE = "BailingMoeV2ForCausalLM"
SYNTHETIC_ON_CPU = "PACKAGER_SYNTHETIC_ACCEPTANCE"
"""Set in the environment of a server that measures speed at an acceptance given beforehand."""
ROUTING = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
"""vLLM's own: how a server that measures dummy weights sends tokens to experts."""
UNIFORM_ON_CPU = "packager_uniform_random"
"""See `packager.bailing.vllm_routing`; elsewhere vLLM's `uniform_random`."""
_CLASS = "packager.bailing.vllm_model:BailingMoeV2ForCausalLM"
_DRAFT = "LlamaForCausalLMEagle3"
_DRAFT_CLASS = "packager.bailing.vllm_draft:Eagle3LlamaForCausalLM"


def register() -> None:
    """Teach transformers the config and vLLM the EAGLE3-capable class. Idempotent.

    The model class goes in by name, so that nothing that could touch a device is imported here.
    """
    from vllm import ModelRegistry

    from packager.bailing import hf_config

    hf_config.register()
    ModelRegistry.register_model(ARCHITECTURE, _CLASS)
    if os.environ.get(SYNTHETIC_ON_CPU):
        from packager.bailing import vllm_synthetic

        vllm_synthetic.register()
        ModelRegistry.register_model(_DRAFT, _DRAFT_CLASS)
    if os.environ.get(ROUTING) == UNIFORM_ON_CPU:
        from packager.bailing import vllm_routing

        vllm_routing.register()
