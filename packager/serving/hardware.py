"""Accelerators a plan knows, and what an engine leaves of their memory; the figures are in hardware.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml
from pydantic import BaseModel, ConfigDict

from packager.errors import UsageProblem

GB = 1e9


class Card(BaseModel):
    """One accelerator, in the units of hardware.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_gb: float
    bandwidth_tb_s: float
    bf16_tflops: float
    fp8_tflops: float
    int8_tflops: float
    """10**12 operations a second, as the others."""


class EngineShare(BaseModel):
    """How much of a card's memory weights and KV cache may have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_utilization: float
    reserve_gb: float


class HardwareFile(BaseModel):
    """hardware.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cards: dict[str, Card]
    engine: EngineShare


@cache
def hardware_file() -> HardwareFile:
    """The figures that plans are computed from."""
    text = resources.files("packager.serving").joinpath("hardware.yaml").read_text(encoding="utf-8")
    return HardwareFile.model_validate(yaml.safe_load(text))


@dataclass(frozen=True)
class Hardware:
    """`count` cards of one kind; a model is split over all of them (tensor parallelism)."""

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


def parse_hardware(text: str) -> Hardware:
    """Read `2xh20` (or `h20` for one). Raises UsageProblem: unknown."""
    cards = hardware_file().cards
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9-]+)", text.lower())
    if match is None or match[2] not in cards or match[1] == "0":
        raise UsageProblem(
            f"hardware {text!r} is not known",
            f"Give a number x one of {', '.join(cards)}, for instance 2xh20.",
        )
    return Hardware(match[2], int(match[1] or 1), cards[match[2]])
