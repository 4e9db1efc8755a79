"""Public benchmarks in a release: BF16 and the quantized weights answer the same items, and are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packager.recipe import BenchmarkSpec, GatesSpec

if TYPE_CHECKING:
    from validation.endpoint import Target
    from validation.gates import Gate
    from validation.panel import Panel
    from validation.public_benchmarks import BenchmarkRun
    from validation.tasks import AccuracyComparison

Say = Callable[[str], None]


def check_benchmarks(specs: Sequence[BenchmarkSpec]) -> None:
    """Load every task and its data before anything is served.

    Raises:
        MeasurementError: a name is not known, data is missing (with the command that gets it), or a task
            would run code that the model wrote; or the data has not the digest that the recipe names.
    """
    if not specs:
        return
    from validation.public_benchmarks import describe, load_tasks

    for spec in specs:
        data, include = _path(spec.data), _path(spec.include)
        tasks = load_tasks(spec.tasks, data=data, include=include, fewshot=spec.fewshot)
        describe(tasks, spec.limit, spec.digests)


def measure_benchmarks(specs: Sequence[BenchmarkSpec], target: Target, say: Say) -> tuple[BenchmarkRun, ...]:
    """Each entry of the recipe as one variant answers it; what the cache holds is not asked again."""
    if not specs:
        return ()
    from validation.public_benchmarks import measure_benchmarks as measure

    runs = []
    for spec in specs:
        run = measure(
            target,
            spec.tasks,
            style=spec.style,
            data=_path(spec.data),
            include=_path(spec.include),
            limit=spec.limit,
            fewshot=spec.fewshot,
            max_tokens=spec.max_tokens,
            expected=spec.digests,
        )
        if run.items is not None:
            right = f"{run.items.overall.correct} of {run.items.overall.n} right"
            say(f"  {target.label}, {', '.join(spec.tasks)} ({spec.style}): {right}")
        runs.append(run)
    return tuple(runs)


@dataclass(frozen=True)
class Benchmarks:
    """The quantized weights' runs, each with its comparison; None: no item of it is right or wrong."""

    runs: tuple[tuple[BenchmarkRun, AccuracyComparison | None], ...]

    @classmethod
    def compare(
        cls,
        specs: Sequence[BenchmarkSpec],
        before: Sequence[BenchmarkRun],
        after: Sequence[BenchmarkRun],
        margin_points: float,
    ) -> Benchmarks:
        """Pair the runs of BF16 and of the quantized weights."""
        from validation.public_benchmarks import compare_benchmarks

        return cls(
            tuple(
                (
                    b,
                    compare_benchmarks(a, b, margin_points=spec.margin_points or margin_points)
                    if a.items and b.items
                    else None,
                )
                for spec, a, b in zip(specs, before, after, strict=True)
            )
        )

    def gates(self, spec: GatesSpec) -> tuple[Gate, ...]:
        """The recipe's rule on each entry's items."""
        from validation.verdict import verdict_gates

        return tuple(
            gate.model_copy(update={"name": f"{', '.join(run.names)} ({run.style}): {gate.name}"})
            for run, comparison in self.runs
            if comparison is not None
            for gate in verdict_gates(spec.accuracy_verdict, comparison)
        )

    def panels(self) -> tuple[Panel, ...]:
        """One for each entry."""
        from validation.public_benchmarks import benchmarks_panel

        return tuple(
            benchmarks_panel(run, comparison, part=number if len(self.runs) > 1 else None)
            for number, (run, comparison) in enumerate(self.runs, 1)
        )


def _path(text: str | None) -> Path | None:
    return Path(text).expanduser() if text is not None else None
