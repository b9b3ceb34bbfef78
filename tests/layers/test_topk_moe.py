import pytest
import torch
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers import TopKMoE


def ffn(width=6):
    return nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width)).double()


def moe(**options):
    torch.manual_seed(0)
    return TopKMoE(ffn(), 6, **options).double()


@pytest.mark.parametrize(("k", "shared"), [(1, 0), (2, 0), (3, 2)])
def test_each_token_is_the_weighted_sum_of_its_experts(k, shared):
    layer = moe(num_experts=3, k=k, num_shared=shared)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    found = layer(x)
    for image in range(2):
        for place in range(5):
            token = x[image, place]
            p = layer.router(token).float().softmax(-1)
            gates, chosen = p.topk(k)
            gates = gates / gates.sum() if k > 1 else gates
            expected = sum(g.double() * layer.experts[int(i)](token) for g, i in zip(gates, chosen, strict=True))
            expected = expected + sum(expert(token) for expert in layer.shared)
            torch.testing.assert_close(found[image, place], expected)


def test_the_balance_loss_is_one_where_tokens_are_spread_evenly_and_highest_where_one_has_all():
    layer = moe(num_experts=2)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 0] = 9.0, -9.0
    x = torch.zeros(1, 4, 6, dtype=torch.float64)
    x[0, :, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    layer(x)
    assert layer.balance_loss.item() == pytest.approx(1.0, abs=1e-6)
    layer(x.abs())
    assert layer.balance_loss.item() == pytest.approx(2.0, abs=1e-6)
    layer.balance_loss.backward()
    assert layer.router.weight.grad is not None


def test_experts_are_drawn_apart_and_those_without_tokens_have_gradients_of_zero():
    layer = moe(num_experts=4)
    weights = [expert[0].weight for expert in layer.experts]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    layer(torch.randn(1, 1, 6, dtype=torch.float64)).sum().backward()
    assert sorted(bool(weight.grad.any()) for weight in weights) == [False, False, False, True]


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1},
        {"k": 0},
        {"k": 5},
        {"num_shared": -1},
        {"num_experts": 2.5},
        {"k": True},
        {"num_shared": "1"},
    ],
)
def test_what_cannot_be(options):
    with pytest.raises(UnsupportedSetup, match=next(iter(options))):
        moe(**options)
