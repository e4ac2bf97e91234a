"""Recipes: what is wrong is said with its place and the closest right name, before anything heavy starts."""

from itertools import pairwise
from pathlib import Path

import pytest

from tidegate.nn.schedule import factor
from tidegate.train.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"trainign": {}}, "trainign: there is no such key, did you mean 'training'?"),
        ({"training": {"stesp": 1}}, "training.stesp: there is no such key, did you mean 'steps'?"),
        ({"training": {"steps": "many"}}, "training.steps: wanted a valid integer, .*seen 'many'"),
        ({"training": {"steps": 0}}, "training.steps: wanted greater than or equal to 1, seen 0"),
        (
            {"training": {"schedule": "linear"}},
            "training.schedule: wanted 'wsd', 'cosine' or 'constant', seen 'linear'",
        ),
        ({"training": {"batch_size": 5, "devices": 2}}, r"training.batch_size: 5 rows cannot be shared .* take 6"),
        ({"training": 7}, "training: .*seen 7"),
        ({"model": {"mixer": "gal"}}, "model: mixer: there is no 'gal', did you mean 'gla'?"),
        ({"model": {"mixer": "gla", "options": {"num_head": 2}}}, "model: gla: no option 'num_head', did you mean"),
        ({"model": {"mixer": "gla", "dim": 30, "options": {"num_heads": 4}}}, "model: .*30"),
        ({"model": {"layers": 0}}, "model: layers: the list is empty"),
        ({"model": {"layers": "2*gla,retnt"}}, "model: mixer: there is no 'retnt', did you mean 'retnet'"),
        (
            {"model": {"network": {"droput": 0.1}}},
            "model: network: there is no option 'droput', did you mean 'dropout'",
        ),
        ({"model": {"network": {"dropout": 2}}}, "model: dropout: seen 2"),
        ({"model": {"layers": 1.5}}, "model.layers: wanted a number, a pattern or a list of mixer names, seen 1.5"),
        ({"model": {"layers": ["gla", {"retnet": {"x": 1}}]}}, "model: retnet: no option 'x'"),
        ([1], "seen list, wanted sections"),
    ],
)
def test_wrong_recipe_is_one_line(content, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.parse(content)
    assert "\n" not in str(caught.value)


def test_file_errors_name_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(FileNotFoundError, match=r"recipe.yaml: no such recipe file"):
        Recipe.load(path)
    path.write_text("training: {steps: [}")
    with pytest.raises(ValueError, match=r"recipe.yaml: not valid YAML"):
        Recipe.load(path)
    path.write_text("training:\n  steps: no\n")
    with pytest.raises(ValueError, match=r"recipe.yaml: training.steps"):
        Recipe.load(path)


def test_saved_recipe_is_complete_and_comes_back(tmp_path):
    recipe = Recipe.parse({"training": {"steps": 7, "betas": [0.8, 0.9]}, "model": {"options": {"num_heads": 2}}})
    recipe.save(tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert all(key in text for key in ("weight_decay", "held_out", "checkpoint_every", "temperature"))
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert Recipe.load(tmp_path / "recipe.yaml", {"training.steps": 9}).training.steps == 9


def test_numbers_without_a_point(tmp_path):
    (tmp_path / "recipe.yaml").write_text("training: {learning_rate: 3e-3}")  # a string to YAML 1.1
    assert Recipe.load(tmp_path / "recipe.yaml").training.learning_rate == 3e-3


def test_layers_may_be_a_list():
    layers = ["gla", {"gla": {"num_heads": 2}}]
    assert Recipe.parse({"model": {"layers": layers}}).model.layer_list() == ["gla", ("gla", {"num_heads": 2})]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path):
    assert Recipe.load(path).name == path.stem


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_schedule(kind):
    values = [factor(s, kind=kind, steps=100, warmup=10, decay=0.3, minimum=0.1) for s in range(100)]
    assert values[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert max(values) == 1
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values[10:]))
    if kind == "constant":
        assert values[-1] == 1
    else:
        assert 0.1 <= values[-1] < 0.14
    if kind == "wsd":
        assert values[10:70] == [1.0] * 60
