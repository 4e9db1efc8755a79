"""What is served, and the one function that every serve command comes from: run, printed or published."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packager.bailing.vllm_plugin import SYNTHETIC_ON_CPU
from packager.errors import BadInput
from packager.recipe import SpeculationRange
from packager.serving.cpu import CPU_ARGUMENTS, Device, cpu_environment, device


@dataclass(frozen=True)
class ServeSpec:
    """One model as it is to be served."""

    model: Path
    served_name: str = "model"
    draft: Path | None = None
    """An EAGLE3 draft; None: plain decoding."""
    num_speculative_tokens: int = 3
    speculation: tuple[SpeculationRange, ...] = ()
    """Draft tokens by number of requests in a step; empty: `num_speculative_tokens` always."""
    speculation_max_context: int | None = None
    """Tokens beyond which nothing is drafted; None: no such limit. vLLM 0.32 decides it for a whole batch, by
    its longest request, and verifies zeros in the drafts' place: that saves the draft's time alone."""
    synthetic_acceptance_length: float | None = None
    """Accept draft tokens at random so that a step yields this many on average; to measure speed alone."""
    dummy_weights: bool = False
    """Let the engine fill model and draft with random numbers: their folders hold configs alone."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; None: what the checkpoint says."""
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    """Overrides of the target's config.json; they do not reach the draft."""
    tensor_parallel: int = 1
    extra_args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise BadInput unless model and draft are checkpoint directories."""
        for role, path in (("model", self.model), ("draft", self.draft)):
            if path is not None and not (path / "config.json").is_file():
                what = "has no config.json" if path.is_dir() else "is not a directory"
                raise BadInput(f"the {role} {path} {what}", "Give the directory of a checkpoint.")


def speculative_config(spec: ServeSpec) -> dict[str, Any] | None:
    """vLLM's speculative config for `spec`; None without a draft, or if no batch is to have draft tokens.

    vLLM 0.32 (config/speculative.py) switches the number of draft tokens by itself:
    `num_speculative_tokens_per_batch_size` holds inclusive ranges of the number of requests in a step, the
    last carried on, and `max_model_len` is the length from which it stops drafting for the whole batch.
    """
    if spec.draft is None:
        return None
    counts = [one.num_speculative_tokens for one in spec.speculation] or [spec.num_speculative_tokens]
    if not max(counts):
        return None
    config: dict[str, Any] = {
        "method": "eagle3",
        "model": str(spec.draft),
        "num_speculative_tokens": max(counts),
    }
    if len(set(counts)) > 1:
        ranges, start = [], 1
        for one in spec.speculation:
            ranges.append([start, one.max_concurrency or start, one.num_speculative_tokens])
            start = ranges[-1][1] + 1
        config["num_speculative_tokens_per_batch_size"] = ranges
    # vLLM refuses a draft's length beyond the target's; up to that one it drafts anyway.
    if spec.speculation_max_context is not None and (
        spec.max_model_len is None or spec.speculation_max_context < spec.max_model_len
    ):
        config["max_model_len"] = spec.speculation_max_context
    if spec.synthetic_acceptance_length is not None:
        config |= {
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": spec.synthetic_acceptance_length,
        }
    return config


def vllm_command(
    spec: ServeSpec,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    python: str = sys.executable,
    target: Device | None = None,
) -> list[str]:
    """The vLLM command line that serves `spec`, as an argument list.

    `target` None: for this machine. With `cuda` it is the published form, `vllm serve MODEL`. With `cpu` it
    is `python -m …api_server`, because the `vllm` command of the CPU distribution fails at once (it asks for
    the metadata of a distribution named vllm), plus the settings that make a processor start fast.
    """
    kind = target or device()
    if kind == "cpu":
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(spec.model)]
    else:
        command = ["vllm", "serve", str(spec.model)]
    command += ["--served-model-name", spec.served_name, "--host", host, "--port", str(port)]
    if spec.max_model_len is not None:
        command += ["--max-model-len", str(spec.max_model_len)]
    if spec.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(spec.tensor_parallel)]
    if spec.dummy_weights:
        command += ["--load-format", "dummy"]
    if spec.hf_overrides:
        command += ["--hf-overrides", json.dumps(spec.hf_overrides, sort_keys=True)]
    speculative = speculative_config(spec)
    if speculative is not None:
        command += ["--speculative-config", json.dumps(speculative)]
    if kind == "cpu":
        command += CPU_ARGUMENTS
    return [*command, *spec.extra_args]


def sglang_command(spec: ServeSpec, *, host: str = "127.0.0.1", port: int = 8000) -> list[str]:
    """The SGLang command line that serves `spec` on GPUs (options of 0.5.23).

    SGLang has no draft lengths by batch and no length from which it stops drafting: `num_speculative_tokens`
    steps of one candidate each, always. Raises BadInput: settings that only vLLM has.
    """
    if spec.extra_args or spec.synthetic_acceptance_length is not None:
        raise BadInput("arguments for vLLM cannot be handed to SGLang", "Leave out the extra arguments.")
    command = ["python", "-m", "sglang.launch_server", "--model-path", str(spec.model)]
    command += ["--served-model-name", spec.served_name, "--host", host, "--port", str(port)]
    if spec.max_model_len is not None:
        command += ["--context-length", str(spec.max_model_len)]
    if spec.tensor_parallel > 1:
        command += ["--tp-size", str(spec.tensor_parallel)]
    if spec.dummy_weights:
        command += ["--load-format", "dummy"]
    if spec.hf_overrides:
        command += ["--json-model-override-args", json.dumps(spec.hf_overrides, sort_keys=True)]
    if spec.draft is not None and spec.num_speculative_tokens:
        tokens = spec.num_speculative_tokens
        command += ["--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(spec.draft)]
        command += ["--speculative-num-steps", str(tokens), "--speculative-eagle-topk", "1"]
        # The tokens verified: the drafts and the one before them.
        command += ["--speculative-num-draft-tokens", str(tokens + 1)]
    return command


def server_environment(spec: ServeSpec, target: Device | None = None) -> dict[str, str]:
    """The whole environment of the server process: ours, vLLM's for this machine, and `spec.env` above all.

    Checkpoints are local, so the hub is switched off; vLLM's usage report is too.
    """
    environment = dict(os.environ)
    if (target or device()) == "cpu":
        environment |= cpu_environment()
    if spec.synthetic_acceptance_length is not None:
        environment[SYNTHETIC_ON_CPU] = "1"
    return environment | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"} | spec.env
