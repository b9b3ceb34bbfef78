"""Hessian products, eigenvalues and traces against those of curvlinops, which are written by others."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from scipy.sparse.linalg import eigsh
from torch import nn

from lightning_soup.landscape import Objective, hessian_top_eigenvalues, hessian_trace

curvlinops = pytest.importorskip("curvlinops", reason="pip install 'lightning_soup[dev]'")


class Network(LightningModule):
    """Any network, by its mean cross entropy."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def validation_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


def convolutional():
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Conv2d(3, 4, 2, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture(params=["equal", "unequal"])
def batches(request):
    sizes = [8, 8, 8] if request.param == "equal" else [13, 8, 2]
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.fixture(params=[perceptron, convolutional])
def both(request, batches):
    """Our objective and their operator."""
    torch.manual_seed(0)
    net = request.param().double().eval()
    theirs = copy.deepcopy(net)
    operator = curvlinops.HessianLinearOperator(theirs, nn.CrossEntropyLoss(), list(theirs.parameters()), batches)
    return Objective.of_module(Network(net), batches), operator


def test_products(both):
    objective, operator = both
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        vector = torch.randn(objective.size, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(objective.product(vector), operator @ vector, rtol=1e-9, atol=1e-12)


def test_largest_eigenvalue(both):
    objective, operator = both
    found = hessian_top_eigenvalues(objective, tolerance=1e-8, max_steps=200)
    (wanted,) = eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False)
    assert found.converged
    assert found.values[0] == pytest.approx(wanted, rel=1e-6)


def test_trace(both):
    objective, operator = both
    identity = torch.eye(objective.size, dtype=torch.float64)
    exact = float((operator @ identity).trace())
    found = hessian_trace(objective, max_probes=100, tolerance=0.0)
    assert abs(found.value - exact) < 4 * found.error
    torch.manual_seed(3)
    theirs = float(curvlinops.hutchinson_trace(operator, num_matvecs=100))
    assert abs(found.value - theirs) < 6 * found.error
