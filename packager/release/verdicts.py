"""What a release concludes from accuracy: noise floor, safety items, the cost of each step, and the verdicts.

All from the runs that evidence takes anyway, one more of BF16, and one of the quantized weights with the
draft and without YaRN. Verdicts are on what is shipped, which has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packager.errors import BadInput
from packager.recipe import GatesSpec

if TYPE_CHECKING:
    from validation.gates import Gate
    from validation.matrix import Matrix
    from validation.noise import NoiseFloor
    from validation.panel import Panel
    from validation.safety import SafetyCheck
    from validation.tasks import AccuracyComparison, AccuracyRun, Item

DEFAULT_MARGIN_POINTS = 2.0


def margin_points(spec: GatesSpec) -> float:
    """The loss that verdicts count as none, in points, as the recipe names it beforehand."""
    return spec.accuracy_margin_points or spec.max_accuracy_loss_points or DEFAULT_MARGIN_POINTS


def check_tasks(spec: GatesSpec, items: Sequence[Item]) -> None:
    """Raise BadInput, before anything is served, if a gate names a task of which there are no items."""
    known = {item.task for item in items}
    for key, named in (("task_margins", set(spec.task_margins)), ("safety_tasks", set(spec.safety_tasks))):
        if missing := sorted(named - known):
            raise BadInput(
                f"gates.{key} names {', '.join(missing)}, of which there are no items",
                f"Known: {', '.join(sorted(known))}.",
            )


@dataclass(frozen=True)
class Verdicts:
    """What follows from the accuracy of BF16 and of each variant made from it."""

    comparisons: tuple[AccuracyComparison, ...]
    """Of each variant with BF16; the first is the quantized weights, the last all that is served."""
    noise: NoiseFloor | None
    safety: tuple[SafetyCheck, ...]
    matrix: Matrix

    def gates(self, spec: GatesSpec) -> tuple[Gate, ...]:
        """The verdict on the quantized weights, over all and by task; on all that is served; on safety."""
        from validation.safety import safety_gate
        from validation.verdict import verdict_gates

        return (
            *verdict_gates(spec.accuracy_verdict, self.comparisons[0], spec.task_margins),
            *verdict_gates(spec.served_verdict, self.comparisons[-1]),
            safety_gate(
                self.safety[-1] if self.safety else None,
                spec.max_safety_flips,
                self.comparisons[-1].candidate,
            ),
        )

    def panels(self, spec: GatesSpec) -> tuple[Panel, ...]:
        """Verdicts, the matrix, the noise floor and safety, for the report."""
        from validation.matrix import matrix_panel
        from validation.noise import noise_panel
        from validation.safety import safety_panel
        from validation.verdict import verdict_panel

        return (
            verdict_panel(self.comparisons, rules=(spec.accuracy_verdict, None, spec.served_verdict)),
            matrix_panel(self.matrix),
            *((noise_panel(self.noise, self.comparisons),) if self.noise else ()),
            *((safety_panel(self.safety),) if self.safety else ()),
        )

    def summary(self) -> dict[str, Any]:
        """The figures for the manifest."""
        noise = self.noise
        return {
            "verdicts": {c.candidate: c.overall.verdict for c in self.comparisons},
            "noise_floor": noise and {"flips": noise.flips, "items": noise.comparison.overall.n},
            "safety_lost": {check.candidate: check.beyond_noise for check in self.safety},
            "steps_points": {
                f"{step.after} - {step.before}": [
                    step.paired.difference_points,
                    step.paired.low_points,
                    step.paired.high_points,
                ]
                for step in self.matrix.steps
            },
        }


def conclude(
    spec: GatesSpec,
    weights: str,
    runs: Sequence[AccuracyRun],
    noise: NoiseFloor | None,
    drafted_as_trained: AccuracyRun | None = None,
) -> Verdicts:
    """Compare the variants with BF16 and with one another.

    Args:
        spec: margins and safety tasks.
        weights: what the quantized weights are called.
        runs: of BF16, quantized, quantized with YaRN, and that with the draft, on the same items.
        noise: BF16 asked twice, if it was.
        drafted_as_trained: quantized with the draft and without YaRN, for the matrix alone.

    Raises:
        MeasurementError: the runs do not pair.
    """
    from validation.matrix import Variant, build_matrix
    from validation.safety import check_safety
    from validation.tasks import compare_accuracy

    margin = margin_points(spec)
    reference, *candidates = runs
    added = ((), (weights,), (weights, "YaRN"), (weights, "YaRN", "EAGLE3"))
    variants = [Variant(run, frozenset(features)) for run, features in zip(runs, added, strict=True)]
    if drafted_as_trained is not None:
        variants.insert(2, Variant(drafted_as_trained, frozenset((weights, "EAGLE3"))))
    checks = (
        check_safety(reference, run, margin_points=margin, tasks=spec.safety_tasks, noise=noise)
        for run in candidates
    )
    return Verdicts(
        comparisons=tuple(
            compare_accuracy(reference, run, margin_points=margin, task_margins=spec.task_margins)
            for run in candidates
        ),
        noise=noise,
        safety=tuple(check for check in checks if check is not None),
        matrix=build_matrix(
            variants,
            margin_points=margin,
            wanted=[frozenset((weights, "EAGLE3"))],
        ),
    )
