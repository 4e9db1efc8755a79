"""A release's rubrics, over real HTTP: the nano's own, a recipe's, and what reads "not measured"."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from loopback_chat import LoopbackChat
from test_release import reduced_nano

from packager.nano.rubric_judge import MODEL, RubricJudge
from packager.nano.rubrics import rubric_rows, write_rubrics
from packager.recipe import GatesSpec, Recipe, load_recipe
from packager.release.rubrics import conclude_rubrics, rubric_inputs, rubric_measurement, rubric_trouble
from packager.release.served import Served
from validation.endpoint import Sampling, Target
from validation.errors import MeasurementError

GATES = GatesSpec(max_rubric_loss_points=5, max_new_rubric_harm=0)


@dataclass
class Running:
    """A variant whose server runs already."""

    label: str
    server: LoopbackChat

    def target(self, cache: Path) -> Target:
        return Target(self.server.url, "model", self.label, self.label, cache)


IDEAL = {row["prompt"][-1]["content"]: row["ideal_completions_data"] for row in rubric_rows(4)}


def ideal(question: str) -> str:
    return str(IDEAL[question]["ideal_completion"])


def outcomes(recipe: Recipe, cache: Path, asked: list[int] | None = None) -> dict[str, str]:
    said: list[str] = []
    with (
        LoopbackChat(ideal) as right,
        LoopbackChat(lambda q: "Answer: 9999 mg" if "mg/kg" in q else ideal(q)) as wrong,
        rubric_measurement(recipe, cache, Sampling(max_tokens=128), said.append) as measured,
    ):
        if measured is not None:
            for label, server in (("BF16", right), ("FP8", wrong)):
                measured.measure(cast(Served, Running(label, server)))
        found = conclude_rubrics(GATES, measured)
        if asked is not None:
            asked.append(len(right.bodies) + len(wrong.bodies))
    assert [panel.subjects for panel in found.panels()] == ([("BF16", "FP8")] if measured else [])
    assert len(said) == (2 if measured else 0)
    return {gate.name.partition(": ")[2].partition(" of ")[0]: gate.outcome for gate in found.gates(GATES)}


def with_rubrics(path: Path, **section: Any) -> Recipe:
    document = yaml.safe_load(reduced_nano(path).read_text(encoding="utf-8"))
    document["validate"]["healthbench"] = section
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return load_recipe(path)


def test_the_nano_brings_rubrics_and_judge_and_a_loss_fails(tmp_path: Path) -> None:
    recipe = load_recipe(reduced_nano(tmp_path / "recipe.yaml"))
    asked: list[int] = []
    found = outcomes(recipe, tmp_path / "cache", asked)
    assert list(found.values()) == ["fail", "fail"] and asked == [48]
    assert outcomes(recipe, tmp_path / "cache", asked) == found and asked == [48, 0]
    assert rubric_inputs(recipe) == {}


@pytest.mark.slow
def test_a_recipe_names_rows_judge_and_meta_and_without_meta_nothing_counts(tmp_path: Path) -> None:
    paths = write_rubrics(tmp_path, per_task=4, meta_per_task=4)
    with RubricJudge() as judge:
        section = {"rows": str(paths["rows"]), "judge_url": judge.url, "judge_model": MODEL}
        recipe = with_rubrics(tmp_path / "a.yaml", **section, meta=str(paths["meta"]))
        assert list(outcomes(recipe, tmp_path / "cache").values()) == ["fail", "fail"]
        assert set(rubric_inputs(recipe)) == {"rubrics", "rubric meta-evaluation"}
        recipe = with_rubrics(tmp_path / "b.yaml", **section)
        assert list(outcomes(recipe, tmp_path / "cache").values()) == ["not measured", "not measured"]
    recipe = with_rubrics(tmp_path / "c.yaml", **section | {"rows": str(tmp_path)})
    with pytest.raises(MeasurementError) as missing:
        rubric_inputs(recipe)
    assert "hf download openai/healthbench" in missing.value.remedy
    # The dry run says all of it at once.
    recipe = with_rubrics(tmp_path / "d.yaml", **section | {"rows": str(tmp_path), "judge_key_env": "NO_KEY"})
    rows, meta, key = rubric_trouble(recipe)
    assert "hf download" in rows and "does not count" in meta and "NO_KEY" in key


def test_a_bound_on_what_the_recipe_cannot_measure_reads_not_measured(tmp_path: Path) -> None:
    recipe = load_recipe(reduced_nano(tmp_path / "recipe.yaml", source={"path": str(tmp_path)}))
    assert list(outcomes(recipe, tmp_path / "cache").values()) == ["not measured", "not measured"]
