"""The matrix: variants that differ in named features, and what each feature costs apart from the others.

A feature's cost is the paired difference of two variants that differ in nothing else. Successive variants
that differ in more than one feature give the cost of all of these together, and are said to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from validation.document import Document
from validation.errors import MeasurementError
from validation.panel import Column, Panel, Table
from validation.tasks.accuracy import AccuracyRun, Share
from validation.tasks.comparison import Paired, compare_accuracy, looked_at_together


@dataclass(frozen=True)
class Variant:
    """A run and the features that set it apart from the reference, which has none."""

    run: AccuracyRun
    features: frozenset[str]


class MatrixCell(Document):
    """One variant's accuracy."""

    label: str
    subject: str
    features: tuple[str, ...]
    share: Share


class Step(Document):
    """What adding features to one variant to get another costs."""

    added: tuple[str, ...]
    before: str
    after: str
    apart: bool
    """Whether one feature alone was added."""
    paired: Paired
    """p_holm is adjusted over the steps."""


class Matrix(Document):
    """Variants measured on the same items, the steps between them, and the way from first to last."""

    schema_version: int = 1
    items_digest: str
    cells: tuple[MatrixCell, ...]
    steps: tuple[Step, ...]
    total: Paired
    """The last variant against the first."""
    missing: tuple[tuple[str, ...], ...]
    """Combinations of features that were wanted and not measured."""


def build_matrix(
    variants: Sequence[Variant], *, margin_points: float, wanted: Sequence[frozenset[str]] = ()
) -> Matrix:
    """The cost of each step that the variants measured allow.

    Every two variants that differ in one feature make a step; a variant that is no such step from any other
    is compared with the one before it.

    Args:
        variants: runs on the same items, the reference first.
        margin_points: margin of the verdicts.
        wanted: combinations of features that a whole matrix has; those not among the variants are `missing`.

    Raises:
        MeasurementError: fewer than two variants, two with the same features, or runs that do not pair.
    """
    if len(variants) < 2:
        raise MeasurementError("a matrix needs two variants at least")
    if len({v.features for v in variants}) < len(variants):
        raise MeasurementError("two variants of the matrix have the same features")
    ways: list[tuple[Variant, Variant]] = []
    for at, after in enumerate(variants):
        single = [
            v for v in variants if v.features < after.features and len(after.features - v.features) == 1
        ]
        ways += [(before, after) for before in single or variants[max(0, at - 1) : at]]
    paired = looked_at_together(
        [
            compare_accuracy(before.run, after.run, margin_points=margin_points).overall
            for before, after in ways
        ]
    )
    return Matrix(
        items_digest=variants[0].run.items_digest,
        cells=tuple(
            MatrixCell(
                label=v.run.label,
                subject=v.run.subject,
                features=tuple(sorted(v.features)),
                share=v.run.overall,
            )
            for v in variants
        ),
        steps=tuple(
            Step(
                added=tuple(sorted(after.features - before.features)),
                before=before.run.label,
                after=after.run.label,
                apart=len(after.features ^ before.features) == 1,
                paired=row,
            )
            for (before, after), row in zip(ways, paired, strict=True)
        ),
        total=compare_accuracy(variants[0].run, variants[-1].run, margin_points=margin_points).overall,
        missing=tuple(tuple(sorted(w)) for w in wanted if w not in {v.features for v in variants}),
    )


def matrix_panel(matrix: Matrix) -> Panel:
    """Accuracy of each variant and the cost of each step."""
    rows = [
        (
            " + ".join(step.added) or "other features",
            step.before,
            "yes" if step.apart else "no",
            step.paired,
        )
        for step in matrix.steps
    ]
    first, last = matrix.cells[0].label, matrix.cells[-1].label
    rows.append((f"all, to {last}", first, "no", matrix.total))
    missing = "; ".join(" + ".join(combination) for combination in matrix.missing)
    return Panel(
        key="matrix",
        title="What each step costs",
        summary="; ".join(
            f"{added} on {before}: {row.difference_points:+.2f} points ({row.low_points:+.2f} to "
            f"{row.high_points:+.2f})"
            for added, before, _, row in rows
        )
        + ".",
        tables=(
            Table(
                caption="Variants",
                columns=(
                    Column(name="Variant", kind="text"),
                    Column(name="Features", kind="text"),
                    Column(name="Items", digits=0),
                    Column(name="Accuracy", unit="%", digits=2),
                    Column(name="Low", unit="%", digits=2),
                    Column(name="High", unit="%", digits=2),
                ),
                rows=tuple(
                    (
                        cell.label,
                        ", ".join(cell.features) or "none",
                        cell.share.n,
                        100 * cell.share.accuracy,
                        100 * cell.share.low,
                        100 * cell.share.high,
                    )
                    for cell in matrix.cells
                ),
            ),
            Table(
                caption="Steps",
                columns=(
                    Column(name="Added", kind="text"),
                    Column(name="To", kind="text"),
                    Column(name="Apart", kind="text"),
                    Column(name="Difference", unit="points", digits=2),
                    Column(name="Low", unit="points", digits=2),
                    Column(name="High", unit="points", digits=2),
                    Column(name="Lost", digits=0),
                    Column(name="Gained", digits=0),
                    Column(name="p, Holm", digits=4),
                    Column(name="Verdict", kind="text"),
                ),
                rows=tuple(
                    (
                        added,
                        before,
                        apart,
                        row.difference_points,
                        row.low_points,
                        row.high_points,
                        row.only_reference,
                        row.only_candidate,
                        row.p_holm,
                        row.verdict,
                    )
                    for added, before, apart, row in rows
                ),
            ),
        ),
        notes=(
            "Each step is paired over the same items; its interval is Tango's, its p adjusted by Holm over "
            "the steps. Apart: the two variants differ in that feature alone.",
            *((f"Not measured: {missing}.",) if missing else ()),
        ),
        subjects=tuple(dict.fromkeys(cell.subject for cell in matrix.cells)),
    )
