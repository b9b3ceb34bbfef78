"""soft_labels: golden aggregates, what each of them minimises, and that no order matters."""

import random
from itertools import combinations

import numpy as np
import pytest
import torch

from lightning_soup.data import method_labels, soft_labels
from lightning_soup.data.label_aggregation import (
    AGGREGATES,
    METHODS,
    aggregated,
    agreed_temperatures,
    disagreement,
    tempered,
)
from lightning_soup.data.votes import Votes
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.crowds import four_items, random_rows, random_votes

ALL = [*METHODS, "majority", *AGGREGATES]
SHARP, UNIFORM = np.array([[0.75, 0.25, 0.0]]), np.full((1, 3), 1 / 3)
THREE = [SHARP, np.array([[0.6, 0.3, 0.1]]), np.array([[0.2, 0.3, 0.5]])]
TWO = [np.array([[0.8, 0.2]]), np.array([[0.4, 0.6]])]


def js(p, q):
    def entropy(x):
        return -sum(value * np.log(value) for value in x if value > 0)

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def test_golden_aggregates():
    assert aggregated([SHARP, UNIFORM])[0] == pytest.approx([0.541667, 0.291667, 0.166667], abs=1e-6)
    assert aggregated([SHARP, UNIFORM], "conflation")[0] == pytest.approx([0.75, 0.25, 0], abs=1e-12)
    assert aggregated(TWO)[0, 0] == pytest.approx(0.6)
    assert aggregated(TWO, "centroid")[0, 0] == pytest.approx(0.609149730, abs=1e-9)
    assert aggregated(THREE, "centroid")[0] == pytest.approx([0.535581, 0.310145, 0.154275], abs=1e-6)
    assert disagreement(torch.from_numpy(np.stack(TWO))).item() == pytest.approx(0.086304622, abs=1e-9)


def test_the_mean_is_of_the_seven():
    votes = random_votes()
    seven = method_labels(votes)
    assert list(seven) == list(METHODS)
    assert len(seven) == 7
    np.testing.assert_allclose(soft_labels(votes), sum(seven.values()) / 7, atol=1e-12)
    for name, labels in seven.items():
        assert np.array_equal(soft_labels(votes, name), labels)


def test_some_methods_with_weights():
    votes = random_votes()
    found = soft_labels(votes, "mean", ["standard", "mace"], [1, 3])
    p, q = soft_labels(votes, "standard"), soft_labels(votes, "mace")
    np.testing.assert_allclose(found, (p + 3 * q) / 4, atol=1e-12)
    for how in ("mean", "centroid", "conflation"):
        np.testing.assert_allclose(
            aggregated([q, p], how, [1, 0]), q if how != "conflation" else q**2 / (q**2).sum(1)[:, None]
        )


def test_the_centroid_has_the_least_divergence():
    draw = np.random.default_rng(0)
    p = draw.dirichlet([0.5] * 3, size=(4, 5))
    p[0, 0] = [1, 0, 0]
    p[:, 1, 2] = 0  # a class that no method gives any weight
    p[:, 1] /= p[:, 1].sum(1, keepdims=True)
    w = np.array([0.4, 0.3, 0.2, 0.1])
    found = aggregated(list(p), "centroid", w)
    assert found[1, 2] == 0
    for i, row in enumerate(found):
        least = sum(share * js(row, other) for share, other in zip(w, p[:, i], strict=True))
        for _ in range(200):
            moved = np.abs(row + 0.01 * draw.standard_normal(3) * (row > 0))
            moved /= moved.sum()
            assert sum(share * js(moved, other) for share, other in zip(w, p[:, i], strict=True)) >= least - 1e-12


def test_a_method_that_counts_for_nothing_changes_nothing():
    for how in ("mean", "centroid", "conflation"):
        found = aggregated([SHARP, SHARP, np.array([[0.0, 1.0, 0.0]])], how, [1, 1, 0])
        wanted = SHARP if how != "conflation" else SHARP**3 / (SHARP**3).sum()  # a product of as many as there are
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_temperatures_are_at_a_minimum():
    p = np.stack(list(method_labels(random_votes(), ["standard", "softmax", "glad"]).values()))
    T = agreed_temperatures(p)

    def objective(T):
        q = tempered(p, T)
        pairs = [np.mean([js(a, b) for a, b in zip(q[m], q[n], strict=True)]) for m, n in combinations(range(3), 2)]
        return np.mean(pairs) + 1e-3 * (T**2).sum()

    assert agreed_temperatures.__defaults__ == (1e-3, 1.5)
    least = objective(T)
    assert least < objective(np.full(3, 1.5)) - 1e-3
    for place in range(3):
        for factor in (0.9, 1.1):
            moved = T.copy()
            moved[place] *= factor
            assert objective(moved) >= least - 1e-6
    np.testing.assert_allclose(aggregated(list(p), "temperature"), tempered(p, T).mean(0), atol=1e-12)
    np.testing.assert_allclose(aggregated(list(p), "hybrid"), aggregated(list(tempered(p, T)), "centroid"), atol=1e-12)


