"""Soft labels from counts: golden cases, plain loops, and crowd-kit."""

import numpy as np
import pytest

from lightning_soup.data.vote_counts import (
    agreement,
    majority,
    softmax,
    standard,
    wawa,
    weighted_votes,
    zero_based_skill,
)
from lightning_soup.data.votes import Votes
from tests.helpers.crowds import four_items, random_votes


def test_golden_shares_of_votes():
    assert standard(four_items())[[0, 2]] == pytest.approx(np.array([[2 / 3, 1 / 3, 0], [1 / 3, 0, 2 / 3]]), abs=1e-12)
    assert standard(four_items())[1].tolist() == [0, 1, 0]


def test_golden_softmax_of_counts():
    found = softmax(four_items())
    assert found[0] == pytest.approx([0.665241, 0.244728, 0.090031], abs=1e-6)
    assert found[1] == pytest.approx([0.045279, 0.909443, 0.045279], abs=1e-6)
    many = Votes.of(["a"] * 900, range(900), [0] * 899 + [1], [0, 1, 2])
    assert softmax(many)[0] == pytest.approx([1, 0, 0], abs=1e-12)  # exp(899) would be infinite


@pytest.mark.parametrize("method", [wawa, zero_based_skill])
def test_golden_skills(method):
    votes = four_items()
    assert agreement(votes, standard(votes)).tolist() == [0.75, 1, 0.75]
    found = method(votes)
    assert found[0] == pytest.approx([0.7, 0.3, 0], abs=1e-9)
    assert found[2] == pytest.approx([0.3, 0, 0.7], abs=1e-9)


def slow_weighted(votes, skills):
    rows = []
    for item in range(len(votes.items)):
        row = [0.0] * len(votes.classes)
        for i, w, y in zip(votes.item, votes.worker, votes.label, strict=True):
            if i == item:
                row[y] += skills[w]
        rows.append([value / sum(row) for value in row])
    return rows


def slow_agreement(votes, labels):
    shares = []
    for worker in range(len(votes.workers)):
        given = [(i, y) for i, w, y in zip(votes.item, votes.worker, votes.label, strict=True) if w == worker]
        winners = [max(range(len(votes.classes)), key=lambda c, i=i: (round(labels[i][c], 9), -c)) for i, _ in given]
        shares.append(sum(y == winner for (_, y), winner in zip(given, winners, strict=True)) / len(given))
    return shares


def test_against_plain_loops():
    votes = random_votes(items=25)
    ones = [1.0] * len(votes.workers)
    np.testing.assert_allclose(standard(votes), slow_weighted(votes, ones), atol=1e-12)
    skills = slow_agreement(votes, slow_weighted(votes, ones))
    np.testing.assert_allclose(wawa(votes), slow_weighted(votes, skills), atol=1e-12)


@pytest.mark.parametrize(("steps", "lr", "halved_every"), [(100, 1.0, 20), (1, 0.3, 20), (7, 0.3, 3)])
def test_zero_based_skill_against_plain_loops(steps, lr, halved_every):
    """With η = 1 the skills are agreements at once, so that neither their start nor how η falls would be seen."""
    votes = random_votes(items=25)
    a, rate = [1 / 4 + 1e-5] * len(votes.workers), lr
    for step in range(1, steps + 1):
        rate = rate / 2 if step % halved_every == 0 else rate
        wanted = slow_agreement(votes, slow_weighted(votes, a))
        a = [old + rate * (new - old) for old, new in zip(a, wanted, strict=True)]
    np.testing.assert_allclose(zero_based_skill(votes, steps, lr, halved_every), slow_weighted(votes, a), atol=1e-9)
    assert zero_based_skill.__defaults__ == (100, 1.0, 20)


def test_ties_go_to_the_first_class_whatever_is_summed_first():
    """0.1 + 0.2 against 0.3, which floating point makes larger or smaller by the order."""
    votes = Votes.of(["a"] * 3, [1, 2, 3], [1, 1, 0], [0, 1])
    labels = weighted_votes(votes, np.array([0.1, 0.2, 0.3]))
    assert labels[0, 1] != labels[0, 0]
    assert agreement(votes, labels).tolist() == [0, 0, 1]
    assert agreement(votes, weighted_votes(votes, np.array([0.1, 0.2, 0.3 - 1e-6]))).tolist() == [1, 1, 0]
    assert majority(Votes.of(["a", "a"], [1, 2], [1, 2], [0, 1, 2])).tolist() == [[0, 1, 0]]


def test_workers_without_any_skill_count_alike():
    votes = Votes.of(["a", "a", "b"], [1, 2, 3], [0, 1, 0], [0, 1])
    assert weighted_votes(votes, np.zeros(3)).tolist() == [[0.5, 0.5], [1, 0]]
    alone = Votes.of(["a", "a", "a", "b", "b", "b"], [1, 2, 3, 4, 5, 3], [0, 0, 1, 1, 0, 1], [0, 1])
    assert agreement(alone, standard(alone)).tolist() == [1, 1, 0.5, 1, 0]
    assert wawa(alone)[1] == pytest.approx([0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ours"), [("Wawa", wawa), ("ZeroBasedSkill", zero_based_skill)])
def test_against_crowd_kit(name, ours):
    """Its own prediction fails on current scikit-learn; its skills do not. Ties go to the first column there."""
    pandas = pytest.importorskip("pandas")
    aggregation = pytest.importorskip("crowdkit.aggregation")
    draw = np.random.default_rng(1)
    truth = draw.integers(3, size=80)
    rows = [
        (i, w, int(truth[i] if draw.random() < 0.4 + w / 20 else draw.integers(3))) for i in range(80) for w in range(9)
    ]
    rows.sort(key=lambda row: row[2])  # columns are in the order in which labels come
    frame = pandas.DataFrame(rows, columns=["task", "worker", "label"])
    model = getattr(aggregation, name)().fit(frame)
    theirs = aggregation.MajorityVote().fit_predict_proba(frame, skills=model.skills_)
    votes = Votes.of([f"{i:02d}" for i, _, _ in rows], *list(zip(*rows, strict=True))[1:])
    theirs = theirs.reindex(index=range(80), columns=range(3)).fillna(0).to_numpy()
    np.testing.assert_allclose(ours(votes), theirs, atol=1e-6)
