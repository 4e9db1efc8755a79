"""vLLM general plugin: BailingMoeV2 without trust_remote_code, and with EAGLE3.

vLLM calls `register` (entry point group `vllm.general_plugins`) in every process it starts. This module,
`vllm_model` and `hf_config` import nothing else of their package: bundles carry the three, byte for byte, in
a wheel of their own (packager.bundle.plugin_wheel).
"""

from __future__ import annotations

import os
from importlib.util import find_spec

ARCHITECTURE = "BailingMoeV2ForCausalLM"
SYNTHETIC_ON_CPU = "PACKAGER_SYNTHETIC_ACCEPTANCE"
"""Set in the environment of a server that measures speed at an acceptance given beforehand."""
ROUTING = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY"
"""vLLM's own: how a server that measures dummy weights sends tokens to experts."""
UNIFORM_ON_CPU = "packager_uniform_random"
"""See `packager.bailing.vllm_routing`; elsewhere vLLM's `uniform_random`."""
_CLASS = f"{__package__}.vllm_model:BailingMoeV2ForCausalLM"
_DRAFT = "LlamaForCausalLMEagle3"
_DRAFT_CLASS = f"{__package__}.vllm_draft:Eagle3LlamaForCausalLM"


def register() -> None:
    """Teach transformers the config and vLLM the EAGLE3-capable class. Idempotent.

    The model class goes in by name, so that nothing that could touch a device is imported here.
    """
    from vllm import ModelRegistry

    from . import hf_config

    hf_config.register()
    ModelRegistry.register_model(ARCHITECTURE, _CLASS)
    if find_spec(".vllm_synthetic", __package__) is None:
        return  # a bundle's wheel: only the packager measures
    if os.environ.get(SYNTHETIC_ON_CPU):
        from . import vllm_synthetic

        vllm_synthetic.register()
        ModelRegistry.register_model(_DRAFT, _DRAFT_CLASS)
    if os.environ.get(ROUTING) == UNIFORM_ON_CPU:
        from . import vllm_routing

        vllm_routing.register()
