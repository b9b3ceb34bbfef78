"""Learning rates of retraining, and which epochs belong to what."""

import pytest
import torch

from lightning_soup.callbacks.retraining import Phase, Plan, adaptive_rate, retraining_rate
from lightning_soup.layers.pruning import prune_


class TestGolden5:
    def test_linear(self) -> None:
        found = [retraining_rate("llr", t, 20, 0.1) for t in (0, 1, 2, 3, 11, 20)]
        assert found == pytest.approx([0, 0.05, 0.1, 0.0944444444444444, 0.05, 0], abs=1e-12)

    def test_adaptive(self) -> None:
        weights = {"w": torch.tensor([[3.0, 4, 0, 12]], dtype=torch.float64)}
        norm = float(weights["w"].norm())
        masks = prune_(weights, 0.5)
        drop = (1 - (float(weights["w"].norm()) / norm) ** 2) ** 0.5
        assert masks["w"].tolist() == [[False, True, False, True]]
        assert drop / 0.5**0.5 == pytest.approx(0.32635697593225266, abs=1e-12)
        assert adaptive_rate(0.1, 1, 10, drop, 0.5) == pytest.approx(0.03263569759322527, abs=1e-12)
        assert adaptive_rate(0.1, 5, 10, drop, 0.5) == pytest.approx(0.05, abs=1e-12)
        assert adaptive_rate(0.1, 50, 10, drop, 0.5) == 0.1

    def test_cosine(self) -> None:
        assert retraining_rate("clr", 4, 10, 0.1, 0.01) == pytest.approx(0.0775, abs=1e-12)
        assert retraining_rate("clr", 10, 10, 0.1, 0.01) == pytest.approx(0.01, abs=1e-12)


class TestFromTheDenseTraining:
    HISTORY = tuple(0.1 * (10 - i) for i in range(11))

    def test_the_last_rates(self) -> None:
        assert [retraining_rate("lrw", t, 3, 9.0, history=self.HISTORY) for t in range(4)] == pytest.approx(
            [0.2, 0.1, 0.0, 0.0]
        )
        assert retraining_rate("lrw", 0, 99, 9.0, history=self.HISTORY) == pytest.approx(1.0)

    def test_all_of_them_compressed(self) -> None:
        found = [retraining_rate("slr", t, 10, 1.0, history=self.HISTORY) for t in range(11)]
        assert found[0] == 0  # a step of warm-up
        assert found[1] == 1
        assert found[-1] == 0
        assert sorted(found[1:], reverse=True) == found[1:]

    def test_the_smallest_that_trains(self) -> None:
        assert retraining_rate("ft", 5, 10, 1.0, history=self.HISTORY) == pytest.approx(0.1)


def test_a_plan() -> None:
    plan = Plan.of(2, 2, [1, 3])
    assert plan == (
        Phase(0, 0, 0, 2, True),
        Phase(1, 0, 2, 1, False),
        Phase(1, 1, 3, 3, True),
        Phase(2, 0, 6, 1, False),
        Phase(2, 1, 7, 3, True),
    )
    assert plan.epochs == 10
    assert [plan.index_at(epoch) for epoch in range(10)] == [0, 0, 1, 2, 2, 2, 3, 4, 4, 4]
    assert Plan.of(0, 1, [4]).index_at(0) == 0
    assert [str(phase) for phase in plan[:2]] == ["the dense training", "copy 1 of cycle 1"]
