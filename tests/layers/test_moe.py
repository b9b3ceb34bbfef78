import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers import moe as moe_module
from lightning_soup.layers.experts import average_experts_
from lightning_soup.layers.moe import RandomUniformMoE


class Times(nn.Module):
    """Multiplies by a number, and notes how many tokens it was given."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(float(factor), dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.shape[-2])
        return self.w * x


def mlp(width=6, hidden=10, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).to(dtype)


def different_experts(count=3, **options):
    return RandomUniformMoE([mlp(seed=i) for i in range(count)], **options)


def by_token(moe, x, order):
    """Each token through its expert, one at a time."""
    tokens = x.reshape(-1, x.shape[-1])
    expert_of = {}
    for number, part in enumerate(order.tensor_split(len(moe.experts))):
        expert_of |= dict.fromkeys(part.tolist(), number)
    rows = [moe.experts[expert_of[i]](tokens[i : i + 1]) for i in range(len(tokens))]
    return torch.cat(rows).reshape(x.shape)


@pytest.fixture
def drawn(monkeypatch):
    """Decides the permutation."""

    def fix(order):
        monkeypatch.setattr(moe_module.torch, "randperm", lambda count, device=None: torch.tensor(order))

    return fix


def test_golden_4_tokens_come_back_to_their_places(drawn):
    drawn([4, 1, 5, 0, 3, 2])
    moe = RandomUniformMoE([Times(1), Times(2), Times(3)])
    tokens = torch.arange(6.0, dtype=torch.float64).view(1, 6, 1)
    assert moe(tokens).flatten().tolist() == [0, 1, 6, 9, 4, 10]


@pytest.mark.parametrize(
    ("tokens", "sizes"), [(10, [3, 3, 2, 2]), (394, [99, 99, 98, 98]), (3, [1, 1, 1, 0]), (8, [2, 2, 2, 2])]
)
def test_golden_4_parts(tokens, sizes):
    moe = RandomUniformMoE([Times() for _ in range(4)])
    moe(torch.ones(1, tokens, 2, dtype=torch.float64))
    assert [expert.seen for expert in moe.experts] == [[size] for size in sizes]


def test_golden_6_the_mean_network_is_not_the_mean_of_outputs():
    def network(first, second):
        layers = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
        with torch.no_grad():
            layers[0].weight.copy_(torch.tensor(first).view(2, 1))
            layers[2].weight.copy_(torch.tensor(second).view(1, 2))
        return layers

    a, b = network([1.0, 0.0], [1.0, 1.0]), network([-1.0, 2.0], [3.0, 1.0])
    x = torch.full((1, 1, 1), 2.0, dtype=torch.float64)
    assert (a(x).item(), b(x).item()) == (2, 4)
    moe = RandomUniformMoE([a, b])
    assert moe.eval()(x).item() == 2
    dense = moe.to_dense()
    assert dense[0].weight.flatten().tolist() == [0, 1]
    assert dense[2].weight.flatten().tolist() == [2, 1]
    assert dense(x).item() == 2


def test_golden_7_under_sgd_the_mean_moves_at_a_fraction_of_the_dense_rate(drawn):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).view(1, 4, 1)

    def stepped(order):
        drawn(order)
        moe = RandomUniformMoE([Times(1), Times(1)])
        moe(x).mean().backward()
        torch.optim.SGD(moe.parameters(), 0.4).step()
        return moe

    assert [expert.w.item() for expert in stepped([0, 3, 1, 2]).experts] == [0.5, 0.5]
    moe = stepped([0, 1, 2, 3])
    torch.testing.assert_close([expert.w.item() for expert in moe.experts], [0.7, 0.3])
    average_experts_(moe.experts, 0.25)
    torch.testing.assert_close([expert.w.item() for expert in moe.experts], [0.6, 0.4])


@pytest.mark.parametrize("shape", [(2, 7, 6), (2, 3, 4, 6), (1, 2, 6), (5, 6)])
def test_values_and_gradients_equal_those_of_each_token_by_itself(shape, drawn):
    torch.manual_seed(1)
    order = torch.randperm(torch.Size(shape[:-1]).numel())
    drawn(order.tolist())
    moe, x = different_experts(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    reference = copy.deepcopy(moe)
    x_reference = x.detach().clone().requires_grad_()
    weight = torch.randn(shape, dtype=torch.float64)
    found, expected = moe(x), by_token(reference, x_reference, order)
    torch.testing.assert_close(found, expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, x_reference.grad)
    for ours, theirs in zip(moe.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, torch.zeros_like(ours) if theirs.grad is None else theirs.grad)


def test_second_derivatives(drawn):
    drawn([3, 0, 2, 1])
    moe = different_experts(2)
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moe, (x,))
    assert torch.autograd.gradgradcheck(moe, (x,))


def test_positions_are_shared_out_alike_for_all_images(drawn):
    order = [2, 0, 1, 4, 3]
    drawn(order)
    moe = different_experts(2, scope="positions")
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    found = moe(x)
    for position in range(5):
        expert = moe.experts[0 if position in order[:3] else 1]
        torch.testing.assert_close(found[:, position], expert(x[:, position]))


def test_experts_without_tokens_get_gradients_of_zero():
    moe = different_experts(4)
    moe(torch.randn(1, 2, 6, dtype=torch.float64)).sum().backward()
    grads = [expert[0].weight.grad for expert in moe.experts]
    assert all(grad is not None for grad in grads)
    assert [bool(grad.any()) for grad in grads] == [True, True, False, False]


def test_every_pass_and_every_layer_draws_anew_from_the_global_generator():
    moe = different_experts()
    x = torch.randn(1, 30, 6, dtype=torch.float64)
    torch.manual_seed(5)
    first, second = moe(x), moe(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(moe(x), first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_permutation_again(reentrant):
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for wrapped in (False, True):
        moe = different_experts()
        torch.manual_seed(7)
        out = checkpoint(moe, x, use_reentrant=reentrant) if wrapped else moe(x)
        out.square().sum().backward()
        grads.append([parameter.grad for parameter in moe.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_evaluation_is_deterministic_and_follows_the_weights():
    moe = different_experts().eval()
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    state = torch.random.get_rng_state()
    first = moe(x)
    assert torch.equal(moe(x), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    moe.experts[1][0].weight.data = moe.experts[1][0].weight.data * 2  # as an average is put into a module
    changed = moe(x)
    assert not torch.equal(changed, first)
    torch.testing.assert_close(moe.to_dense()(x), changed)


def test_gradients_in_evaluation_reach_all_experts():
    moe = different_experts().eval()
    moe(torch.randn(1, 9, 6, dtype=torch.float64)).sum().backward()
    first, *others = (expert[2].weight.grad for expert in moe.experts)
    assert first.any()
    for grad in others:
        torch.testing.assert_close(grad, first)


def test_copies_compute_what_the_network_did():
    dense = mlp(dtype=torch.float32)
    moe = RandomUniformMoE.from_dense(copy.deepcopy(dense), 5)
    x = torch.randn(2, 11, 6)
    torch.testing.assert_close(moe(x), dense(x))
    assert torch.equal(moe.eval()(x), dense(x))
    assert len({expert[0].weight.data_ptr() for expert in moe.experts}) == 5


def test_independent_experts_are_drawn_like_the_given_one():
    dense = timm.layers.Mlp(64, 256)
    nn.init.trunc_normal_(dense.fc1.weight, std=0.02)
    moe = RandomUniformMoE.from_dense(dense, 4, init="independent")
    assert moe.experts[0] is dense
    for expert in moe.experts[1:]:
        assert not torch.equal(expert.fc1.weight, dense.fc1.weight)
        assert expert.fc1.weight.std().item() == pytest.approx(dense.fc1.weight.std().item(), rel=0.05)
        assert torch.equal(expert.fc1.bias, dense.fc1.bias)


def test_compiled_it_computes_the_same():
    moe = different_experts()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.manual_seed(3)
    expected = moe(x)
    compiled = torch.compile(moe, backend="eager")
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.compile(moe.eval(), backend="eager")(x), moe(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomUniformMoE([mlp()]), "num_experts=1"),
        (lambda: RandomUniformMoE.from_dense(mlp(), 1), "num_experts=1"),
        (lambda: RandomUniformMoE([mlp(), mlp()], scope="images"), "scope='images'"),
        (lambda: RandomUniformMoE.from_dense(mlp(), 2, init="zeros"), "init='zeros'"),
    ],
)
def test_what_cannot_be(make, message):
    with pytest.raises(UnsupportedSetup, match=message):
        make()


class Gated(nn.Module):
    """Its block may give it more than tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x, scale=1.0, gate=None):
        return scale * self.b(self.a(x)) * (1 if gate is None else gate)


def test_plain_values_beside_the_tokens_are_given_to_all_experts():
    moe = RandomUniformMoE.from_dense(Gated(), 3)
    x = torch.randn(2, 7, 6)
    for mode in (True, False):
        moe.train(mode)
        torch.testing.assert_close(moe(x, 2.0), 2 * moe.experts[0](x))
        torch.testing.assert_close(moe(x, scale=3), 3 * moe.experts[0](x))
        with pytest.raises(UnsupportedSetup, match=r"Gated\) another tensor beside the tokens \(argument gate\)"):
            moe(x, 2.0, gate=torch.ones(2, 7, 1))
        with pytest.raises(UnsupportedSetup, match=r"argument 3\)"):
            moe(x, 2.0, torch.ones(2, 7, 1))


@pytest.mark.parametrize("count", [0, 1, True, 2.0, "4", None, float("nan")])
def test_the_number_of_experts_is_a_whole_one(count):
    with pytest.raises(UnsupportedSetup, match=r"num_experts=.*: expected a whole number, 2 or more"):
        RandomUniformMoE.from_dense(mlp(), count)
