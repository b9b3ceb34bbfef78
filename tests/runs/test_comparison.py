"""Gains over the best single ingredient, in numbers and in words."""

import pytest
import torch

from lightning_soup.evaluation.significance import Interval
from lightning_soup.runs.comparison import Comparison, Row, compare, signed


def flags(n, right):
    return torch.arange(n) < right


def test_compare_counts_and_measures_in_percent():
    best = flags(200, 100)
    model = best.clone()
    model[100:130] = True  # 30 won
    model[:10] = False  # 10 lost
    got = compare(model, best)
    assert (got.images, got.won, got.lost) == (200, 30, 10)
    assert got.accuracy.mean == pytest.approx(60.0)
    assert got.gain.mean == pytest.approx(10.0)
    assert 3 < got.gain.low < 10 < got.gain.high < 17
    assert got.distinguishable
    assert got.verdict == "better than the best single"
    assert compare(best, model).verdict == "worse than the best single"


def test_an_interval_with_zero_is_said_in_words():
    got = Comparison(100, Interval(50, 40, 60), Interval(1.0, -2.0, 4.0), won=10, lost=9)
    assert not got.distinguishable
    assert got.verdict == "not distinguishable from the best single at 95 %"


@pytest.mark.parametrize(("differ", "sure"), [(5, False), (6, True)])
def test_five_unanimous_images_prove_nothing(differ, sure):
    # Six of six has a two-sided sign test of 2 · 0.5⁶ = 3.1 %, five of five one of 6.25 %.
    best = flags(1000, 900)
    got = compare(flags(1000, 900 + differ), best)
    assert not got.gain.contains_zero  # the bootstrap alone would be sure of both
    assert got.distinguishable is sure
    assert got.verdict.endswith(": only 5 images differ") is not sure


@pytest.mark.parametrize(
    ("differ", "words"), [(0, "no image differs"), (1, "only 1 image differs"), (2, "only 2 images differ")]
)
def test_few_differences_are_counted(differ, words):
    assert compare(flags(100, 50 + differ), flags(100, 50)).verdict.endswith(f"at 95 %: {words}")


def test_the_best_single_is_compared_with_nothing():
    got = compare(flags(10, 5), None)
    assert (got.gain, got.verdict, got.gain_text, got.distinguishable) == (None, "", "", False)


def test_groups_reach_both_intervals():
    best, model = flags(100, 60), flags(100, 70)
    groups = torch.arange(100).repeat(4)
    alone, repeated = compare(model, best), compare(model.repeat(4), best.repeat(4), groups)
    assert repeated.gain == alone.gain
    assert repeated.accuracy == alone.accuracy
    assert repeated.won == alone.won == 10


@pytest.mark.parametrize(
    ("images", "gain", "text"),
    [
        (630, Interval(0.79, -0.21, 1.9), "+0.8 [−0.2, +1.9]"),
        (630, Interval(1.8, 0.04, 3.8), "+1.80 [+0.04, +3.80]"),  # "0.0" would hide that zero is excluded
        (630, Interval(1.8, -0.04, 3.8), "+1.8 [0.0, +3.8]"),
        (50_000, Interval(0.65, 0.51, 0.79), "+0.65 [+0.51, +0.79]"),
        (630, Interval(0.0, 0.0, 0.0), "0.0 [0.0, 0.0]"),
    ],
)
def test_gain_text(images, gain, text):
    assert Comparison(images, Interval(50, 40, 60), gain, 20, 20).gain_text == text


def test_accuracy_text():
    assert Comparison(630, Interval(95.68, 93.8, 97.03)).accuracy_text == "95.7 [93.8, 97.0]"


@pytest.mark.parametrize(("number", "text"), [(1.25, "+1.2"), (-3.06, "−3.1"), (0.04, "0.0"), (-0.04, "0.0")])
def test_signed(number, text):
    assert signed(number) == text


def test_row_means_the_shifted_sets_with_equal_weight():
    tests = {n: Comparison(100, Interval(a, 0, 100)) for n, a in (("main", 90), ("a", 60), ("b", 70))}
    row = Row("x", "best", 1, 0.9, tests, {"main": 0.1, "a": 1.0, "b": 0.8})
    assert row.shifted == 65
    assert row.plain()["mean_shifted_accuracy"] == 65
    assert row.plain()["tests"]["a"] == {"accuracy": 60, "low": 0, "high": 100, "nll": 1.0}
    assert Row("x", "best", 1, None, {"main": tests["main"]}, {}).shifted is None
