"""Accelerators by their data sheets, and the present machine by measurement."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import yaml

from validation.document import Document
from validation.errors import MeasurementError

GB = 1e9


class Card(Document):
    """One accelerator, in the units of cards.yaml."""

    name: str
    memory_gb: float
    bandwidth_tb_s: float
    bf16_tflops: float
    fp8_tflops: float
    int8_tflops: float
    """10**12 operations a second, as the others."""
    link_gb_s: float
    """To the other cards of a machine, one direction."""


class EngineShare(Document):
    """How much of a card's memory weights and KV cache may have."""

    memory_utilization: float
    reserve_gb: float


class HardwareFile(Document):
    """cards.yaml."""

    cards: dict[str, Card]
    engine: EngineShare


@cache
def hardware_file() -> HardwareFile:
    """The figures that plans and bounds are computed from."""
    text = resources.files("validation.hardware").joinpath("cards.yaml").read_text(encoding="utf-8")
    return HardwareFile.model_validate(yaml.safe_load(text))


class Hardware(Document):
    """`count` cards of one kind."""

    key: str
    count: int
    card: Card

    @property
    def label(self) -> str:
        """As on the command line, for instance `2xh20`."""
        return f"{self.count}x{self.key}"

    @property
    def usable_per_card(self) -> float:
        """Bytes for weights and KV cache on each card."""
        share = hardware_file().engine
        return (self.card.memory_gb * share.memory_utilization - share.reserve_gb) * GB

    @property
    def memory(self) -> float:
        """Bytes of all cards."""
        return self.count * self.card.memory_gb * GB

    def with_count(self, count: int) -> Hardware:
        """So many of the same cards."""
        return self.model_copy(update={"count": count})


def parse_hardware(text: str) -> Hardware:
    """Read `2xh20` (or `h20` for one). Raises MeasurementError: not known."""
    cards = hardware_file().cards
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9-]+)", text.lower())
    if match is None or match[2] not in cards or match[1] == "0":
        raise MeasurementError(
            f"hardware {text!r} is not known",
            f"Give a number x one of {', '.join(cards)}, for instance 2xh20.",
        )
    return Hardware(key=match[2], count=int(match[1] or 1), card=cards[match[2]])


def measure_here(seconds: float = 1.0) -> Card:
    """The present machine: memory bandwidth and matrix rate, of its first GPU or else of its processor.

    A processor's bandwidth is that of reading, by a dot product of 2 x 256 MB, its matrix rate that of
    2048 x 2048; a GPU's are those of a copy of 1 GiB, bytes read and written, and of 8192 x 8192, on random
    numbers. In BF16 by torch where that is installed, as engines compute; else in FP32 by NumPy. The best of
    the repeats that fit in `seconds` each. FP8 and INT8 count as fast as BF16: they are not measured. Links
    are not known: a model is not split here.
    """
    try:
        import torch
    except ImportError:
        return _processor(seconds, None)
    return _gpu(seconds, torch) if torch.cuda.is_available() else _processor(seconds, torch)


def _processor(seconds: float, torch: Any) -> Card:
    import numpy as np

    left, right = (np.ones(1 << 25, dtype=np.float64) for _ in range(2))
    bandwidth = _best(lambda: left @ right, left.nbytes + right.nbytes, seconds)
    matrix: Any
    if torch is None:
        matrix = np.ones((2048, 2048), dtype=np.float32)
    else:
        matrix = torch.ones((2048, 2048), dtype=torch.bfloat16)
    rate = _best(lambda: matrix @ matrix, 2.0 * 2048**3, seconds)
    return _measured(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), bandwidth, rate)


def _gpu(seconds: float, torch: Any) -> Card:
    source = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(8192, 8192, device="cuda").bfloat16()

    def finished(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    bandwidth = _best(finished(lambda: target.copy_(source)), 2.0 * source.numel(), seconds)
    rate = _best(finished(lambda: matrix @ matrix), 2.0 * 8192**3, seconds)
    return _measured(torch.cuda.get_device_properties(0).total_memory, bandwidth, rate)


def _measured(memory: float, bandwidth: float, rate: float) -> Card:
    return Card(
        name="this machine (measured)",
        memory_gb=memory / GB,
        bandwidth_tb_s=bandwidth / 1e12,
        bf16_tflops=rate / 1e12,
        fp8_tflops=rate / 1e12,
        int8_tflops=rate / 1e12,
        link_gb_s=0.0,
    )


def _best(work: Callable[[], object], amount: float, seconds: float) -> float:
    """The highest rate, amount a second, at which `work` was seen to go."""
    began, rate = time.perf_counter(), 0.0
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        rate = max(rate, amount / (time.perf_counter() - start))
    return rate
