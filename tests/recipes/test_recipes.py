"""Promises of the recipes beyond the golden cases: each against a slow, obviously right computation."""

import pytest
import torch
from torch import nn

from lightning_soup.errors import NonFiniteWeights, RecipeError
from lightning_soup.evaluation import Evaluator
from lightning_soup.recipes import GreedySoup, Ingredient, InterpolatedSoup, LearnedSoup, UniformSoup
from lightning_soup.recipes.learned import _Mixture
from lightning_soup.weights import combine, open_checkpoint
from lightning_soup.weights.geometry import inner_products


class Regression(Evaluator):
    """Two layers on fixed data; counts what it is asked for."""

    metric, mode = "val_loss", "min"

    def __init__(self):
        torch.manual_seed(3)
        self.x, self.y = torch.randn(40, 6), torch.randn(40, 2)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.calls = 0

    def loss(self, weights, rows=slice(None)):
        return nn.functional.mse_loss(torch.func.functional_call(self.net, weights, (self.x[rows],)), self.y[rows])

    def score(self, weights):
        self.calls += 1
        return -self.loss(dict(weights)).item()

    def head(self):
        return ("2.weight", "2.bias")

    def batches(self, epoch, batch_size):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch))
        return order.split(batch_size)

    def loss_and_grad(self, weights, batch):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        loss = self.loss(leaves, batch)
        return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def fine_tunes(count=4, by=0.1):
    net = Regression().net.state_dict()
    generator = torch.Generator().manual_seed(11)
    return [{n: v + by * torch.randn(v.shape, generator=generator) for n, v in net.items()} for _ in range(count)]


def test_uniform_with_evaluator_is_scored_in_the_metrics_own_direction():
    evaluator = Regression()
    soup = UniformSoup().cook(fine_tunes(), evaluator)
    expected = evaluator.loss(soup.weights()).item()
    assert soup.score == pytest.approx(-expected)
    assert soup.natural_score == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (UniformSoup(weights=[1.0, 2.0]), "2 weights given for 4"),
        (UniformSoup(weights=[1.0, -1.0, 2.0, -2.0]), "add up to zero"),
        (LearnedSoup(epochs=0), "epochs"),
        (LearnedSoup(head=["nowhere"]), "nowhere"),
        (InterpolatedSoup(alphas=[]), "alphas is empty"),
    ],
)
def test_options_that_cannot_work(recipe, message):
    with pytest.raises(RecipeError, match=message):
        recipe.cook(fine_tunes(), Regression())


@pytest.mark.parametrize("seed", range(5))
def test_greedy_equals_the_slow_recipe(seed):
    generator = torch.Generator().manual_seed(seed)
    net = Regression().net.state_dict()
    models = [{n: v + 0.15 * torch.randn(v.shape, generator=generator) for n, v in net.items()} for _ in range(6)]
    evaluator = Regression()
    soup = GreedySoup().cook(models, evaluator)
    assert evaluator.calls == 2 * len(models) - 1

    def mean(chosen):
        return {n: torch.stack([models[i][n].double() for i in chosen]).mean(0).float() for n in net}

    order = sorted(range(6), key=lambda i: -evaluator.score(models[i]))
    kept, best = order[:1], evaluator.score(models[order[0]])
    for i in order[1:]:
        score = evaluator.score(mean([*kept, i]))
        if score >= best:
            kept, best = [*kept, i], score
    assert [i for i, c in enumerate(soup.coefficients) if c] == sorted(kept)
    assert soup.score == pytest.approx(best, rel=1e-6)
    assert soup.score == evaluator.score(soup.weights())  # what is saved is what was scored
    assert soup.score >= max(evaluator.score(model) for model in models)


def test_greedy_says_why_a_candidate_was_refused():
    models = fine_tunes()
    models.append({name: value * 2.5 for name, value in models[0].items()})
    soup = GreedySoup().cook([Ingredient(m, label=f"run {i}") for i, m in enumerate(models)], Regression())
    refused = next(trial for trial in soup.history if trial.label == "run 4")
    assert not refused.kept
    assert refused.reason.startswith("worse:")
    assert refused.values["after"] < refused.values["before"]
    assert refused.values["distance"] > 1.0


