"""Dawid-Skene, GLAD and MACE: golden cases, the equations in plain loops, and crowd-kit."""

import math

import numpy as np
import pytest
import torch

from lightning_soup.data.annotator_models import dawid_skene, glad, mace
from lightning_soup.data.vote_counts import majority
from lightning_soup.data.votes import Votes
from tests.helpers.crowds import four_items, random_rows, random_votes


def listed(votes):
    return list(zip(votes.item.tolist(), votes.worker.tolist(), votes.label.tolist(), strict=True))


def normalised(row):
    return [value / sum(row) for value in row]


def shares(votes):
    return [normalised(row) for row in votes.counts.tolist()]


# ------------------------------------------------------------------------------------------------------- Dawid-Skene


def test_golden_dawid_skene():
    one = dawid_skene(four_items(), steps=1)
    assert one[0] == pytest.approx([16 / 19, 3 / 19, 0], abs=1e-6)
    assert one[2] == pytest.approx([1 / 7, 0, 6 / 7], abs=1e-6)
    np.testing.assert_allclose(dawid_skene(four_items()), np.eye(3)[[0, 1, 2, 2]], atol=1e-6)


def slow_dawid_skene(votes, steps):
    p, rows = shares(votes), listed(votes)
    items, workers, classes = range(len(votes.items)), range(len(votes.workers)), range(len(votes.classes))
    for _ in range(steps):
        prior = [sum(row[c] for row in p) / len(p) for c in classes]
        confusion = {}
        for w in workers:
            used = {y for _, v, y in rows if v == w}
            for c in classes:
                counts = {k: max(sum(p[i][c] for i, v, y in rows if v == w and y == k), 1e-10) for k in used}
                confusion.update({(w, k, c): n / sum(counts.values()) for k, n in counts.items()})
        p = []
        for item in items:
            given = [(w, y) for i, w, y in rows if i == item]
            p.append(normalised([prior[c] * math.prod(confusion[w, y, c] for w, y in given) for c in classes]))
    return p


def test_dawid_skene_against_plain_loops():
    votes = random_votes(items=20, workers=6)
    for steps in (1, 2, 7):
        found = dawid_skene(votes, steps, tolerance=-math.inf)
        np.testing.assert_allclose(found, slow_dawid_skene(votes, steps), atol=1e-9)
    assert found[:, 3].max() == 0  # nobody chose it, so its prior is zero


# --------------------------------------------------------------------------------------------------------------- GLAD


def glad_likelihood(votes, ability, log_ease):
    """log P of all votes and of both priors, and the posterior of each item, as GLAD's equations have them."""
    classes, total, p = len(votes.classes), 0.0, []
    for item in range(len(votes.items)):
        joint = []
        for c in range(classes):
            value = 1 / classes
            for i, w, y in listed(votes):
                if i == item:
                    right = 1 / (1 + math.exp(-ability[w] * math.exp(log_ease[item])))
                    value *= right if y == c else (1 - right) / (classes - 1)
            joint.append(value)
        total += math.log(sum(joint))
        p.append(normalised(joint))
    return total - sum((a - 1) ** 2 for a in ability) / 2 - sum((b - 1) ** 2 for b in log_ease) / 2, p


def test_glad_begins_with_the_equations_posterior():
    votes = random_votes(items=12, workers=5)
    _, p = glad_likelihood(votes, [1.0] * len(votes.workers), [1.0] * len(votes.items))
    np.testing.assert_allclose(glad(votes, steps=1), p, atol=1e-12)


def slow_glad(votes, steps=400, lr=0.05):
    """Gradient ascent on the likelihood itself, by autograd: another way to a maximum than EM."""
    rows = torch.tensor(listed(votes))
    item, worker, label = rows.T
    ability = torch.ones(len(votes.workers), dtype=torch.float64, requires_grad=True)
    log_ease = torch.ones(len(votes.items), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [ability, log_ease], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )
    classes = len(votes.classes)
    joint = torch.empty(0)

    def loss():
        nonlocal joint
        optimizer.zero_grad()
        s = ability[worker] * log_ease.exp()[item]
        right = torch.nn.functional.logsigmoid(s)[:, None]
        wrong = torch.nn.functional.logsigmoid(-s)[:, None] - math.log(classes - 1)
        each = torch.where(label[:, None] == torch.arange(classes), right, wrong)
        joint = torch.zeros(len(votes.items), classes, dtype=torch.float64).index_add(0, item, each)
        priors = ((ability - 1) ** 2).sum() + ((log_ease - 1) ** 2).sum()
        value = priors / 2 - joint.logsumexp(1).sum()
        value.backward()
        return value

    optimizer.step(loss)
    loss()
    return joint.softmax(1).detach().numpy()


@pytest.mark.parametrize("seed", [0, 1])
def test_glad_ends_at_the_maximum_of_its_likelihood(seed):
    votes = random_votes(seed, items=30, workers=8)
    found = glad(votes, steps=2000, tolerance=1e-13)
    np.testing.assert_allclose(found, slow_glad(votes), atol=1e-4)
    np.testing.assert_allclose(glad(votes), found, atol=2e-2)  # where it ends by default


