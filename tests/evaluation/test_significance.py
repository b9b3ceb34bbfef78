"""Intervals: against slow references, exact enumeration, textbook values, and by counting how often they
hold."""

import itertools
import random
import tracemalloc

import numpy as np
import pytest
import torch

from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation.significance import Interval, accuracy_interval, paired_bootstrap


def outcomes(n, seed, better=0.15, worse=0.10):
    """Right/wrong vectors of two models: `better` and `worse` are the chances that only one of them is
    right."""
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    both = u > 0.35
    return (u < better) | both, ((u >= better) & (u < better + worse)) | both


def slow_bootstrap(d, samples, confidence, groups=None):
    """The definition: draw images (or groups of images), average, sort."""
    rng = random.Random(1)
    keys = list(range(len(d))) if groups is None else groups
    members = [[x for x, g in zip(d, keys, strict=True) if g == key] for key in sorted(set(keys))]
    means = []
    for _ in range(samples):
        drawn = [x for _ in members for x in rng.choice(members)]
        means.append(sum(drawn) / len(drawn))
    return np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bootstrap_agrees_with_the_definition(confidence):
    a, b = outcomes(120, seed=3)
    fast = paired_bootstrap(a, b, samples=8000, confidence=confidence)
    slow = slow_bootstrap((a.double() - b.double()).tolist(), 8000, confidence)
    width = fast.high - fast.low
    assert fast.mean == pytest.approx((a.double() - b.double()).mean().item(), abs=1e-12)
    assert [fast.low, fast.high] == pytest.approx(list(slow), abs=0.07 * width)
    assert fast.confidence == confidence


def test_bootstrap_of_real_numbers_agrees_with_the_definition():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(60, generator=generator) + 0.2, torch.randn(60, generator=generator)
    fast = paired_bootstrap(a, b, samples=6000)
    slow = slow_bootstrap((a - b).tolist(), 6000, 0.95)
    assert [fast.low, fast.high] == pytest.approx(list(slow), abs=0.05 * (fast.high - fast.low))


def test_bootstrap_is_exact_in_the_limit():
    # Four images: all 4^4 resamples can be listed, each equally likely.
    d = [1.0, -1.0, 0.0, 0.5]
    every = sorted(sum(r) / 4 for r in itertools.product(d, repeat=4))
    got = paired_bootstrap(torch.tensor(d), torch.zeros(4), samples=200_000, confidence=0.7)
    assert [got.low, got.high] == pytest.approx(list(np.quantile(every, [0.15, 0.85])), abs=1e-9)


