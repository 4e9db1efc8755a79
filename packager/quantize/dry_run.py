"""What a conversion would do, told from headers alone: nothing is read, written or computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packager.checkpoint.writer import ShardPlan
from packager.layouts import Expected
from packager.quantize.stream import TensorWork


@dataclass(frozen=True)
class RolePlan:
    """The tensors of one role that share a decision."""

    role: str
    decision: str
    """`quantize`, `keep` or `drop`."""
    stored_as: str
    """Dtype in the output; of all tensors that it becomes, with ` + ` between them."""
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
    works: Mapping[str, TensorWork],
    layout: Mapping[str, Expected],
    shards: Sequence[ShardPlan],
    peak_memory_bytes: int,
) -> DryRun:
    """Sum up a plan.

    Args:
        works: what becomes of each tensor of the source.
        layout: what each of them is, in model order.
        shards: of the output.
    """
    rows: dict[tuple[str, str, str], list[int]] = {}
    for work in works.values():
        stored = " + ".join(spec.dtype for spec in work.stored)
        decision = "quantize" if work.band else "keep" if work.stored else "drop"
        sums = rows.setdefault((work.role, decision, stored), [0, 0, 0, 0])
        output = sum(spec.nbytes for spec in work.stored)
        for at, value in enumerate((1, work.info.count, work.info.nbytes, output)):
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
