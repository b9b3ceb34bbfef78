"""Soft labels by hand, against plain loops and crowd-kit, in any order of rows; and means of them."""

import itertools
import math

import numpy as np
import pytest

from lightning_soup.data.annotator_models import dawid_skene, glad, mace
from lightning_soup.data.soft_labelling import AGGREGATES, METHODS, aggregate, centroid, jensen_shannon, soft_labels
from lightning_soup.data.votes import Votes
from lightning_soup.errors import UnsupportedSetup

GOLDEN = [("a", "w1", 0), ("a", "w2", 0), ("a", "w3", 1), ("b", "w1", 1), ("b", "w2", 1), ("b", "w3", 1)]
GOLDEN += [("c", "w1", 0), ("c", "w2", 2), ("c", "w3", 2), ("d", "w1", 2), ("d", "w2", 2), ("d", "w3", 2)]


def golden():
    return Votes.of(GOLDEN, classes=["0", "1", "2"])


def crowd(seed=0, items=60, workers=12, per_item=4, classes=4):
    """Workers of known reliability; also their true classes."""
    draw = np.random.default_rng(seed)
    truth, skill = draw.integers(classes, size=items), draw.uniform(0.35, 0.95, workers)
    rows = []
    for i in range(items):
        for w in draw.choice(workers, per_item, replace=False):
            label = truth[i] if draw.random() < skill[w] else draw.integers(classes)
            rows.append((f"i{i:03d}", f"w{w:02d}", int(label)))
    return rows, truth


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_counts_and_weights_by_hand():
    votes = golden()
    close(soft_labels(votes, "standard"), [(2 / 3, 1 / 3, 0), (0, 1, 0), (1 / 3, 0, 2 / 3), (0, 0, 1)])
    found = soft_labels(votes, "softmax")
    close(found[:2], [(0.665241, 0.244728, 0.090031), (0.045279, 0.909443, 0.045279)])
    for method in ("wawa", "zbs"):
        close(soft_labels(votes, method)[[0, 2]], [(0.7, 0.3, 0), (0.3, 0, 0.7)])
    close(soft_labels(votes, "majority"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1)])


def test_dawid_skene_by_hand():
    once = dawid_skene(golden(), iterations=1)
    close(once[[0, 2]], [(16 / 19, 3 / 19, 0), (1 / 7, 0, 6 / 7)])
    close(dawid_skene(golden()), np.eye(3)[[0, 1, 2, 2]])


def plain_dawid_skene(votes, iterations):
    p = votes.counts / votes.counts.sum(1, keepdims=True)
    items, classes = p.shape
    rows = list(zip(votes.item, votes.worker, votes.label, strict=True))
    for _ in range(iterations):
        prior = [max(sum(p[i][c] for i in range(items)) / items, 1e-10) for c in range(classes)]
        table = {}
        for w, c in itertools.product(range(len(votes.workers)), range(classes)):
            given = [sum(p[i][c] for i, v, k in rows if v == w and k == label) for label in range(classes)]
            total = sum(given)
            table[w, c] = [max(g / total if total else 0.0, 1e-10) for g in given]
        new = np.zeros_like(p)
        for i in range(items):
            for c in range(classes):
                new[i, c] = prior[c] * math.prod(table[w, c][k] for j, w, k in rows if j == i)
        p = new / new.sum(1, keepdims=True)
    return p


def test_dawid_skene_against_loops():
    votes = Votes.of(crowd(items=15, workers=5, per_item=3)[0])
    close(dawid_skene(votes, iterations=7, tolerance=0), plain_dawid_skene(votes, 7))


def plain_mace(votes, iterations):
    from torch import digamma, tensor

    d = lambda x: float(digamma(tensor(float(x), dtype=tensor(0.0).double().dtype)))  # noqa: E731
    classes, rows = len(votes.classes), list(zip(votes.item, votes.worker, votes.label, strict=True))
    know = dict.fromkeys(range(len(votes.workers)), 0.5)
    guess = {(w, k): 0.5 / classes for w in know for k in range(classes)}
    for step in range(iterations + 1):
        p = np.zeros((len(votes.items), classes))
        for i in range(len(votes.items)):
            for c in range(classes):
                p[i, c] = math.prod(guess[w, k] + (know[w] if k == c else 0) for j, w, k in rows if j == i)
        p /= p.sum(1, keepdims=True)
        if step == iterations:
            return p
        counts = {w: [0.0, dict.fromkeys(range(classes), 0.0)] for w in know}
        for i, w, k in rows:
            knew = p[i, k] * know[w] / (know[w] + guess[w, k])
            counts[w][0] += knew
            counts[w][1][k] += 1 - knew
        for w, (knew, guessed) in counts.items():
            alone = sum(guessed.values())
            know[w] = math.exp(d(knew + 0.5) - d(knew + alone + 1))
            spam = math.exp(d(alone + 0.5) - d(knew + alone + 1))
            for k in range(classes):
                guess[w, k] = spam * math.exp(d(guessed[k] + 10) - d(alone + 10 * classes))
    return None


