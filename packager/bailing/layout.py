"""Every tensor of a BailingMoeV2 checkpoint: its role, shape and dtype, derived from the configuration.

The declaration is `packager.layouts.architectures.BAILING_MOE_V2`; here it meets `BailingConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable

from packager.bailing.config import BailingConfig
from packager.layouts import (
    QUANTIZABLE,
    Expected,
    Model,
    ParameterCount,
    Role,
    layout_problems,
    require_layout,
)
from packager.layouts import count_parameters as count_model_parameters
from packager.layouts.architectures import BAILING_MOE_V2

__all__ = [
    "QUANTIZABLE",
    "Expected",
    "ParameterCount",
    "Role",
    "count_parameters",
    "expected_tensors",
    "layout_problems",
    "model_of",
    "mtp_layers_in",
    "require_layout",
]


def model_of(config: BailingConfig) -> Model:
    """The configuration as the layouts of all architectures take it."""
    return Model.of(BAILING_MOE_V2, config.model_dump())


def expected_tensors(config: BailingConfig, mtp_layers: int = 0) -> list[Expected]:
    """All tensors of a checkpoint, in model order, before any quantization.

    Args:
        config: the configuration.
        mtp_layers: multi-token prediction layers present; the first has index `num_hidden_layers`.
    """
    return model_of(config).tensors(mtp_layers=mtp_layers)


def mtp_layers_in(config: BailingConfig, names: Iterable[str]) -> int:
    """How many multi-token prediction layers a checkpoint with these tensor names has."""
    return model_of(config).mtp_layers_in(names)


def count_parameters(config: BailingConfig, mtp_layers: int = 0) -> ParameterCount:
    """Count from the configuration alone."""
    return count_model_parameters(model_of(config), mtp_layers)
