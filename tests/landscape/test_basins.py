"""Basins by midpoints: which are found, what is measured first, and the words."""

import math

import pytest
import torch

from lightning_soup.errors import NonFiniteScore, RecipeError, UnsupportedSetup
from lightning_soup.evaluation import Evaluator
from lightning_soup.landscape.basins import find_basins
from lightning_soup.recipes import GreedySoup, Ingredient
from tests.landscape.test_inspection import network, tuned


class Wells(Evaluator):
    """Loss (x² − 1)² + 0.1·|y|, by the first two elements: a basin at x = 1 and one at x = −1."""

    metric, mode = "val_loss", "min"

    def __init__(self):
        self.asked = []

    def score(self, weights):
        x, y = weights["w"][:2].tolist()
        self.asked.append((round(x, 3), round(y, 3)))
        value = (x**2 - 1) ** 2 + 0.1 * abs(y)
        if not math.isfinite(value):
            raise NonFiniteScore("not finite")
        return -value


def points(*values):
    return [{"w": torch.tensor(value, dtype=torch.float64)} for value in values]


def test_two_basins():
    judge = Wells()
    found = find_basins(points((1, 0.3), (-1, 0.2), (1.02, 0.1), (-0.98, 0.4), (1, 0.5)), judge, tolerance=0.1)
    assert found.basins == ((0, 2, 4), (1, 3))
    assert found.order == (2, 0, 4)
    assert found.evaluations[0] == len(judge.asked) <= 4 * 5
    assert found.barriers[0, 1] == pytest.approx(1 + 0.025 - 0.025, abs=1e-9)
    told = found.verdict(["a", "b", "c", "d", "e"])
    assert told[0].startswith("b and d lie outside the basin of the other 3: a barrier of 0.998 in")
    assert told[0].endswith("in val_loss at the midpoint.")
    assert told[1] == "3 of 5 lie in one basin; the best of them is c."


def test_the_best_is_compared_first_and_the_budget_holds():
    judge = Wells()
    rows = points(*[(1, 0.1 * (i + 1)) for i in range(8)])
    found = find_basins(rows, judge, budget=15)
    assert len(judge.asked) == 15
    assert found.evaluations == (15, 36)
    assert found.middle[0].isfinite().sum() == 7
    assert found.basins == (tuple(range(8)),)
    with pytest.raises(UnsupportedSetup, match=r"2K − 1 \(15\)"):
        find_basins(rows, Wells(), budget=14)


def test_what_is_not_finite_is_outside():
    found = find_basins(points((1, 0.1), (math.nan, 0), (1, 0.2)), Wells())
    assert found.basins == ((0, 2), (1,))
    assert found.q[1] == math.inf
    assert found.poor == (1,)
    assert found.verdict(["a", "b", "c"])[0] == "b is far worse by itself: val_loss inf, the best has 0.01."


class Nearness(Evaluator):
    """Accuracy that falls with the distance from one point."""

    metric = "val_acc"

    def __init__(self, target):
        self.target, self.scored = target, 0

    def score(self, weights):
        self.scored += 1
        distance = sum(float((weights[name] - value).square().sum()) for name, value in self.target.items())
        return 1 / (1 + distance)


def test_screening_saves_evaluations_at_the_same_score():
    start, other = network(0), network(1)
    good = [tuned(start, i) for i in range(8)]
    bad = [tuned(other, 20), tuned(other, 21), tuned(start, 30, 0.5), tuned(start, 31, 0.6)]
    everyone = [Ingredient(row, label=f"{i}") for i, row in enumerate([*good[:4], *bad, *good[4:]])]
    plain, screened = Nearness(start), Nearness(start)
    first = GreedySoup(common_start="ignore").cook(everyone, plain)
    second = GreedySoup(common_start="ignore", screen=True).cook(everyone, screened)
    assert second.score == first.score
    assert plain.scored == 2 * 12 - 1
    assert screened.scored == 2 * 8 - 1
    assert [item.name for item in second.ingredients] == ["0", "1", "2", "3", "8", "9", "10", "11"]
    notes = " ".join(second.notes)
    assert "left out unevaluated: 4 and 5 come from another start" in notes
    assert "left out unevaluated: 6 lies" in notes
    # Without "ignore" the other start would be refused; it is gone by then.
    third = GreedySoup(screen=True).cook(everyone, Nearness(start))
    assert third.score == first.score


@pytest.mark.parametrize("best", [0, 1])
def test_a_screen_of_trials_makes_the_soup_of_no_screen(best):
    starts = network(0), network(1)
    good = [tuned(starts[0], i) for i in range(8)]
    bad = [tuned(starts[1], 20), tuned(starts[1], 21), tuned(starts[0], 30, 0.5), tuned(starts[0], 31, 0.6)]
    everyone = [Ingredient(row, label=f"{i}") for i, row in enumerate([*good[:4], *bad, *good[4:]])]
    plain, screened = Nearness(starts[best]), Nearness(starts[best])
    first = GreedySoup(common_start="ignore").cook(everyone, plain)
    second = GreedySoup(screen="trials").cook(everyone, screened)
    assert second.score == first.score
    assert second.coefficients == first.coefficients
    assert (plain.scored, screened.scored) == (23, 12 + (7 if best == 0 else 1))
    notes = " ".join(second.notes)
    assert "tried only among its like, or left out: 4 and 5 come from another start" in notes
    assert "left out: 6 lies" in notes


def test_a_screen_of_trials_leaves_out_what_is_broken():
    rows = [tuned(network(0), i) for i in range(5)]
    next(iter(rows[2].values())).view(-1)[0] = math.nan
    everyone = [Ingredient(row, label=f"{i}") for i, row in enumerate(rows)]
    soup = GreedySoup(screen="trials").cook(everyone, judge := Nearness(network(0)))
    assert [item.name for item in soup.ingredients] == ["0", "1", "3", "4"]
    assert judge.scored == 7
    with pytest.raises(RecipeError, match="screen='some'"):
        GreedySoup(screen="some")


def test_a_screen_that_leaves_all():
    start = network(0)
    rows = [Ingredient(tuned(start, i), label=f"{i}") for i in range(5)]
    judge = Nearness(start)
    soup = GreedySoup(screen=True).cook(rows, judge)
    assert judge.scored == 9
    assert not any("left out" in note for note in soup.notes)
