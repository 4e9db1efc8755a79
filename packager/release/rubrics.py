"""Rubric scores in a release: BF16 and the quantized weights by one qualified judge.

A recipe names rows, judge and meta-evaluation under `validate.healthbench`. The nano brings its own: rubrics
over the questions that accuracy has asked already, and a judge by rule on loopback. Without either, rubric
scores are not measured, and a bound on them reads so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from packager.artifact import file_sha256
from packager.errors import BadInput
from packager.recipe import GatesSpec, HealthBenchSpec, Recipe
from packager.release.served import Served

if TYPE_CHECKING:
    from validation.endpoint import Sampling
    from validation.gates import Gate
    from validation.healthbench import Judge, MetaRows, Qualification, RubricComparison, RubricRun, Rubrics
    from validation.panel import Panel

NANO_ROWS = 20
"""Conversations of each task of the nano's rubrics, at most."""
NANO_MIN_BALANCED_F1 = 0.9
"""Of the judge by rule; the raters of the nano's meta-evaluation differ by design, so 1 is out of reach."""
MARGIN_POINTS = 2.0
"""Loss that still counts as none if the recipe bounds none."""


@dataclass
class RubricMeasurement:
    """Measures variants one after another; the first is the reference."""

    rubrics: Rubrics
    judge: Judge
    meta: MetaRows | None
    min_balanced_f1: float
    sampling: Sampling
    cache: Path
    say: Callable[[str], None]
    runs: list[RubricRun] = field(default_factory=list)
    _qualification: Qualification | None = None

    def measure(self, served: Served) -> None:
        """Ask a variant, grade its answers; the judge is qualified before the first."""
        from validation.healthbench import measure_rubrics, qualify

        if self.meta is not None and self._qualification is None:
            self._qualification = qualify(self.judge, self.meta, min_balanced_f1=self.min_balanced_f1)
        run = measure_rubrics(
            served.target(self.cache),
            self.judge,
            self.rubrics,
            qualification=self._qualification,
            sampling=self.sampling,
        )
        self.runs.append(run)
        score = "no score" if run.overall.score is None else f"{100 * run.overall.score:.1f} of 100"
        self.say(f"  {served.label}: {score} by rubrics" + ("" if run.counts else ", which does not count"))


@dataclass(frozen=True)
class RubricEvidence:
    """What was measured by rubrics; empty: nothing was."""

    runs: tuple[RubricRun, ...] = ()
    comparisons: tuple[RubricComparison, ...] = ()

    def panels(self) -> tuple[Panel, ...]:
        """The panel of the report."""
        from validation.healthbench import rubric_panel

        return (rubric_panel(self.runs, self.comparisons),) if self.runs else ()

    def gates(self, spec: GatesSpec) -> tuple[Gate, ...]:
        """Loss and new harm against their bounds; "not measured" of what is bounded and was not."""
        from validation.gates import at_most
        from validation.healthbench import rubric_gates

        bounds = {"max_loss_points": spec.max_rubric_loss_points, "max_new_harm": spec.max_new_rubric_harm}
        if not self.comparisons:
            names = ("rubrics: loss against BF16", "rubrics: harm criteria newly met")
            return tuple(
                at_most(name, None, bound)
                for name, bound in zip(names, bounds.values(), strict=True)
                if bound is not None
            )
        found = self.comparisons[0]
        _score, *gates = rubric_gates(
            self.runs[1],
            found,
            max_loss_points=spec.max_rubric_loss_points,
            max_new_harm=spec.max_new_rubric_harm,
        )
        return tuple(gates)


