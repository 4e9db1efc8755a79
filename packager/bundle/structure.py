"""The weights of a bundle against what engines will look for: headers, index, and the model's own layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packager.errors import BadInput

_NOT_OF_THE_FILES = frozenset({"engine", "parallel"})
"""What an engine cannot serve has its place in the evidence; the bytes are no less what was released."""


@dataclass(frozen=True)
class WeightsCheck:
    """What was found."""

    problems: list[str]
    looked_at: str
    """What the headers were held against."""


def check_weights(bundle: Path) -> WeightsCheck:
    """Headers and index of target and draft; tensors against the layout that config.json declares.

    The layout is checked where it is one of the declared architectures; another kind of model has only its
    headers and index to be held against. No data is read.
    """
    from packager.proof.files import WeightFiles
    from packager.proof.structure import check_structure

    problems: list[str] = []
    for folder in (bundle / "draft",) if (bundle / "draft").is_dir() else ():
        try:
            with WeightFiles.open(folder) as files:
                problems += [f"draft/{text}" for text in files.problems]
        except BadInput as err:
            problems.append(err.message)
    try:
        found = check_structure(bundle, read_data=False)
    except BadInput as err:
        with WeightFiles.open(bundle) as files:
            return WeightsCheck(problems + files.problems, f"headers and index only: {err.message}")
    problems += [str(problem) for problem in found.problems if problem.kind not in _NOT_OF_THE_FILES]
    return WeightsCheck(problems, f"{found.quantized + found.kept} tensors as {found.architecture} has them")
