"""AdaptiveSoup: the golden cases of AMA, parts of networks, and what is chosen."""

import math

import pytest
import timm
import torch
from torch.nn.functional import softplus

from lightning_soup.errors import IncompatibleIngredients, RecipeError
from lightning_soup.evaluation import Evaluator
from lightning_soup.recipes import AdaptiveSoup, InterpolatedSoup, UniformSoup, recook
from lightning_soup.recipes.adaptive import project, ratios
from lightning_soup.recipes.parts import divide, given_parts, part_sizes
from lightning_soup.weights.weights_file import open_checkpoint


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, double(*expected), rtol=0, atol=tolerance)


class Product(Evaluator):
    """Golden 6: one number a part, logit z = w1·w2, loss softplus(−z); the score is z."""

    metric = "z"

    def __init__(self, loss=lambda z: softplus(-z)):
        self.loss = loss

    def score(self, weights):
        return math.prod(float(value) for value in weights.values())

    def batches(self, epoch, batch_size):
        return [None]

    def loss_and_grad(self, weights, batch):
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        loss = self.loss(torch.stack(list(leaves.values())).prod())
        loss.backward()
        return loss.item(), {name: leaf.grad for name, leaf in leaves.items()}


BEFORE = {"blocks.0.w": double(1), "blocks.1.w": double(1)}
AFTER = {"blocks.0.w": double(2), "blocks.1.w": double(3)}
FREE = {"common_start": "ignore"}


# -------------------------------------------------------------------------------------------------------------- golden


def test_ratios_keep_their_mean():
    alpha = ratios(double(0, 1, -1), 0.3, 0.2)
    close(alpha, (0.3, 0.399025105, 0.200974895))
    assert abs(float(alpha.mean()) - 0.3) < 1e-12


@pytest.mark.parametrize(
    ("parts", "spread", "mean", "low", "high"),
    [(3, 1, 0.2, 0.12, 0.3), (3, 0.2, 0.2, 0.046153846, 0.45), (3, 0.2, 0.4, 0.092307692, 0.9)],
)
def test_how_far_ratios_can_be_apart(parts, spread, mean, low, high):
    up = ratios(double(50, *[-50] * (parts - 1)), mean, spread)
    down = ratios(double(-50, *[50] * (parts - 1)), mean, spread)
    assert float(up[0]) == pytest.approx(high, abs=1e-6)
    assert float(down[0]) == pytest.approx(low, abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "mean", "expected"),
    [
        ((1.1, 0.2, 0.2), 0.5, (1, 0.25, 0.25)),
        ((1.2, 0.6, -0.3), 0.5, (1, 0.5, 0)),
        ((1.5, 0.0, 0.0), 0.5, (1, 0.25, 0.25)),
        ((2.0, 2.0, 2.0), 1.0, (1, 1, 1)),
        ((0.2, 0.3), 0.25, (0.2, 0.3)),
    ],
)
def test_projection(alpha, mean, expected):
    close(project(double(*alpha), mean), expected)


def test_the_mean_is_exact_whatever_is_clipped():
    torch.manual_seed(0)
    for _ in range(300):
        mean, spread = torch.rand(2).tolist()
        found = ratios(5 * torch.randn(int(torch.randint(2, 7, ())), dtype=torch.float64), mean, 0.3 * spread)
        assert abs(float(found.mean()) - mean) < 1e-12
        assert 0 <= float(found.min()) <= float(found.max()) <= 1 + 1e-12


def test_saturated_ratios_above_one_are_brought_back():
    close(ratios(double(50, -50, -50), 0.5, 0.0), (1, 0.25, 0.25))
    close(ratios(double(50, -50, -50), 0.5, 0.2), (1, 0.25, 0.25))
    s = double(9, -9, 0).requires_grad_()
    found = ratios(s, 0.6, 0.05)
    assert float(found.detach().max()) == 1
    (gradient,) = torch.autograd.grad(found.sum(), s)
    close(gradient, (0, 0, 0), 1e-9)  # the mean never moves


