import pytest
import torch

from lightning_soup.errors import IncompatibleIngredients, RecipeError
from lightning_soup.evaluation import Evaluator
from lightning_soup.recipes import GreedySoup, Ingredient, InterpolatedSoup, LearnedSoup, UniformSoup
from lightning_soup.recipes.checks import check_ingredients


def network(seed: int, head_seed: int | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {f"blocks.{i}.weight": torch.randn(32, 32, generator=generator) for i in range(4)}
    generator = torch.Generator().manual_seed(seed if head_seed is None else head_seed)
    return {**weights, "head.weight": torch.randn(5, 32, generator=generator)}


def fine_tuned(weights: dict[str, torch.Tensor], seed: int, by: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: value + by * torch.randn(value.shape, generator=generator) for name, value in weights.items()}


class NeverCalled(Evaluator):
    def score(self, weights):
        raise AssertionError("evaluated before the ingredients were checked")


ALL = [UniformSoup(), GreedySoup(), LearnedSoup(), InterpolatedSoup()]


@pytest.mark.parametrize("recipe", ALL, ids=str)
def test_different_random_starts_are_refused_before_any_evaluation(recipe):
    with pytest.raises(RecipeError, match=r"run-a and run-b have no common start: the median cosine .* is -?0\.0"):
        recipe.cook([Ingredient(network(1), label="run-a"), Ingredient(network(2), label="run-b")], NeverCalled())


def test_the_check_can_be_switched_off():
    soup = UniformSoup(common_start="ignore").cook([network(1), network(2)])
    assert torch.equal(soup.weights()["head.weight"], (network(1)["head.weight"] + network(2)["head.weight"]) / 2)


def test_fine_tunes_of_one_start_pass_without_notes():
    start = network(1)
    _, notes = check_ingredients([start, fine_tuned(start, 1), fine_tuned(start, 2)])
    assert notes == ()


def test_independent_heads_are_noted():
    start = network(1)
    other = fine_tuned(network(1, head_seed=5), 2)
    with pytest.warns(UserWarning, match=r"head 'head\.weight' differs .* initialised independently"):
        check_ingredients([start, other])


def test_duplicates_are_noted():
    start = network(1)
    with pytest.warns(UserWarning, match="c and a hold the same weights"):
        _, notes = check_ingredients(
            [Ingredient(start, label="a"), Ingredient(fine_tuned(start, 1), label="b"), Ingredient(start, label="c")]
        )
    assert len(notes) == 1


@pytest.mark.parametrize("recipe", ALL, ids=str)
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_ingredients(recipe, count):
    with pytest.raises(RecipeError, match=r"at least two ingredients, got (none|one)"):
        recipe.cook([network(1)] * count, NeverCalled())


@pytest.mark.parametrize("recipe", ALL, ids=str)
def test_incompatible_ingredients(recipe):
    start = network(1)
    other = {**start, "head.weight": torch.randn(7, 32)}
    with pytest.raises(IncompatibleIngredients, match="another number of classes"):
        recipe.cook([start, other], NeverCalled())


@pytest.mark.parametrize("recipe", [GreedySoup(), LearnedSoup()], ids=str)
def test_recipes_that_choose_by_score_ask_for_an_evaluator(recipe):
    assert recipe.needs_evaluator
    with pytest.raises(RecipeError, match="needs an evaluator"):
        recipe.cook([network(1), fine_tuned(network(1), 1)])


def test_parts_that_were_initialised_independently_are_noted():
    start = network(1)
    other = fine_tuned(start, 2) | {"blocks.2.weight": network(9)["blocks.2.weight"]}
    with pytest.warns(UserWarning, match=r"1 of 4 compared matrices .*: blocks\.2\.weight"):
        check_ingredients([start, other])


def test_a_soup_among_the_ingredients_is_noted(tmp_path):
    start = network(1)
    path = UniformSoup().cook([start, fine_tuned(start, 1)]).save(tmp_path / "soup.safetensors")
    with pytest.warns(UserWarning, match=r"soup\.safetensors is itself a soup \(UniformSoup\)"):
        check_ingredients([start, path])


def test_matrices_that_are_all_zero_have_no_angle():
    start = torch.randn(16, 16)
    weights = [
        {"a": start + 0.01 * torch.randn(16, 16), **{f"zero{n}": torch.zeros(16, 16) for n in range(3)}}
        for _ in range(2)
    ]
    assert check_ingredients(weights)[1] == ()
    assert check_ingredients([weights[0], {**weights[1], "zero1": torch.randn(16, 16)}])[1] == ()
    with pytest.raises(RecipeError, match="no common start"):
        check_ingredients([weights[0], {**weights[1], "a": torch.randn(16, 16)}])
