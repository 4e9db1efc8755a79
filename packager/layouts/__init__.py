"""What every tensor of a checkpoint is, declared a line a kind, and what becomes of it.

`recognise(config)` gives a `Model`; `Model.tensors()` all that its checkpoint must hold; `decide` matches
each tensor of a checkpoint to exactly one rule, or raises one error that lists all that fit none.
"""

from packager.layouts.architectures import ARCHITECTURES
from packager.layouts.decide import Decisions, decide, layout_problems, require_layout
from packager.layouts.declaration import (
    FLOATS,
    NEVER_QUANTIZED,
    QUANTIZABLE,
    Architecture,
    Do,
    Expected,
    Role,
)
from packager.layouts.described import Described
from packager.layouts.model import Model, ParameterCount, architecture_of, count_parameters, recognise
from packager.layouts.prediction import PredictionLayers

__all__ = [
    "ARCHITECTURES",
    "FLOATS",
    "NEVER_QUANTIZED",
    "QUANTIZABLE",
    "Architecture",
    "Decisions",
    "Described",
    "Do",
    "Expected",
    "Model",
    "ParameterCount",
    "PredictionLayers",
    "Role",
    "architecture_of",
    "count_parameters",
    "decide",
    "layout_problems",
    "recognise",
    "require_layout",
]