def test_where_every_ratio_is_clipped_gradients_are_zero():
    s = double(-3, -1.5).requires_grad_()
    found = ratios(s, 1.0, 0.0)
    assert found.tolist() == [1, 1]
    (gradient,) = torch.autograd.grad(found[0], s)
    assert gradient.tolist() == [0, 0]


def test_merging_scalars():
    names = ("blocks.0.w", "blocks.1.w", "blocks.2.w")
    recipe = AdaptiveSoup(mean=0.5, steps=1, lr=1e-9, **FREE)
    soup = recipe.cook([{name: double(value) for name in names} for value in (1, 3)], Product())
    for name, alpha, expected in zip(names, (0.2, 0.5, 0.8), (1.4, 2, 2.6), strict=True):
        soup.coefficients[name] = (1 - alpha, alpha)
        assert float(soup.weights()[name]) == pytest.approx(expected)


def test_gradient_steps(monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
    expected = {
        1: ((0.492439607, 0.507560393), 0.048235465),
        2: ((0.485166001, 0.514833999), 0.047909368),
    }
    for steps, (alpha, loss) in expected.items():
        recipe = AdaptiveSoup(mean=0.5, parts=2, steps=steps, lr=10, **FREE)
        soup = recipe.cook([BEFORE, AFTER], Product())
        equal, learned = soup.history
        assert equal.values["loss"] == pytest.approx(0.048587352, abs=1e-9)
        assert learned.values["loss"] == pytest.approx(loss, abs=1e-9)
        assert [row[1] for row in soup.coefficients.values()] == pytest.approx(alpha, abs=1e-8)
        assert soup.score == pytest.approx(math.prod(1 + a * d for a, d in zip(alpha, (1, 2), strict=True)), abs=1e-6)


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("layers", "parts", "sizes"), [(26, 3, [8, 9, 9]), (32, 3, [10, 11, 11]), (12, 3, [4, 4, 4]), (5, 5, [1] * 5)]
)
def test_sizes_of_parts(layers, parts, sizes):
    assert part_sizes(layers, parts) == sizes