def test_grouped_images_are_resampled_together():
    d = [1.0, 1.0, 1.0, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0, 1.0] * 3
    groups = [i // 3 for i in range(30)]
    groups[-1] = 0  # groups of unequal size: a ratio of sums, not a mean of means
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    got = paired_bootstrap(
        torch.tensor(d)[order], torch.zeros(30), groups=torch.tensor(groups)[order] * 7, samples=8000
    )
    slow = slow_bootstrap(d, 8000, 0.95, groups)
    assert [got.low, got.high] == pytest.approx(list(slow), abs=0.04)


def test_copies_of_every_image_add_no_certainty():
    a, b = outcomes(200, seed=0)
    once = paired_bootstrap(a, b)
    copies = torch.arange(200).repeat(6)
    assert paired_bootstrap(a.repeat(6), b.repeat(6), groups=copies) == once
    alone = paired_bootstrap(a.repeat(6), b.repeat(6))
    assert alone.high - alone.low < 0.5 * (once.high - once.low)  # what ignoring the groups would claim


@pytest.mark.parametrize(("better", "worse"), [(0.10, 0.10), (0.16, 0.08)])
def test_bootstrap_intervals_hold_as_often_as_they_say(better, worse):
    hits = sum(
        interval.low <= better - worse <= interval.high
        for interval in (paired_bootstrap(*outcomes(300, s, better, worse), samples=400) for s in range(600))
    )
    assert 0.925 <= hits / 600 <= 0.97  # 95 % give or take 2.8 standard errors


def test_bootstrap_is_deterministic_and_seeded():
    a, b = outcomes(500, seed=1)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    paired_bootstrap(a, b)
    assert torch.equal(torch.rand(1), before)  # leaves torch's own generator alone


def test_swapping_the_models_mirrors_the_interval():
    a, b = outcomes(500, seed=2)
    there, back = paired_bootstrap(a, b, samples=20_000), paired_bootstrap(b, a, samples=20_000)
    assert there.mean == -back.mean
    assert [there.low, there.high] == pytest.approx([-back.high, -back.low], abs=0.002)


def test_equal_models_are_not_distinguishable():
    a, _ = outcomes(100, seed=0)
    assert paired_bootstrap(a, a) == Interval(0.0, 0.0, 0.0)
    assert paired_bootstrap(a, a).contains_zero


def test_a_model_that_is_always_better_is():
    assert paired_bootstrap(torch.ones(20), torch.zeros(20)) == Interval(1.0, 1.0, 1.0)


def test_memory_stays_bounded_for_fifty_thousand_images():
    a = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    tracemalloc.start()
    paired_bootstrap(a, torch.zeros(50_000), samples=60)  # every difference distinct: the worst case
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 2**20  # 60 × 50,000 counts at once and as floats would be 48 MB


@pytest.mark.parametrize(
    ("interval", "contains"),
    [
        ((0.1, -0.1, 0.3), True),
        ((0.1, 0.05, 0.2), False),
        ((-0.1, -0.2, -0.05), False),
        ((0.1, 0.0, 0.2), True),
    ],
)
def test_contains_zero(interval, contains):
    assert Interval(*interval).contains_zero is contains


def test_scaled():
    assert Interval(0.5, 0.25, 0.75, 0.9).scaled(100) == Interval(50, 25, 75, 0.9)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # From the quadratic (p̂ − p)² = z² p(1 − p)/n solved by hand for z = 1.959964.
    [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_wilson_textbook_values(right, n, low, high):
    got = accuracy_interval(torch.arange(n) < right)
    assert (got.mean, got.low, got.high) == pytest.approx((right / n, low, high), abs=1e-4)


def test_wilson_ends_solve_the_score_equation():
    n, z = 630, 2.5758293035489004
    got = accuracy_interval(torch.arange(n) < 597, confidence=0.99)
    for end in (got.low, got.high):
        assert (597 / n - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / n, rel=1e-9)


@pytest.mark.parametrize("p", [0.97, 0.6])
def test_wilson_holds_as_often_as_it_says(p):
    draws = torch.rand(1500, 100, generator=torch.Generator().manual_seed(0)) < p
    hits = sum(i.low <= p <= i.high for i in map(accuracy_interval, draws))
    assert 0.925 <= hits / 1500 <= 0.985


def test_wilson_counts_independent_images_only():
    right = torch.arange(100) < 80
    assert accuracy_interval(right.repeat(6), groups=torch.arange(100).repeat(6)) == accuracy_interval(right)
    apart = accuracy_interval(right.repeat(6), groups=torch.arange(600))
    assert apart.high - apart.low < 0.5 * (accuracy_interval(right).high - accuracy_interval(right).low)
    # All right: the variance says nothing, so the number of groups must.
    assert accuracy_interval(torch.ones(60), groups=torch.arange(10).repeat(6)).low == pytest.approx(0.7225, abs=1e-4)


def test_wilson_of_a_mean_over_models_is_no_narrower_than_for_one():
    one = accuracy_interval(torch.arange(50) < 40).low
    assert accuracy_interval(torch.tensor([0.7, 0.9] * 25)).low == pytest.approx(one)
    assert accuracy_interval(torch.full((50,), 0.8)).low == pytest.approx(one)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_bootstrap(torch.ones(3), torch.ones(4)), "got 3 and 4"),
        (lambda: paired_bootstrap(torch.ones(0), torch.ones(0)), r"a: .*not empty; got shape \[0\]"),
        (lambda: paired_bootstrap(torch.ones(2, 2), torch.ones(2, 2)), r"got shape \[2, 2\]"),
        (
            lambda: paired_bootstrap(torch.ones(2), torch.tensor([1, float("nan")])),
            "b: outcome of image 1 is not",
        ),
        (lambda: paired_bootstrap(torch.ones(2), torch.ones(2), samples=0), "samples=0"),
        (lambda: paired_bootstrap(torch.ones(2), torch.ones(2), confidence=95), "confidence=95.*0.95"),
        (
            lambda: paired_bootstrap(torch.ones(2), torch.ones(2), groups=torch.ones(3)),
            r"\[3\] for \[2\] images",
        ),
        (lambda: accuracy_interval(torch.tensor([0.0, 2.0])), "between 0"),
        (lambda: accuracy_interval(torch.ones(0)), "not empty"),
        (lambda: accuracy_interval(torch.ones(2), confidence=1.0), "confidence=1.0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LightningSoupError, match=message):
        call()
