"""The stock EAGLE3 draft for vLLM with an output head of its own, even where no weights are read.

vLLM 0.32 learns from the weights that a draft has its own head (model_executor/models/utils.py,
process_eagle_weight); under `--load-format dummy` none are read, the target's head would stand in for the
draft's smaller one, and the engine fails on the shapes. Only measuring servers register this class.
"""

from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM as Stock


class Eagle3LlamaForCausalLM(Stock):  # type: ignore[misc]
    """As the stock class."""

    has_own_lm_head = True