def test_parts_of_a_vit():
    model = timm.create_model("vit_tiny_patch16_224", depth=8)
    found = divide(open_checkpoint({f"model.{name}": value for name, value in model.state_dict().items()}), 3)
    assert (
        found["model.pos_embed"] == found["model.patch_embed.proj.weight"] == found["model.blocks.0.norm1.weight"] == 0
    )
    assert [found[f"model.blocks.{i}.mlp.fc1.weight"] for i in range(8)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert found["model.norm.weight"] is found["model.head.weight"] is None


def test_parts_of_stages_and_of_towers():
    resnet = divide(open_checkpoint(timm.create_model("resnet18")), 4)
    assert [resnet[f"layer{i}.{j}.conv1.weight"] for i in (1, 2, 3, 4) for j in (0, 1)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert resnet["conv1.weight"] == 0
    assert resnet["fc.weight"] is None
    names = [f"visual.blocks.{i}.w" for i in range(4)] + [f"text.blocks.{i}.w" for i in range(2)] + ["head.w"]
    towers = divide(open_checkpoint({name: double(1) for name in names}), 2)
    assert list(towers.values()) == [0, 0, 1, 1, 0, 1, None]


def test_tied_tensors_have_one_ratio():
    shared = double(1, 2)
    weights = {"embed.w": shared, "blocks.0.w": double(1), "blocks.1.w": double(1), "head.w": shared}
    found = divide(open_checkpoint(weights), 2)
    assert found == {"embed.w": 0, "blocks.0.w": 0, "blocks.1.w": 1, "head.w": 0}


def test_parts_by_patterns():
    weights = open_checkpoint({name: double(1) for name in ("a.w", "b.w", "c.w")})
    assert given_parts(weights, [["a.*"], ["b.*"]]) == {"a.w": 0, "b.w": 1, "c.w": None}
    with pytest.raises(RecipeError, match=r"'z\.\*' of group 2 fits no tensor"):
        given_parts(weights, [["a.*"], ["z.*"]])
    with pytest.raises(RecipeError, match=r"a\.w is in group 1 and in group 2"):
        given_parts(weights, [["a.*"], ["?.w"]])


# ------------------------------------------------------------------------------------------------------------- recipes


def pair(count=6, size=5):
    torch.manual_seed(0)
    before = {"embed.weight": torch.randn(size, size)}
    before |= {f"blocks.{i}.{part}": torch.randn(size, size) for i in range(count) for part in ("weight",)}
    before |= {f"blocks.{i}.bias": torch.randn(size) for i in range(count)} | {"head.weight": torch.randn(size, size)}
    return before, {name: value + 0.05 * torch.randn_like(value) for name, value in before.items()}


class Target(Evaluator):
    """Squared distance to a target, in which some tensors are those of one model and some of the other."""

    def __init__(self, target):
        self.target = target
        self.tried = 0

    def score(self, weights):
        self.tried += 1
        return -sum(float(((weights[name] - value) ** 2).sum()) for name, value in self.target.items())

    def batches(self, epoch, batch_size):
        return [None, None]

    def loss_and_grad(self, weights, batch):
        gradient = {name: 2 * (weights[name] - value) for name, value in self.target.items()}
        return -self.score(weights), gradient


def of_two(before, after, first_of_after):
    """A target whose first blocks are those of the model after."""
    return {n: (after if any(n.startswith(p) for p in first_of_after) else before)[n] for n in before}


@pytest.mark.parametrize("method", ["gradient", "cma"])
def test_the_part_that_the_new_skill_is_in_is_found(method):
    before, after = pair()
    evaluator = Target(of_two(before, after, ("embed", "blocks.0", "blocks.1.")))
    recipe = AdaptiveSoup(mean=0.4, spread=0.05, method=method, steps=120, lr=0.1)
    soup = recipe.cook([before, after], evaluator)
    ratio = {name: row[1] for name, row in soup.coefficients.items()}
    assert ratio["embed.weight"] == ratio["blocks.1.bias"] > 0.8
    assert ratio["blocks.3.weight"] < 0.3
    assert ratio["head.weight"] == 0.4  # after the last block
    parts = [ratio[f"blocks.{i}.weight"] for i in (0, 2, 4)]
    assert sum(parts) / 3 == pytest.approx(0.4, abs=1e-9)
    equal = InterpolatedSoup(alpha=0.4).cook([before, after], evaluator)
    assert soup.score > equal.score
    assert soup.history[0].label == "equal ratios"


def test_the_budget_of_candidates_is_kept():
    evaluator = Target(pair()[1])
    soup = AdaptiveSoup(mean=0.4, method="cma", steps=23).cook(list(pair()), evaluator)
    assert len(soup.history) <= 23
    assert evaluator.tried <= 24  # and the result
    assert soup.score == max(trial.score for trial in soup.history)


def test_equal_ratios_are_the_result_where_nothing_is_better():
    before, after = pair()
    evaluator = Target({name: (value + after[name]) / 2 for name, value in before.items()})
    soup = AdaptiveSoup(mean=0.5, steps=3, lr=2.0).cook([before, after], evaluator)
    assert set(soup.coefficients.values()) == {(0.5, 0.5)}


def test_a_penalty_keeps_ratios_together():
    before, after = pair()
    evaluator = Target(of_two(before, after, ("embed", "blocks.0", "blocks.1.")))

    def spread_of(penalty):
        soup = AdaptiveSoup(mean=0.4, steps=60, regularization=penalty).cook([before, after], evaluator)
        return max(row[1] for row in soup.coefficients.values()) - 0.4

    assert spread_of(1e3) < 0.1 < spread_of(0)


def test_matrices_only():
    before, after = pair()
    soup = AdaptiveSoup(mean=0.4, scope="linear", steps=5).cook([before, after], Target(before))
    weights = soup.weights()
    for name in before:
        whole = name.startswith("embed") or name.endswith("bias")
        assert torch.equal(weights[name], after[name]) is whole, name


def test_several_models_after_are_cooked_first():
    before, after = pair()
    other = {name: value + 0.01 for name, value in after.items()}
    soup = AdaptiveSoup(mean=0.4, steps=1, lr=1e-9).cook([before, after, other], Target(after))
    middle = UniformSoup().cook([after, other]).weights()
    expected = InterpolatedSoup(alpha=0.4).cook([before, middle]).weights()
    torch.testing.assert_close(soup.weights(), expected)


def test_one_part_is_the_plain_average():
    before, after = pair()
    for method in ("gradient", "cma"):
        soup = AdaptiveSoup(mean=0.3, parts=1, method=method, steps=3).cook([before, after], Target(after))
        assert {round(row[1], 12) for row in soup.coefficients.values()} == {0.3}


@pytest.mark.parametrize("method", ["gradient", "cma"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_at_the_ends_there_is_nothing_to_choose(method, mean):
    before, after = pair()
    evaluator = Target(of_two(before, after, ("embed", "blocks.0", "blocks.1.")))
    for parts in (2, 3):
        soup = AdaptiveSoup(mean=mean, parts=parts, spread=0.0, method=method).cook([before, after], evaluator)
        assert len(soup.history) == 1
        torch.testing.assert_close(soup.weights(), after if mean else before, rtol=0, atol=0)


def test_the_file_is_cooked_again(tmp_path):
    before, after = pair()
    for name, weights in (("before", before), ("after", after)):
        torch.save(weights, tmp_path / f"{name}.pt")
    files = [tmp_path / "before.pt", tmp_path / "after.pt"]
    soup = AdaptiveSoup(mean=0.4, steps=9).cook(files, Target(after))
    soup.save(tmp_path / "soup.safetensors")
    again = recook(tmp_path / "soup.safetensors", tmp_path / "again.safetensors")
    assert again is not None
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "soup.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": 1.2}, "mean=1.2"),
        ({"parts": 0}, "parts=0"),
        ({"parts": 7}, r"parts=7\).* has 6 numbered blocks"),
        ({"groups": []}, "groups"),
        ({"groups": [["nothing*"]]}, "fits no tensor"),
        ({"spread": -0.1}, "spread=-0.1"),
        ({"scope": "some"}, "'all' or 'linear'"),
        ({"method": "luck"}, "'gradient' or 'cma'"),
        ({"steps": 0}, "steps and batch_size"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"regularization": -1.0}, "regularization"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(RecipeError, match=message):
        AdaptiveSoup(**options).cook(list(pair()), Target({}))


def test_ingredients_that_cannot_be():
    before, after = pair()
    with pytest.raises(RecipeError, match="needs an evaluator"):
        AdaptiveSoup().cook([before, after])
    with pytest.raises(RecipeError, match="at least two"):
        AdaptiveSoup().cook([before], Target(before))
    with pytest.raises(IncompatibleIngredients):
        AdaptiveSoup().cook([before, {"embed.weight": after["embed.weight"]}], Target(before))


def test_no_data_and_nan():
    class Empty(Target):
        def batches(self, epoch, batch_size):
            return []

    class Broken(Target):
        def loss_and_grad(self, weights, batch):
            return float("nan"), super().loss_and_grad(weights, batch)[1]

    with pytest.raises(RecipeError, match="no batches"):
        AdaptiveSoup().cook(list(pair()), Empty(pair()[0]))
    with pytest.raises(RecipeError, match="loss of equal ratios is NaN"):
        AdaptiveSoup().cook(list(pair()), Broken(pair()[0]))
