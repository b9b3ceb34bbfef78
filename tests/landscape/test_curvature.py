"""Hessians by hand, against dense ones of torch, and where they are taken through attention and unequal batches."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn

from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.landscape import Objective, hessian_top_eigenvalues, hessian_trace
from lightning_soup.modules import CLIPClassifier, ImageClassifier
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.clip import ROWS, TINY_CLIP
from tests.modules.test_classifier import TINY


def quadratic(a, keep_graph=True):
    theta = torch.zeros(len(a), dtype=torch.float64, requires_grad=True)
    return Objective({"theta": theta}, [(1.0, lambda: theta @ a @ theta / 2)], keep_graph)


G1 = torch.tensor([[4.0, 1, 0], [1, 3, 1], [0, 1, 2]], dtype=torch.float64)


@pytest.mark.parametrize("keep_graph", [True, False])
def test_a_matrix_by_hand(keep_graph):
    found = hessian_top_eigenvalues(quadratic(G1, keep_graph), 3, tolerance=1e-9)
    assert found.values == pytest.approx((3 + math.sqrt(3), 3, 3 - math.sqrt(3)), abs=1e-9)
    assert found.steps == 3
    assert found.converged
    trace = hessian_trace(quadratic(G1, keep_graph), max_probes=400, tolerance=0.0)
    assert trace.value == pytest.approx(9, abs=4 * math.sqrt(8 / 400))
    assert trace.error == pytest.approx(math.sqrt(8 / 400), rel=0.2)
    values = {round(float(z @ G1 @ z)) for z in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)}
    assert values == {5, 9, 13}


def test_the_largest_is_not_the_largest_in_magnitude():
    objective = quadratic(torch.diag(torch.tensor([-5.0, 1, 2], dtype=torch.float64)))
    assert hessian_top_eigenvalues(objective, tolerance=1e-9).values == pytest.approx((2,), abs=1e-9)
    trace = hessian_trace(objective, min_probes=1, max_probes=1)
    assert trace.value == pytest.approx(-2, abs=1e-12)  # a diagonal has no variance
    assert hessian_trace(objective, min_probes=3).probes == 3


class Softmax(LightningModule):
    """Softmax regression at W = 0, without bias."""

    def __init__(self, features, classes):
        super().__init__()
        self.layer = nn.Linear(features, classes, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.layer.weight)

    def validation_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss


@pytest.mark.parametrize("keep_graph", [True, False])
def test_softmax_regression_and_batches_that_are_not_alike(keep_graph):
    one = [(torch.tensor([[1.0, 2.0]]).double(), torch.tensor([0]))]
    objective = Objective.of_module(Softmax(2, 3), one, keep_graph=keep_graph)
    assert hessian_top_eigenvalues(objective, tolerance=1e-9).values[0] == pytest.approx(5 / 3, abs=1e-9)
    assert hessian_trace(objective, max_probes=2000, tolerance=0.0).value == pytest.approx(10 / 3, abs=0.1)
    x = torch.tensor([[1.0, 0], [0, 2], [2, 0]]).double()
    batches = [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([0]))]
    objective = Objective.of_module(Softmax(2, 2), batches, keep_graph=keep_graph)
    # Batches that count alike, whatever their size, would give 1.125 and 1.625.
    assert hessian_top_eigenvalues(objective, tolerance=1e-9).values[0] == pytest.approx(5 / 6, abs=1e-9)
    dense = torch.stack([objective.product(row) for row in torch.eye(4, dtype=torch.float64)])
    assert float(dense.trace()) == pytest.approx(3 / 2, abs=1e-9)
    assert objective.value() == pytest.approx(math.log(2))


@pytest.mark.parametrize("keep_graph", [True, False])
def test_against_a_dense_hessian(keep_graph):
    seed_everything(0, verbose=False)
    module = TinyClassifier().double()
    data = TinyData()
    batches = [[part.double() if part.is_floating_point() else part for part in b] for b in data.train_dataloader()][:3]
    objective = Objective.of_module(module, batches, keep_graph=keep_graph)
    names = list(objective.parameters)
    shapes = [objective.parameters[name].shape for name in names]

    def loss(flat):
        pieces = flat.split([math.prod(shape) for shape in shapes])
        given = {
            name.removeprefix("net."): piece.view(shape)
            for name, piece, shape in zip(names, pieces, shapes, strict=True)
        }
        total = sum(len(b[0]) for b in batches)
        outputs = [torch.func.functional_call(module.net, given, (b[0],)) for b in batches]
        losses = [nn.functional.cross_entropy(o, b[1]) * len(b[0]) for o, b in zip(outputs, batches, strict=True)]
        return sum(losses) / total

    flat = torch.cat([objective.parameters[name].detach().flatten() for name in names])
    dense = torch.func.hessian(loss)(flat)
    vector = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(objective.product(vector), dense @ vector)
    torch.testing.assert_close(objective.gradient(), torch.func.grad(loss)(flat))
    expected = torch.linalg.eigvalsh(dense).flip(0)[:4]
    found = hessian_top_eigenvalues(objective, 4, max_steps=120, tolerance=1e-8)
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.float64), expected, rtol=1e-6, atol=1e-8)
    trace = hessian_trace(objective, max_probes=300, tolerance=0.0)
    assert abs(trace.value - float(dense.trace())) < 4 * trace.error
    errors = [abs(v - float(e)) for v, e in zip(found.values, expected, strict=True)]
    assert all(error <= bound + 1e-9 for error, bound in zip(errors, found.errors, strict=True))


@pytest.mark.parametrize("kind", ["timm", "clip"])
def test_through_attention(kind):
    """Fused attention has no second derivative; the Hessian is symmetric all the same."""
    torch.manual_seed(0)
    if kind == "timm":
        module = ImageClassifier(**TINY)
        batch = (torch.rand(6, 1, 8, 8), torch.arange(6) % 3)
    else:
        module = CLIPClassifier(model_config=TINY_CLIP, classnames=ROWS, templates=["a {}"], train="image")
        batch = (torch.rand(6, 3, 8, 8), torch.arange(6) % 3)
    module = module.double()
    objective = Objective.of_module(module, [(batch[0].double(), batch[1])])
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(objective.size, dtype=torch.float64, generator=generator) for _ in range(2))
    assert float(u @ objective.product(v)) == pytest.approx(
        float(v @ objective.product(u)), rel=1e-5
    )  # their loss is in float32
    assert hessian_top_eigenvalues(objective, tolerance=1e-3).converged
    assert module.training
    assert all(value.grad is None for value in module.parameters())


def test_a_compiled_module_and_dropout(recwarn):
    seed_everything(0, verbose=False)
    module = ImageClassifier(**TINY, drop_rate=0.5)
    batch = (torch.rand(6, 1, 8, 8), torch.arange(6) % 3)
    plain = Objective.of_module(module, [batch])
    vector = torch.ones(plain.size)
    expected = plain.product(vector)
    compiled = Objective.of_module(torch.compile(module, backend="eager"), [batch], keep_graph=False)
    torch.testing.assert_close(compiled.product(vector), expected)
    torch.testing.assert_close(compiled.product(vector), compiled.product(vector))


def test_the_work_is_counted():
    objective = quadratic(torch.diag(torch.arange(1.0, 200, dtype=torch.float64)))
    found = hessian_top_eigenvalues(objective, tolerance=1e-4)
    assert found.steps == objective.products < 60
    assert found.values[0] == pytest.approx(199, rel=1e-4)


def test_without_room_for_a_basis(monkeypatch):
    monkeypatch.setattr("lightning_soup.landscape.curvature._BASIS_BYTES", 0)
    objective = quadratic(torch.diag(torch.arange(1.0, 400, dtype=torch.float64)))
    assert hessian_top_eigenvalues(objective, tolerance=1e-6, max_steps=200).values[0] == pytest.approx(399, rel=1e-6)


def test_bad_input():
    with pytest.raises(UnsupportedSetup, match="got 0 parameters"):
        Objective({}, [(1.0, lambda: torch.tensor(0.0))])
    with pytest.raises(UnsupportedSetup, match=r"got a vector \[2\]; expected \[3\]"):
        quadratic(G1).product(torch.ones(2))
    with pytest.raises(UnsupportedSetup, match="k=0"):
        hessian_top_eigenvalues(quadratic(G1), 0)
    with pytest.raises(UnsupportedSetup, match="min_probes=9"):
        hessian_trace(quadratic(G1), min_probes=9, max_probes=3)
    with pytest.raises(NonFiniteWeights, match="overflow at these weights"):
        hessian_top_eigenvalues(quadratic(G1 * math.inf))

    class NoLoss(Softmax):
        def validation_step(self, batch, batch_idx):
            return None

    with pytest.raises(UnsupportedSetup, match=r"NoLoss\.validation_step returned no loss"):
        Objective.of_module(NoLoss(2, 2), [(torch.ones(1, 2).double(), torch.tensor([0]))]).value()


def test_linear_losses_have_no_curvature():
    theta = torch.zeros(3, requires_grad=True)
    objective = Objective({"theta": theta}, [(1.0, lambda: (theta * torch.arange(3.0)).sum())])
    assert hessian_top_eigenvalues(objective).values == (0.0,)
    assert hessian_trace(objective).value == 0
