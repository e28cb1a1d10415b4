"""Each training recipe fits the command that reads it."""

from pathlib import Path

import pytest

import vlmoe.configuration
from vlmoe.training.arguments import prepared_arguments
from vlmoe.training.recipes import read_recipe

RECIPES = sorted((Path(vlmoe.configuration.__path__[0]) / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_holds_only_options_of_vlmoe_train(recipe: Path, tmp_path: Path) -> None:
    data, given = read_recipe(recipe.stem, output_dir=str(tmp_path), use_cpu=True)
    arguments = prepared_arguments(given, "tiny", data.has_evaluation)
    assert data.dataset in ("easy_vqa", "easy_vqa_captions")
    assert arguments.learning_rate == 1e-3
    assert arguments.output_dir == str(tmp_path)


def test_there_are_recipes_for_each_stage_of_the_demo() -> None:
    stages = {"easy_vqa_captions", "easy_vqa", "easy_vqa_question_only"}
    assert stages == {recipe.stem for recipe in RECIPES}
