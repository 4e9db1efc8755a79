"""Recipes: data with a stable digest; whatever is not understood is an error that says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from packager.errors import BadInput
from packager.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def _nano(tmp_path: Path, **changes: Any) -> Path:
    """A copy of the nano recipe with keys (`section__key`) set, or removed where the value is None."""
    document = yaml.safe_load((RECIPES / "nano.yaml").read_text())
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        place = document
        for section in sections:
            place = place[section]
        if value is None:
            del place[key]
        else:
            place[key] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_named_for_what_they_make(path: Path) -> None:
    recipe = load_recipe(path)
    assert "fp8" in recipe.name
    assert "eagle3" in recipe.name
    assert recipe.gates.max_accuracy_loss_points is not None


def test_the_digest_follows_the_settings_and_nothing_else(tmp_path: Path) -> None:
    plain = load_recipe(RECIPES / "nano.yaml")
    reordered = load_recipe(_nano(tmp_path))  # safe_dump sorts the keys and drops the comments
    changed = load_recipe(_nano(tmp_path, draft__seed=1))
    assert reordered.digest == plain.digest
    assert changed.digest != plain.digest
    assert changed.draft.digest != plain.draft.digest
    assert changed.quantize.digest == plain.quantize.digest


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"colour": "blue"}, "colour"),
        ({"draft__stpes": 3}, "draft.stpes"),
        ({"context__length": "long"}, "context.length"),
        ({"context__length": 0}, "context.length"),
        ({"quantize__scheme": "fp9"}, "quantize.scheme"),
        ({"publish__target": None}, "publish.target"),
        ({"source__repo": "org/name"}, "exactly one of `path` and `repo`"),
        ({"source__path": None}, "exactly one of `path` and `repo`"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    path = _nano(tmp_path, **changes)
    with pytest.raises(BadInput) as caught:
        load_recipe(path)
    assert where in caught.value.message
    assert str(path) in caught.value.message


def test_all_wrong_keys_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load_recipe(_nano(tmp_path, colour="blue", draft__steps=0))
    assert "colour" in caught.value.message
    assert "draft.steps" in caught.value.message


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "\t", "", "a: 1\na: 2\n"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(BadInput):
        load_recipe(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / "nano.yaml").read_text() + "\nhardware: 2xh20\n")
    with pytest.raises(BadInput, match="'hardware' is given twice"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_missing_recipe_and_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput):
        load_recipe(tmp_path / name)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load_recipe(RECIPES / "nano.yaml")
    with pytest.raises(ValidationError):
        recipe.hardware = "2xh20"  # type: ignore[misc]