def test_glad_is_sure_of_easy_items_and_of_able_workers():
    rows = [(f"{i:02d}", w, i % 2) for i in range(20) for w in range(4)]
    rows += [(f"{i:02d}", "contrary", 1 - i % 2) for i in range(20)]
    rows += [("hard", "contrary", 0), ("hard", 0, 1)]
    found = glad(Votes.of(*zip(*rows, strict=True)))
    assert found[:20].argmax(1).tolist() == [0, 1] * 10
    assert found[20] == pytest.approx([0, 1], abs=0.05)  # who is always wrong speaks for the other class


# --------------------------------------------------------------------------------------------------------------- MACE


def slow_mace(votes, steps):
    def digamma(x):
        return torch.tensor(x, dtype=torch.float64).digamma().item()

    rows, classes = listed(votes), range(len(votes.classes))
    workers = range(len(votes.workers))
    spams, knows = [0.5 for _ in workers], [0.5 for _ in workers]
    strategy = [[1 / len(classes)] * len(classes) for _ in workers]
    for step in range(steps + 1):
        p = []
        for item in range(len(votes.items)):
            given = [(w, y) for i, w, y in rows if i == item]
            joint = [math.prod(spams[w] * strategy[w][y] + knows[w] * (y == c) for w, y in given) for c in classes]
            p.append(normalised(joint))
        if step == steps:
            return p
        spammed, known = [[0.0] * len(classes) for _ in workers], [0.0 for _ in workers]
        for i, w, y in rows:
            for c in classes:  # given the true class, the vote was known or spam
                both = spams[w] * strategy[w][y] + knows[w] * (y == c)
                spammed[w][y] += p[i][c] * spams[w] * strategy[w][y] / both
                known[w] += p[i][c] * knows[w] * (y == c) / both
        for w in workers:
            total = math.exp(digamma(sum(spammed[w]) + known[w] + 1))
            spams[w] = math.exp(digamma(sum(spammed[w]) + 0.5)) / total
            knows[w] = math.exp(digamma(known[w] + 0.5)) / total
            total = math.exp(digamma(sum(spammed[w]) + 10 * len(classes)))
            strategy[w] = [math.exp(digamma(count + 10)) / total for count in spammed[w]]
    raise AssertionError


def test_mace_against_plain_loops():
    votes = random_votes(items=20, workers=6)
    for steps in (0, 1, 20):
        np.testing.assert_allclose(mace(votes, steps), slow_mace(votes, steps), atol=1e-10)


def test_mace_takes_fifty_steps():
    votes = random_votes(items=20, workers=6)
    assert np.array_equal(mace(votes), mace(votes, 50))
    assert not np.allclose(mace(votes), mace(votes, 49), atol=0, rtol=1e-9)


def test_mace_does_not_listen_to_spammers():
    rows = [(f"{i:02d}", w, i % 3) for i in range(30) for w in range(2)]
    rows += [(f"{i:02d}", spammer, 0) for i in range(30) for spammer in "xy"]
    votes = Votes.of(*zip(*rows, strict=True))
    assert majority(votes).argmax(1).tolist() == [0] * 30
    assert mace(votes).argmax(1).tolist() == [0, 1, 2] * 10


# ---------------------------------------------------------------------------------------------------------- crowd-kit


@pytest.fixture(scope="module")
def kit():
    """Random votes as a frame, sorted, with labels 0, 1, 2 that come in this order at first; and crowd-kit."""
    pandas = pytest.importorskip("pandas")
    aggregation = pytest.importorskip("crowdkit.aggregation")
    rows = [(task, worker, int(label[-1])) for task, worker, label in random_rows(3, items=60, workers=10)]
    rows = sorted(row for row in rows if row[1] != "a worker with one vote")
    rows = [(f"first {label}", "worker 00", label) for label in range(3)] + rows
    return aggregation, pandas.DataFrame(rows, columns=["task", "worker", "label"]), Votes.of(*zip(*rows, strict=True))


def theirs(model, frame):
    found = model.fit_predict_proba(frame)
    return found.reindex(index=sorted(found.index), columns=range(3)).to_numpy()


@pytest.mark.slow
def test_dawid_skene_against_crowd_kit(kit):
    """After as many steps; its bound, by which it ends, counts the prior once for each vote."""
    aggregation, frame, votes = kit
    for steps in (1, 5, 30):
        model = aggregation.DawidSkene(n_iter=steps, tol=-math.inf)
        np.testing.assert_allclose(dawid_skene(votes, steps, -math.inf), theirs(model, frame), atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_glad_against_crowd_kit(kit):
    """Its test of convergence compares a sum with a mean, so it would end at once: it is given steps instead."""
    aggregation, frame, votes = kit
    frame, votes = frame[frame["task"] < "item 12"], Votes.of(*(frame[frame["task"] < "item 12"][c] for c in frame))
    found = theirs(aggregation.GLAD(n_iter=60, tol=-math.inf, m_step_tol=1e-4), frame)
    np.testing.assert_allclose(glad(votes, steps=2000, tolerance=1e-13), found, atol=5e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mace_against_crowd_kit(kit):
    """Its start is random: here it gets ours. Workers must come in sorted order, and labels, or it mixes them up."""
    aggregation, frame, votes = kit

    class Mace(aggregation.MACE):
        def _initialize(self, n_workers, n_labels):
            super()._initialize(n_workers, n_labels)
            self.spamming_ = np.full((n_workers, 2), 0.5)
            self.thetas_ = np.full((n_workers, n_labels), 1 / n_labels)

    frame = frame.sort_values("worker", kind="stable")
    np.testing.assert_allclose(mace(votes), theirs(Mace(n_restarts=1), frame), atol=1e-6)