def test_temperature_1_changes_nothing_and_zeros_stay():
    p = np.stack(THREE)
    np.testing.assert_allclose(tempered(p, np.ones(3)), p, atol=1e-12)
    assert (tempered(p, np.array([0.001, 1, 900.0])) >= 0).all()
    assert tempered(p, np.array([900.0, 1, 1]))[0, 0] == pytest.approx([0.5, 0.5, 0], abs=1e-3)
    assert tempered(p, np.array([0.001, 1, 1]))[0, 0] == pytest.approx([1, 0, 0], abs=1e-12)


def test_conflation_falls_back_where_every_class_is_vetoed():
    labels = [np.array([[1.0, 0], [1, 0]]), np.array([[0.0, 1], [0.5, 0.5]])]
    assert aggregated(labels, "conflation").tolist() == [[0.5, 0.5], [1, 0]]


@pytest.mark.parametrize("method", ALL)
def test_distributions_whatever_the_order_of_rows(method):
    rows = random_rows()
    classes = [f"class {label}" for label in range(4)]  # the last of which nobody has chosen
    found = soft_labels(Votes.of(*zip(*rows, strict=True), classes), method)
    assert found.shape == (60, 4)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert (found >= 0).all()
    assert (found <= 1).all()
    random.Random(1).shuffle(rows)
    assert np.array_equal(soft_labels(Votes.of(*zip(*rows, strict=True), classes), method), found)


@pytest.mark.parametrize("method", ALL)
def test_names_do_not_matter(method):
    """Items, workers and classes in the opposite order: the same labels, but for rounding (classes: but for ties)."""
    rows = random_rows()
    found = soft_labels(Votes.of(*zip(*rows, strict=True)), method)
    renamed = [
        (f"{99 - int(item[-2:]):02d}", "".join(chr(155 - ord(c)) for c in w if c.islower()) + w, label)
        for item, w, label in rows
    ]
    again = soft_labels(Votes.of(*zip(*renamed, strict=True)), method)[::-1]
    np.testing.assert_allclose(again, found, atol=1e-4 if method in ("temperature", "hybrid") else 1e-9)
    if method not in ("majority", "wawa", "zero_based_skill", *AGGREGATES):
        other = [
            (item, worker, {"class 0": "z", "class 1": "y", "class 2": "x"}[label]) for item, worker, label in rows
        ]
        flipped = soft_labels(Votes.of(*zip(*other, strict=True)), method)[:, ::-1]
        np.testing.assert_allclose(flipped, found, atol=1e-9)


def test_the_aggregate_has_the_lowest_label_nll_on_its_golden_votes():
    """By experts who say a = 0, b = 1, c = 2, d = 2 the mean lies between its methods."""
    seven, experts = method_labels(four_items()), [0, 1, 2, 2]
    nll = {name: -np.log(p[range(4), experts]).mean() for name, p in seven.items()}
    assert min(nll.values()) < -np.log(soft_labels(four_items())[range(4), experts]).mean() < max(nll.values())


def test_a_table_is_taken_too(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("task,worker,label\n" + "".join(f"{','.join(row)}\n" for row in random_rows()))
    assert np.array_equal(soft_labels(path, "wawa"), soft_labels(Votes.of(*zip(*random_rows(), strict=True)), "wawa"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "median"}, "method='median': expected one of standard, .*majority, mean"),
        ({"method": "wawa", "weights": [1]}, "are for aggregates .*not for method='wawa'"),
        ({"methods": []}, "methods=.*expected some of standard"),
        ({"methods": ["wawa", "wawa"]}, "each once"),
        ({"methods": ["mean"]}, "expected some of standard"),
        ({"weights": [1, 2]}, "expected 7 numbers of 0 or more"),
        (
            {"methods": ["wawa", "mace"], "weights": [0, 0]},
            "expected 2 numbers of 0 or more, one per method, not all 0",
        ),
        ({"weights": [1] * 6 + [-1]}, "expected 7 numbers"),
        ({"weights": [1] * 6 + [float("nan")]}, "expected 7 numbers"),
        ({"weights": [1] * 6 + [float("inf")]}, "expected 7 numbers"),
        ({"weights": dict.fromkeys(METHODS, 1.0)}, "expected 7 numbers"),
        ({"weights": ["much"] * 7}, "expected 7 numbers"),
        ({"method": ["wawa"]}, r"method=\['wawa'\]: expected one of"),
    ],
)
def test_choices_that_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        soft_labels(four_items(), **options)


def test_labels_that_cannot_be_aggregated():
    with pytest.raises(UnsupportedSetup, match=r"shapes \[\(1, 3\), \(1, 2\)\] cannot"):
        aggregated([UNIFORM, TWO[0]])
    with pytest.raises(UnsupportedSetup, match=r"shapes \[\]"):
        aggregated([])
    with pytest.raises(UnsupportedSetup, match="not all distributions"):
        aggregated([UNIFORM, 2 * UNIFORM])
    with pytest.raises(UnsupportedSetup, match="not all distributions"):
        aggregated([UNIFORM, np.array([[1.5, -0.5, 0.0]])])
    with pytest.raises(UnsupportedSetup, match="Aggregate 'sum': expected one of mean"):
        aggregated([UNIFORM], "sum")
