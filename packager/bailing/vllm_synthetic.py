"""Synthetic acceptance for vLLM's CPU build, whose own kernel refuses it.

`rejection_sample_method: synthetic` accepts draft tokens at random with given rates, so that speed can be
measured for an acceptance nobody has trained yet. vLLM 0.32 has it in a Triton kernel alone
(v1/sample/rejection_sampler.py, rejection_greedy_sample_kernel); the C++ stand-in of the CPU build asserts
that it is off (utils/cpu_triton_utils.py). Only measuring servers register this one.
"""

from __future__ import annotations

from typing import Any

_KERNEL = "vllm.v1.sample.rejection_sampler.rejection_greedy_sample_kernel"


def register() -> None:
    """Let vLLM's kernel dispatcher call the functions here for greedy requests."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.utils import cpu_triton_utils

    # The platform registers this function under the kernel's name when its worker starts, after plugins.
    if not HAS_TRITON:
        cpu_triton_utils._rejection_greedy_sample_kernel_impl = rejection_greedy_sample_kernel


def rejection_greedy_sample_kernel(
    output_token_ids: Any,
    cu_num_draft_tokens: Any,
    draft_token_ids: Any,
    target_argmax: Any,
    bonus_token_ids: Any,
    is_greedy: Any,
    max_spec_len: int,  # noqa: ARG001 - the kernel's calling convention
    uniform_probs: Any = None,
    synthetic_conditional_rates: Any = None,
    SYNTHETIC_MODE: bool = False,  # noqa: ARG001
) -> None:
    """The Triton kernel of that name, request by request.

    Args:
        output_token_ids: [requests, longest draft + 1] int32, filled in; -1 where nothing was yielded.
        cu_num_draft_tokens: [requests] running sum of draft tokens.
        draft_token_ids: [draft tokens].
        target_argmax: [draft tokens].
        bonus_token_ids: [requests, 1].
        is_greedy: [requests] bool; None: all are.
        uniform_probs: [draft tokens] in [0, 1).
        synthetic_conditional_rates: [longest draft] chance of each position after the one before.
    """
    drafts, wanted = draft_token_ids.tolist(), target_argmax.tolist()
    chances = None if uniform_probs is None else uniform_probs.tolist()
    rates = None if synthetic_conditional_rates is None else synthetic_conditional_rates.tolist()
    start = 0
    for request, end in enumerate(cu_num_draft_tokens.tolist()):
        if is_greedy is None or bool(is_greedy[request]):
            yielded = []
            for place in range(start, end):
                if rates is not None and chances is not None:
                    accepted = chances[place] < rates[place - start] and drafts[place] >= 0
                else:
                    accepted = drafts[place] == wanted[place]
                yielded.append(drafts[place] if accepted else wanted[place])
                if not accepted:
                    break
            else:
                yielded.append(int(bonus_token_ids.flatten()[request]))
            output_token_ids[request, : len(yielded)] = output_token_ids.new_tensor(yielded)
        start = end
