"""Paths between networks: numbers by hand, a ring, double wells, and networks."""

import pytest
import torch

from lightning_soup.errors import IncompatibleIngredients, UnsupportedSetup
from lightning_soup.evaluation import Evaluator, ModuleEvaluator
from lightning_soup.landscape import barrier, bezier_connectivity, loss_barrier, mode_connectivity
from lightning_soup.weights import open_checkpoint
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.ingredients import tiny_run


def quarters(count=5):
    return [i / (count - 1) for i in range(count)]


@pytest.mark.parametrize(
    ("q", "mc"), [([10, 12, 18, 14, 8], -9), ([30, 20, 12, 22, 34], 20), ([5, 5.2, 4.9, 5.1, 5], -0.2)]
)
def test_mode_connectivity_by_hand(q, mc):
    assert mode_connectivity(quarters(), q)[0] == pytest.approx(mc)


class Surface(Evaluator):
    """A loss on the plane, or the line."""

    metric, mode = "loss", "min"

    def __init__(self, loss):
        self.loss, self.losses = loss, []

    def score(self, weights):
        return -float(self.loss(weights["w"]))

    def batches(self, epoch, batch_size):
        return range(200)

    def loss_and_grad(self, weights, batch):
        w = weights["w"].detach().clone().requires_grad_()
        loss = self.loss(w)
        loss.backward()
        return loss.item(), {"w": w.grad}


def point(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


def wells(w):
    return ((w**2 - 1) ** 2).sum()


def test_double_wells():
    found = loss_barrier(point(-1.0), point(1.0), Surface(wells), points=5)
    assert found.q == pytest.approx((0, 0.5625, 1, 0.5625, 0))
    assert found.connectivity == pytest.approx(-1)
    assert found.barrier == pytest.approx(1)
    unequal = loss_barrier(point(-1.0), point(1.2), Surface(wells), points=5)
    assert unequal.connectivity == pytest.approx(-0.8833, abs=1e-4)
    fine = loss_barrier(point(-1.0), point(1.2), Surface(wells), points=1001)
    top = max(range(1001), key=lambda i: fine.q[i])
    assert fine.t[top] == pytest.approx(0.4545, abs=1e-3)
    assert fine.q[top] == pytest.approx(1, abs=1e-4)


def test_a_curve_around_a_ring():
    """Ends (±1, 0): the best c is (0, ±3/√2), with a mean loss of 2/105."""

    def ring(w):
        return ((w**2).sum() - 1) ** 2

    a, b, surface = point(-1.0, 0.0), point(1.0, 0.0), Surface(ring)
    straight = loss_barrier(a, b, surface, points=5)
    assert straight.barrier == pytest.approx(1)
    found = bezier_connectivity(a, b, surface, epochs=20, lr=0.02, weight_decay=0.0, seed=1)
    x, y = found.bend["w"].tolist()
    assert abs(x) < 0.1
    assert abs(y) == pytest.approx(3 / 2**0.5, abs=0.1)
    assert found.q == pytest.approx((0, 0.013733, 0.015625, 0.013733, 0), abs=0.02)
    exact = [((1 - t) ** 2 * -1 + t**2, 2 * t * (1 - t) * 3 / 2**0.5) for t in torch.linspace(0, 1, 2001).tolist()]
    mean = sum((x**2 + y**2 - 1) ** 2 for x, y in exact) / len(exact)
    assert mean == pytest.approx(2 / 105, abs=1e-4)


def test_the_start_of_a_curve_is_measured_where_it_is_not_trained():
    found = bezier_connectivity(point(-1.0, 0.0), point(1.0, 0.0), Surface(wells), epochs=0)
    assert found.q[0] == found.q[-1] == 1.0
    assert abs(float(found.bend["w"].norm())) < 0.1


def test_networks():
    module, files = TinyClassifier(), tiny_run()[1]
    judge = ModuleEvaluator(module, TinyData(), "val_loss")
    line = loss_barrier(files[0], files[1], judge, points=5)
    assert line.metric == "val_loss"
    assert line.q[0] == pytest.approx(-judge.score(open_checkpoint(files[0])))
    curve = bezier_connectivity(files[0], files[1], judge, epochs=3, batch_size=8)
    assert curve.q[0] == pytest.approx(line.q[0])
    assert curve.q[-1] == pytest.approx(line.q[-1])
    assert max(curve.q) < max(line.q) + 0.1
    accuracy = loss_barrier(files[0], files[1], ModuleEvaluator(module, TinyData(), "val_acc"), points=3)
    assert accuracy.metric == "1 − val_acc"
    assert all(0 <= value <= 1 for value in accuracy.q)


def test_bad_input():
    with pytest.raises(UnsupportedSetup, match="expected 3 or more"):
        loss_barrier(point(0.0), point(1.0), Surface(wells), points=2)
    with pytest.raises(IncompatibleIngredients):
        loss_barrier(point(0.0), point(1.0, 2.0), Surface(wells))
    with pytest.raises(UnsupportedSetup, match="a rate above 0"):
        bezier_connectivity(point(0.0), point(1.0), Surface(wells), lr=0.0)
    for t, q in (([0.0], [1.0]), ([0, 0.5], [1, 2]), ([0, 1], [1, 2, 3])):
        with pytest.raises(UnsupportedSetup, match="from t = 0 to t = 1"):
            barrier(t, q)
