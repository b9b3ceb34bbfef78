"""The golden cases of the model soups and WiSE-FT papers (float64, worked out by hand)."""

import pytest
import torch

from lightning_soup.recipes import GreedySoup, Ingredient, InterpolatedSoup, LearnedSoup, UniformSoup
from lightning_soup.recipes.learned import _Mixture
from lightning_soup.weights import combine, open_checkpoint
from lightning_soup.weights.geometry import inner_products
from tests.helpers.linear_evaluator import LinearEvaluator


def vectors(*rows):
    return [Ingredient({"w": torch.tensor(row, dtype=torch.float64)}, label=f"θ{i}") for i, row in enumerate(rows)]


def test_g1_uniform_and_weighted():
    ingredients = vectors((1, 2), (3, -2), (5, 6))
    torch.testing.assert_close(
        UniformSoup().cook(ingredients).weights()["w"],
        torch.tensor([3.0, 2.0], dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )
    weighted = UniformSoup(weights=[0.5, 0.3, 0.2]).cook(ingredients).weights()["w"]
    torch.testing.assert_close(weighted, torch.tensor([2.4, 1.6], dtype=torch.float64), rtol=0, atol=1e-12)


X = torch.tensor(
    [
        (-1, -3, -3),
        (1, 2, -2),
        (-3, 1, 2),
        (0, 3, -1),
        (-3, 3, -2),
        (-3, -2, 2),
        (1, -1, 3),
        (2, -3, 3),
        (3, 0, 2),
        (-3, -1, 3),
    ],
    dtype=torch.float64,
)
Y = torch.tensor([1, 1, -1, 1, 1, 1, -1, -1, -1, -1], dtype=torch.float64)
CANDIDATES = ((0, 4, -3), (2, -3, 2), (4, -3, -4), (1, 2, -1))


@pytest.mark.parametrize(
    ("strict", "coefficients", "weights", "tried"),
    [
        (
            False,
            (1 / 3, 0.0, 1 / 3, 1 / 3),
            (5 / 3, 1.0, -8 / 3),
            [(0.8, True), (0.8, True), (0.9, True), (0.7, False)],
        ),
        (True, (0.5, 0.0, 0.5, 0.0), (2.0, 0.5, -3.5), [(0.8, True), (0.8, False), (0.9, True), (0.5, False)]),
    ],
)
def test_g2_greedy(strict, coefficients, weights, tried):
    evaluator = LinearEvaluator(X, Y)
    soup = GreedySoup(strict=strict).cook(vectors(*CANDIDATES), evaluator)
    assert [round(evaluator.score(v.weights), 12) for v in vectors(*CANDIDATES)] == [0.8, 0.3, 0.5, 0.7]
    assert [trial.label for trial in soup.history] == ["θ0", "θ3", "θ2", "θ1"]
    assert [(round(trial.score, 12), trial.kept) for trial in soup.history] == tried
    assert soup.coefficients == pytest.approx(coefficients, abs=1e-15)
    assert soup.score == pytest.approx(0.9)
    torch.testing.assert_close(soup.weights()["w"], torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-12)


def test_g2_uniform_is_below_the_best_single():
    soup = UniformSoup().cook(vectors(*CANDIDATES), LinearEvaluator(X, Y))
    assert soup.score == pytest.approx(0.7)


def gradient_at(z, beta):
    """Coefficients' gradients for ℓ = log(1 + exp(−yβ θ·x)), x = (1, 1), y = 1."""
    sources = [open_checkpoint({"w": torch.tensor(row, dtype=torch.float64)}) for row in ((1, 0), (0, 2))]
    mixture = _Mixture(sources, "model", ("w",))
    with torch.no_grad():
        mixture.z_RK.copy_(torch.tensor([z]))
        mixture.beta.fill_(beta)
    one = torch.ones(1, 2, dtype=torch.float64)
    evaluator = LinearEvaluator(one, torch.ones(1, dtype=torch.float64))
    loss, gradient = evaluator.loss_and_grad(combine(sources, mixture.coefficients()), slice(None))
    mixture.set_gradient(inner_products(sources, gradient))
    return loss, mixture.z_RK.grad[0], mixture.beta.grad, gradient["w"]


def test_g3_learned_step_at_the_start():
    loss, z, beta, gradient = gradient_at((0.0, 0.0), 1.0)
    assert loss == pytest.approx(0.2014132779827524, abs=1e-12)
    assert gradient.tolist() == pytest.approx([-0.18242552380635635] * 2, abs=1e-12)
    assert z.tolist() == pytest.approx([0.04560638095158909, -0.04560638095158909], abs=1e-12)
    assert float(beta) == pytest.approx(-0.2736382857095345, abs=1e-12)


def test_g3_learned_step_elsewhere():
    loss, z, beta, _ = gradient_at((1.0, -1.0), 2.0)
    assert loss == pytest.approx(0.10131787123612367, abs=1e-8)
    assert z.tolist() == pytest.approx([0.02023316, -0.02023316], abs=1e-8)
    assert float(beta) == pytest.approx(-0.10783996459793, abs=1e-8)


def test_g3_learned_soup_descends():
    data = LinearEvaluator(X, Y)
    soup = LearnedSoup(epochs=60, batch_size=10).cook(vectors(*CANDIDATES), data)
    losses = [trial.values["loss"] for trial in soup.history]
    assert losses[-1] < 0.7 * losses[0]
    beta = soup.history[-1].values["beta"]
    assert sum(soup.coefficients["w"]) == pytest.approx(beta)  # β is folded into the last layer


def test_g4_wise_ft():
    zero_shot = {"w": torch.tensor([1.0, 0, -2], dtype=torch.float64), "b": torch.tensor(0.5, dtype=torch.float64)}
    fine_tuned = {"w": torch.tensor([3.0, 4, 2], dtype=torch.float64), "b": torch.tensor(-0.5, dtype=torch.float64)}
    weights = InterpolatedSoup(alpha=0.25).cook([zero_shot, fine_tuned]).weights()
    torch.testing.assert_close(weights["w"], torch.tensor([1.5, 1, -1], dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(weights["b"]) == pytest.approx(0.25, abs=1e-12)
    for alpha, end in ((0.0, zero_shot), (1.0, fine_tuned)):
        result = InterpolatedSoup(alpha=alpha).cook([zero_shot, fine_tuned]).weights()
        assert all(torch.equal(result[name], end[name]) for name in end)