def test_ties_keep_the_given_order():
    class Same(Regression):
        def score(self, weights):
            return 1.0

    soup = GreedySoup().cook([Ingredient(m, label=str(i)) for i, m in enumerate(fine_tunes())], Same())
    assert [trial.label for trial in soup.history] == ["0", "1", "2", "3"]
    strict = GreedySoup(strict=True).cook(fine_tunes(), Same())
    assert strict.coefficients == (1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("by", ["model", "tensor"])
def test_learned_gradient_equals_autograd_through_the_mixture(by):
    models, evaluator = fine_tunes(), Regression()
    sources = [open_checkpoint(model) for model in models]
    mixture = _Mixture(sources, by, evaluator.head())
    with torch.no_grad():
        mixture.z_RK.copy_(torch.randn(mixture.z_RK.shape, dtype=torch.float64))
        mixture.beta.fill_(1.7)
    _, gradient = evaluator.loss_and_grad(combine(sources, mixture.coefficients()), torch.arange(40))
    mixture.set_gradient(inner_products(sources, gradient))

    z = mixture.z_RK.detach().clone().requires_grad_()
    beta = mixture.beta.detach().clone().requires_grad_()
    mixed = {}
    for row, name in enumerate(models[0]):
        alpha = z[row if by == "tensor" else 0].softmax(0).float()
        value = sum(a * model[name] for a, model in zip(alpha, models, strict=True))
        mixed[name] = value * (beta.float() if name in evaluator.head() else 1.0)
    evaluator.loss(mixed).backward()
    torch.testing.assert_close(mixture.z_RK.grad, z.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mixture.beta.grad, beta.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("by", ["model", "tensor"])
def test_learned_lowers_the_loss_of_the_uniform_soup(by):
    models = fine_tunes(by=0.15)
    soup = LearnedSoup(by=by, epochs=20, batch_size=20).cook(models, Regression())
    assert soup.score > UniformSoup().cook(models, Regression()).score
    assert len(soup.history) == 20
    assert sum(soup.shares()) == pytest.approx(1.0, abs=0.5)  # the head's rows add up to β


def test_learned_is_deterministic():
    first, second = (LearnedSoup(epochs=3, batch_size=8).cook(fine_tunes(), Regression()) for _ in range(2))
    assert first.coefficients == second.coefficients


def test_learned_without_temperature_keeps_one_row():
    soup = LearnedSoup(temperature=False, epochs=1).cook(fine_tunes(), Regression())
    assert isinstance(soup.coefficients, tuple)
    assert sum(soup.coefficients) == pytest.approx(1.0)


def test_learned_without_a_linear_head_says_so():
    class Headless(Regression):
        def head(self):
            return ()

    soup = LearnedSoup(epochs=1).cook(fine_tunes(), Headless())
    assert "β stays 1" in soup.notes[0]


def test_interpolation_chooses_on_the_curve_and_keeps_it():
    start, end = fine_tunes(2)
    evaluator = Regression()
    soup = InterpolatedSoup().cook([start, end], evaluator)
    scores = [evaluator.score({n: (1 - a / 10) * start[n] + a / 10 * end[n] for n in start}) for a in range(11)]
    assert [trial.score for trial in soup.history] == pytest.approx(scores, rel=1e-5)
    best = max(range(11), key=scores.__getitem__)
    assert [trial.kept for trial in soup.history].index(True) == best
    assert soup.coefficients == pytest.approx((1 - best / 10, best / 10))


def test_interpolation_without_evaluator_takes_the_middle():
    assert InterpolatedSoup().cook(fine_tunes(2)).coefficients == (0.5, 0.5)


def test_interpolation_to_a_soup_of_the_others():
    start, *others = fine_tunes(4)
    soup = InterpolatedSoup(alpha=0.5).cook([start, *others])
    assert soup.coefficients == pytest.approx((0.5, 1 / 6, 1 / 6, 1 / 6))
    greedy = InterpolatedSoup(soup=GreedySoup(), alpha=1.0).cook([start, *others], Regression())
    assert greedy.coefficients[0] == 0.0
    assert torch.equal(greedy.weights()["0.weight"], GreedySoup().cook(others, Regression()).weights()["0.weight"])


@pytest.mark.parametrize("recipe", [UniformSoup(), GreedySoup(), LearnedSoup(epochs=1), InterpolatedSoup()], ids=str)
def test_a_nan_ingredient_is_named(recipe):
    models = fine_tunes()
    models[2]["2.bias"] = models[2]["2.bias"].clone()
    models[2]["2.bias"][1] = float("nan")
    named = [Ingredient(model, label=f"run {i}") for i, model in enumerate(models)]
    with pytest.raises(NonFiniteWeights, match=r"run 2: tensor '2\.bias' .* NaN"):
        recipe.cook(named, Regression())


def test_a_recipe_tells_how_it_was_called():
    assert str(GreedySoup()) == "GreedySoup"
    assert str(GreedySoup(strict=True)) == "GreedySoup(strict=True)"
    assert str(InterpolatedSoup(soup=GreedySoup())) == "InterpolatedSoup(soup=GreedySoup)"


class Statistics(Regression):
    """Has a buffer of running statistics in its weights, which it finds to be `found`."""

    found = torch.tensor([4.0])

    def score(self, weights):
        return -abs(float(weights["norm.running_mean"]) - 3.0)

    def recalibrate(self, weights, frozen=()):
        return {"norm.running_mean": self.found}


def normed(*means):
    return [
        {**model, "norm.running_mean": torch.tensor([mean])} for model, mean in zip(fine_tunes(2), means, strict=True)
    ]


def test_recalibrated_tells_the_score_before_and_after():
    soup = UniformSoup().cook(normed(0.0, 2.0)).recalibrated(Statistics())
    assert soup.weights()["norm.running_mean"].item() == 4.0
    assert (soup.score, soup.metric, soup.mode) == (-1.0, "val_loss", "min")
    (trial,) = soup.history
    assert (trial.values, trial.reason) == ({"before": -2.0, "after": -1.0}, "val_loss 2.0000 → 1.0000")
    assert trial.score is None  # the recipe did not choose among it and others
    assert soup.notes[-1].startswith("UniformSoup: the BatchNorm statistics were estimated anew on training data (val_")


@pytest.mark.parametrize(
    ("means", "found", "message"),
    [
        ((1.0, 3.0), {}, "the model has no BatchNorm layer"),
        ((1.0, 1.0), {}, "are the same in all ingredients"),
        ((1.0, 1.0), {"norm.running_mean": torch.ones(1)}, "are the same in all ingredients"),
    ],
)
def test_what_needs_no_recalibration_is_left_as_it_was(monkeypatch, means, found, message):
    monkeypatch.setattr(Statistics, "recalibrate", lambda *_: found)
    soup = UniformSoup().cook(normed(*means), Statistics())
    with pytest.warns(UserWarning, match=f"nothing was recalibrated: .*{message}"):
        same = soup.recalibrated(Statistics())
    assert message in same.notes[-1]
    assert not same.statistics
    assert (same.score, same.history, same.coefficients) == (soup.score, soup.history, soup.coefficients)
