import pytest
import torch

from lightning_soup.evaluation import Evaluator
from lightning_soup.recipes import AdaptiveSoup
from lightning_soup.runs.pareto import front_picture, pareto_front
from lightning_soup.weights.combine import combine


class Near(Evaluator):
    """Minus the squared distance to a model."""

    def __init__(self, target, mode="max"):
        self.target, self.mode = target, mode

    def score(self, weights):
        return -sum(float(((weights[name] - value) ** 2).sum()) for name, value in self.target.items())

    def batches(self, epoch, batch_size):
        return [None]

    def loss_and_grad(self, weights, batch):
        return -self.score(weights), {name: 2 * (weights[name] - value) for name, value in self.target.items()}


def models(count):
    torch.manual_seed(0)
    before = {f"blocks.{i}.weight": torch.randn(4, 4) for i in range(3)}
    after = [{name: value + 0.05 * torch.randn(4, 4) for name, value in before.items()} for _ in range(count)]
    return before, after


@pytest.mark.parametrize("count", [1, 2])
def test_both_skills_over_the_mean(count, tmp_path):
    before, after = models(count)
    mean_after = combine(after, [1 / count] * count)
    target = {**before, "blocks.0.weight": mean_after["blocks.0.weight"]}  # the new skill is in the first block
    new, old = Near(target, mode="min"), Near(before)
    front = pareto_front(AdaptiveSoup(steps=40), [before, *after], new, new, old, means=(0.0, 0.3, 1.0))
    for mean, (first, second) in zip(front.means, front.equal, strict=True):
        plain = combine([before, mean_after], [1 - mean, mean])
        assert first == pytest.approx(-new.score(plain))
        assert second == pytest.approx(old.score(plain))
    assert front.adaptive[1][0] < front.equal[1][0]  # a distance: less is better
    for place in (0, 2):
        assert front.adaptive[place] == pytest.approx(front.equal[place])
    assert [soup.recipe.count("mean=") for soup in front.soups] == [1, 1, 1]
    path = front_picture(front.curves, tmp_path / "front.png", labels={"equal ratios": ["0", "0.3", "1"]})
    assert path.read_bytes().startswith(b"\x89PNG")