@contextmanager
def rubric_measurement(
    recipe: Recipe, cache: Path, sampling: Sampling, say: Callable[[str], None]
) -> Iterator[RubricMeasurement | None]:
    """What measures rubrics in this release; None: the recipe names none.

    Args:
        recipe: see `validate.healthbench`.
        cache: folder of answers and judgements.
        sampling: of accuracy; the nano's rubrics ask the same questions with it.
        say: takes progress.

    Raises:
        BadInput: the judge's key is missing from the environment.
        MeasurementError: rows or meta-evaluation are missing or malformed.
    """
    from validation.endpoint import Sampling
    from validation.healthbench import Judge, load_meta, load_rubrics

    spec = recipe.validate_.healthbench
    if spec is not None:
        yield RubricMeasurement(
            rubrics=load_rubrics(Path(spec.rows), subset=spec.subset, digest=spec.rows_digest).sample(
                spec.examples, recipe.validate_.seed
            ),
            judge=Judge(
                spec.judge_url,
                spec.judge_model,
                spec.judge_subject or f"{spec.judge_model} at {spec.judge_url}",
                cache,
                api_key=_key(spec),
            ),
            meta=load_meta(Path(spec.meta)) if spec.meta is not None else None,
            min_balanced_f1=spec.min_balanced_f1,
            sampling=Sampling(
                max_tokens=spec.max_output_tokens, seed=recipe.validate_.seed, top_logprobs=None
            ),
            cache=cache,
            say=say,
        )
        return
    if not recipe.source.packaged:
        yield None
        return
    from packager.nano.rubric_judge import MODEL, RubricJudge
    from packager.nano.rubrics import write_rubrics

    paths = write_rubrics(
        cache / "nano-rubrics", min(NANO_ROWS, recipe.validate_.items_per_task), seed=recipe.validate_.seed
    )
    with RubricJudge() as served:
        yield RubricMeasurement(
            rubrics=load_rubrics(paths["rows"]),
            judge=Judge(served.url, MODEL, served.subject, cache, name="judge by rule"),
            meta=load_meta(paths["meta"]),
            min_balanced_f1=NANO_MIN_BALANCED_F1,
            sampling=sampling,
            cache=cache,
            say=say,
        )


def conclude_rubrics(spec: GatesSpec, measured: RubricMeasurement | None) -> RubricEvidence:
    """The runs, each compared with the first."""
    from validation.healthbench import compare_rubrics

    if measured is None:
        return RubricEvidence()
    first, *others = measured.runs
    margin = spec.max_rubric_loss_points or MARGIN_POINTS
    return RubricEvidence(
        tuple(measured.runs),
        tuple(compare_rubrics(first, other, margin_points=margin) for other in others),
    )


def rubric_inputs(recipe: Recipe) -> dict[str, str]:
    """The rubric files that a recipe names, by digest.

    Raises:
        MeasurementError: a file is missing; says the command that gets it.
    """
    from validation.healthbench import rubric_file

    spec = recipe.validate_.healthbench
    if spec is None:
        return {}
    files = {"rubrics": rubric_file(Path(spec.rows), spec.subset)}
    if spec.meta is not None:
        files["rubric meta-evaluation"] = rubric_file(Path(spec.meta), "meta")
    return {name: f"sha256:{file_sha256(file)}" for name, file in files.items()}


def rubric_trouble(recipe: Recipe) -> list[str]:
    """Why rubrics would not be measured here, or not count, one sentence each."""
    from validation.errors import MeasurementError
    from validation.healthbench import rubric_file

    spec = recipe.validate_.healthbench
    if spec is None:
        return []
    found = []
    try:
        rubric_file(Path(spec.rows), spec.subset)
        if spec.meta is not None:
            rubric_file(Path(spec.meta), "meta")
    except MeasurementError as err:
        found.append(f"validate.healthbench: {err.message}. {err.remedy}")
    if spec.meta is None:
        found.append("validate.healthbench.meta: without a meta-evaluation the judge's score does not count")
    if spec.judge_key_env is not None and not os.environ.get(spec.judge_key_env):
        found.append(f"validate.healthbench: {spec.judge_key_env} holds no key for the judge")
    return found


def _key(spec: HealthBenchSpec) -> str | None:
    if spec.judge_key_env is None:
        return None
    key = os.environ.get(spec.judge_key_env)
    if not key:
        raise BadInput(
            f"the environment variable {spec.judge_key_env} holds no key for the judge",
            "Set it, or correct validate.healthbench.judge_key_env.",
        )
    return key
