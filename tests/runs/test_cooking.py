import pytest
import torch

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.recipes import (
    GreedySoup,
    Ingredient,
    InterpolatedSoup,
    LengthAverage,
    UniformSoup,
    gather_ingredients,
)
from lightning_soup.runs.cooking import ALPHAS, cook_all, measure
from lightning_soup.weights import combine
from tests.evaluation.test_resolution import Sets
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.ingredients import tiny_run
from tests.recipes.test_length_average import vit


@pytest.fixture
def kitchen():
    start, files = tiny_run()
    return Ingredient.from_path(start), gather_ingredients(files), ModuleEvaluator(TinyClassifier(), TinyData())


def test_every_recipe_sees_the_same_ingredients(kitchen):
    start, ingredients, evaluator = kitchen
    soups = cook_all([UniformSoup(), GreedySoup(), InterpolatedSoup(alpha=0.5)], ingredients, evaluator, start)
    assert list(soups) == ["UniformSoup", "GreedySoup", "InterpolatedSoup(alpha=0.5)"]
    assert soups["UniformSoup"].ingredients == soups["GreedySoup"].ingredients
    assert [item.name for item in soups["InterpolatedSoup(alpha=0.5)"].ingredients] == [
        start.name,
        "run-0",
        "run-1",
        "run-2",
    ]


def test_interpolation_needs_the_start(kitchen):
    _, ingredients, evaluator = kitchen
    with pytest.raises(RecipeError, match="give the former as init"):
        cook_all([InterpolatedSoup()], ingredients, evaluator)


def test_what_is_measured(kitchen):
    start, ingredients, evaluator = kitchen
    soups = cook_all([UniformSoup(), GreedySoup()], ingredients, evaluator, start)
    report = measure(soups, ingredients, evaluator, start)
    kinds = [entry.kind for entry in report.entries]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "ingredient": 3, "init": 1, "soup": 2, "ensemble": 1, "interpolation": len(ALPHAS),
    }  # fmt: skip
    assert report.test_names == ["test", "shifted"]
    for item, entry in zip(ingredients, report.of_kind("ingredient"), strict=True):
        assert entry.selection_score == evaluator.score(item.weights)
        assert torch.equal(entry.outcomes["shifted"].logits, evaluator.outcomes(item.weights)["shifted"].logits)
    mean = torch.stack([entry.outcomes["test"].logits for entry in report.of_kind("ingredient")]).mean(0)
    torch.testing.assert_close(report.of_kind("ensemble")[0].outcomes["test"].logits, mean)
    curve = report.of_kind("interpolation")
    assert [entry.alpha for entry in curve] == list(ALPHAS)
    assert torch.equal(curve[0].outcomes["test"].logits, report.of_kind("init")[0].outcomes["test"].logits)
    torch.testing.assert_close(curve[-1].outcomes["test"].logits, report.of_kind("soup")[0].outcomes["test"].logits)
    half = combine([start.weights, soups["UniformSoup"].weights()], [0.5, 0.5])
    torch.testing.assert_close(curve[5].outcomes["test"].logits, evaluator.outcomes(half)["test"].logits)


def test_the_test_sets_choose_nothing(kitchen, monkeypatch):
    _, ingredients, evaluator = kitchen
    monkeypatch.setattr(evaluator.datamodule, "test_dataloader", lambda: pytest.fail("looked at the test data"))
    cook_all([UniformSoup(), GreedySoup()], ingredients, evaluator)


def test_a_report_of_interpolations_only_has_the_curve_too(kitchen):
    start, ingredients, evaluator = kitchen
    soups = cook_all([InterpolatedSoup(alpha=0.4)], ingredients, evaluator, start)
    curve = measure(soups, ingredients, evaluator, start).of_kind("interpolation")
    uniform = UniformSoup().cook(ingredients).weights()
    torch.testing.assert_close(curve[-1].outcomes["test"].logits, evaluator.outcomes(uniform)["test"].logits)


def test_ingredients_of_another_image_size_are_measured_at_that_of_the_module():
    modules = [vit(side, seed) for seed, side in enumerate((16, 24))]
    first = vit(24, 9)
    start, *ingredients = (Ingredient(module) for module in (first, *modules))
    evaluator = ModuleEvaluator(vit(16), Sets())
    soups = cook_all([LengthAverage()], ingredients, evaluator, start)
    report = measure(soups, ingredients, evaluator, start)
    for module in (first, modules[1]):
        module.model.set_input_size((16, 16))
    entries = [*report.of_kind("init"), *report.of_kind("ingredient")]
    for module, entry in zip((first, *modules), entries, strict=True):
        expected = evaluator.outcomes(module.state_dict())
        assert torch.equal(entry.outcomes["far"].logits, expected["far"].logits)
    assert len(report.of_kind("interpolation")) == len(ALPHAS)
