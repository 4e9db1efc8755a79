"""What a conversion would do, told from headers alone: nothing is read, written or computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packager.bailing.layout import Expected
from packager.checkpoint.header import TensorInfo
from packager.checkpoint.writer import ShardPlan, TensorSpec


@dataclass(frozen=True)
class RolePlan:
    """The tensors of one role that share a decision."""

    role: str
    decision: str
    """`quantize`, `keep` or `drop`."""
    stored_as: str
    """Dtype in the output; with `+ F32` where a scale goes with it."""
    tensors: int
    parameters: int
    source_bytes: int
    output_bytes: int
    """Scales included."""


@dataclass(frozen=True)
class DryRun:
    """A conversion planned, not done."""

    source: str
    """Path, or `hf://org/name@commit`."""
    scheme: str
    roles: tuple[RolePlan, ...]
    """In the order in which the model has them."""
    shards: int
    source_bytes: int
    output_bytes: int
    """Data and headers of all output shards."""
    peak_memory_bytes: int
    """Of the process, estimated: libraries included."""


def plan_dry_run(
    source: str,
    scheme: str,
    tensors: Mapping[str, TensorInfo],
    layout: Mapping[str, Expected],
    shards: Sequence[ShardPlan],
    peak_memory_bytes: int,
) -> DryRun:
    """Sum up a plan.

    Args:
        tensors: of the source.
        layout: what each of them is.
        shards: of the output; a weight that is in none is dropped, a tensor that is not in the source is the
            scale of the one before it.
    """
    written: dict[str, list[TensorSpec]] = {}
    for group in _groups((spec for plan in shards for spec in plan.tensors), tensors):
        written[group[0].name] = group
    rows: dict[tuple[str, str, str], list[int]] = {}
    for name, info in tensors.items():
        group = written.get(name, [])
        stored = " + ".join(spec.dtype for spec in group)
        decision = "drop" if not group else "keep" if stored == info.dtype else "quantize"
        sums = rows.setdefault((str(layout[name].role), decision, stored), [0, 0, 0, 0])
        output = sum(spec.nbytes for spec in group)
        for at, value in enumerate((1, info.count, info.nbytes, output)):
            sums[at] += value
    order = {str(want.role): at for at, want in reversed(list(enumerate(layout.values())))}
    roles = tuple(RolePlan(*key, *rows[key]) for key in sorted(rows, key=lambda key: (order[key[0]], key)))
    return DryRun(
        source=source,
        scheme=scheme,
        roles=roles,
        shards=len(shards),
        source_bytes=sum(row.source_bytes for row in roles),
        output_bytes=sum(row.output_bytes for row in roles) + sum(len(plan.header) for plan in shards),
        peak_memory_bytes=peak_memory_bytes,
    )


def _groups(specs: Iterable[TensorSpec], tensors: Mapping[str, TensorInfo]) -> list[list[TensorSpec]]:
    """Each tensor of the source with the scales written right after it."""
    groups: list[list[TensorSpec]] = []
    for spec in specs:
        if spec.name in tensors or not groups:
            groups.append([])
        groups[-1].append(spec)
    return groups