def test_mace_against_loops():
    votes = Votes.of(crowd(items=12, workers=5, per_item=3)[0])
    close(mace(votes, iterations=6), plain_mace(votes, 6))


def test_glad_is_at_a_maximum():
    """Its posterior is that of its parameters, and knows good workers from poor ones."""
    rows, truth = crowd(items=120, workers=10, per_item=5)
    votes = Votes.of(rows)
    p = glad(votes)
    right = p.argmax(1) == truth
    assert right.mean() > (votes.counts.argmax(1) == truth).mean() - 0.02
    assert p[right].max(1).mean() > p[~right].max(1).mean()
    again = glad(votes, iterations=300, tolerance=0)
    np.testing.assert_allclose(p, again, atol=2e-3)


@pytest.mark.parametrize("method", ["majority", *METHODS, *AGGREGATES])
def test_rows_are_distributions_and_their_order_does_not_matter(method):
    rows, _ = crowd(seed=3)
    votes = Votes.of(rows, classes=["0", "1", "2", "3", "4"])  # 4 is never chosen
    p = soft_labels(votes, method)
    assert p.shape == (60, 5)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    assert (soft_labels(Votes.of(shuffled, classes=["0", "1", "2", "3", "4"]), method) == p).all()


def test_aggregates_by_hand():
    first, even = np.array([[0.75, 0.25, 0]]), np.full((1, 3), 1 / 3)
    close(aggregate([first, even]), [(0.541667, 0.291667, 0.166667)])
    close(aggregate([first, even], "conflation"), first)
    two = np.array([[[0.8, 0.2]], [[0.4, 0.6]]])
    assert centroid(two)[0, 0] == pytest.approx(0.609149730, abs=1e-8)
    grid = np.linspace(0.001, 0.999, 99_901)
    lines = np.stack([grid, 1 - grid], 1)
    total = sum(jensen_shannon(lines, np.tile(row, (len(lines), 1))) for row in two)
    assert grid[total.argmin()] == pytest.approx(0.609149730, abs=2e-5)
    three = [np.array([row]) for row in ((0.75, 0.25, 0), (0.6, 0.3, 0.1), (0.2, 0.3, 0.5))]
    close(aggregate(three, "centroid"), [(0.535581, 0.310145, 0.154275)])
    assert jensen_shannon(two[0], two[1])[0] == pytest.approx(0.086304622, abs=1e-8)
    close(aggregate([first, even], "mean", [3, 1]), (3 * first + even) / 4)


def test_temperatures_bring_methods_together():
    votes = Votes.of(crowd(seed=2)[0])
    rows = [METHODS[name](votes) for name in ("standard", "mace")]
    from lightning_soup.data.soft_labelling import tempered

    before = jensen_shannon(*rows).mean()
    after = jensen_shannon(*tempered(np.stack(rows))).mean()
    assert after < before


def test_the_mean_of_the_seven_is_the_default():
    votes = golden()
    close(soft_labels(votes), np.mean([METHODS[name](votes) for name in METHODS], 0))
    close(
        soft_labels(votes, weights={"standard": 1, "mace": 3}),
        (METHODS["standard"](votes) + 3 * METHODS["mace"](votes)) / 4,
    )


def test_one_vote_an_item_and_workers_with_one_vote():
    votes = Votes.of([("a", "u", 0), ("b", "v", 1), ("c", "w", 1)])
    for method in METHODS:
        p = soft_labels(votes, method)
        assert np.isfinite(p).all()
        assert p.argmax(1).tolist() == [0, 1, 1]


def test_bad_input():
    with pytest.raises(UnsupportedSetup, match="method='vote': expected one of majority, standard"):
        soft_labels(golden(), "vote")
    for weights in ({"standard": -1}, {"standard": 0}, {"mice": 1}):
        with pytest.raises(UnsupportedSetup, match="numbers of 0 or more"):
            soft_labels(golden(), weights=weights)
    with pytest.raises(UnsupportedSetup, match="arrays of one shape"):
        aggregate([np.ones((2, 2)), np.ones((3, 2))])


# ---------------------------------------------------------------------------------------------------------- crowd-kit


def frame(rows):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("crowdkit")
    return pandas.DataFrame(sorted(rows), columns=["task", "worker", "label"])


def theirs(found, votes):
    return found.reindex(index=list(votes.items), columns=[int(c) for c in votes.classes]).fillna(0).to_numpy()


def test_against_crowd_kit():
    rows, _ = crowd(seed=5, items=150)
    table = frame(rows)
    import crowdkit.aggregation as kit

    votes = Votes.of(rows)
    close(soft_labels(votes, "standard"), theirs(kit.MajorityVote().fit_predict_proba(table), votes))
    # Theirs ends earlier, by the likelihood.
    other = theirs(kit.DawidSkene(100).fit_predict_proba(table), votes)
    assert np.abs(dawid_skene(votes) - other).mean() < 0.005
    assert (dawid_skene(votes).argmax(1) == other.argmax(1)).all()
    other = theirs(kit.GLAD(100).fit_predict_proba(table), votes)
    assert np.abs(glad(votes) - other).mean() < 0.02
    assert (glad(votes).argmax(1) == other.argmax(1)).mean() > 0.97
