"""Learning rates of retraining, and which epochs belong to what."""

import pytest
import torch

from lightning_soup.callbacks.retraining import Phase, Plan, adaptive_rate, check_retraining, retraining_rate
from lightning_soup.errors import UnsupportedSetup
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
        assert adaptive_rate(0.1, 1, 10, 0.9, 0.25) == 0.1

    def test_cosine(self) -> None:
        assert retraining_rate("clr", 4, 10, 0.1, 0.01) == pytest.approx(0.0775, abs=1e-12)
        assert retraining_rate("clr", 10, 10, 0.1, 0.01) == pytest.approx(0.01, abs=1e-12)

    def test_the_warmup_takes_whole_steps(self) -> None:
        assert [retraining_rate("llr", t, 19, 0.1) for t in (0, 1)] == pytest.approx([0, 0.1], abs=1e-12)
        assert [retraining_rate("llr", t, 9, 0.1) for t in (0, 9)] == pytest.approx([0.1, 0], abs=1e-12)
        assert retraining_rate("llr", 2, 2, 0.1, warmup=1.0) == pytest.approx(0.1)

    @pytest.mark.parametrize(("schedule", "last"), [("llr", 0.0), ("allr", 0.0), ("clr", 0.01), ("slr", 0.3)])
    def test_after_its_end_it_stays(self, schedule: str, last: float) -> None:
        found = [retraining_rate(schedule, t, 10, 0.1, 0.01, (0.5, 0.3)) for t in (10, 11, 30)]
        assert found == pytest.approx([last] * 3, abs=1e-12)


class TestFromTheDenseTraining:
    HISTORY = tuple(0.1 * (10 - i) for i in range(11))

    def test_the_last_rates(self) -> None:
        assert [retraining_rate("lrw", t, 3, 9.0, history=self.HISTORY) for t in range(4)] == pytest.approx(
            [0.2, 0.1, 0.0, 0.0]
        )
        assert retraining_rate("lrw", 0, 99, 9.0, history=self.HISTORY) == pytest.approx(1.0)

    def test_all_of_them_compressed(self) -> None:
        found = [retraining_rate("slr", t, 10, 0.5, history=self.HISTORY) for t in range(11)]
        assert found[0] == 0  # a step of warm-up
        assert found[1:] == [self.HISTORY[i] for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]  # (t - 1)·11/9, whole

    def test_the_smallest_that_trains(self) -> None:
        assert retraining_rate("ft", 5, 10, 1.0, history=self.HISTORY) == pytest.approx(0.1)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("cosine", 1, None), "schedule='cosine': expected one of llr, allr, clr, slr, lrw, ft"),
            (("slr", 0, 10), "schedule='slr' repeats learning rates of the dense training, but dense_epochs=0"),
            (("lrw", 0, 10), "schedule='lrw' repeats"),
            (("ft", 0, 10), "schedule='ft' repeats"),
            (("allr", 0, None), "Say how long that was with pretraining_epochs"),
        ],
    )
    def test_what_lacks_what_it_is_made_of(self, arguments: tuple, message: str) -> None:
        with pytest.raises(UnsupportedSetup, match=message):
            check_retraining(*arguments)

    @pytest.mark.parametrize(
        "arguments", [("llr", 0, None), ("clr", 0, None), ("allr", 0, 5), ("allr", 5, None), ("ft", 1, None)]
    )
    def test_what_has_it(self, arguments: tuple) -> None:
        check_retraining(*arguments)


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
