import pytest
import torch
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.experts import average_experts_, check_share_rate, expert_spread, mean_expert

GOLDEN = [[1, 2], [3, 6], [5, 4], [7, 0]]


class Weights(nn.Module):
    def __init__(self, values, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=dtype))


def experts(values=GOLDEN, dtype=torch.float64):
    return [Weights(row, dtype) for row in values]


def values(found):
    return torch.stack([expert.w.detach() for expert in found]).tolist()


def test_golden_1_all_move_at_once_and_the_mean_stays():
    found = experts()
    average_experts_(found, 0.3)
    torch.testing.assert_close(values(found), [[2.2, 2.4], [3.4, 4.8], [4.6, 3.6], [5.8, 1.2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(mean_expert(found)["w"], torch.tensor([4.0, 3.0], dtype=torch.float64))


def test_golden_2_the_highest_rate_gives_the_mean_and_no_rate_is_higher():
    found = experts()
    average_experts_(found, 0.75)
    assert values(found) == [[4, 3]] * 4
    two = experts([[1.0], [5.0]])
    average_experts_(two, 0.5)
    assert values(two) == [[3], [3]]
    with pytest.raises(UnsupportedSetup, match=r"share_rate=1: expected 0 ≤ β ≤ \(N − 1\)/N = 0.5 for 2 experts"):
        average_experts_(two, 1)


def test_golden_3_three_steps():
    found = experts()
    for _ in range(3):
        average_experts_(found, 0.3)
    torch.testing.assert_close(values(found)[0], [3.352, 2.784], rtol=0, atol=1e-12)
    torch.testing.assert_close(values(found)[3], [4.648, 2.352], rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [-0.1, 0.76, float("nan")])
def test_rates_out_of_bounds(beta):
    with pytest.raises(UnsupportedSetup, match="share_rate="):
        check_share_rate(beta, 4)


@pytest.mark.parametrize("count", [1, True, 4.0, 4.5, "4", None, float("nan")])
def test_the_number_of_experts_is_a_whole_one(count):
    with pytest.raises(UnsupportedSetup, match=r"num_experts=.*: expected a whole number, 2 or more"):
        check_share_rate(0.1, count)


@pytest.mark.parametrize("beta", [True, "0.3", None, torch.tensor(0.3), 0.3j])
def test_rates_are_numbers(beta):
    with pytest.raises(UnsupportedSetup, match=r"share_rate=.*: expected a number, such as 0\.3"):
        check_share_rate(beta, 4)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_large_and_strided_tensors_equal_the_formula(count, dtype):
    torch.manual_seed(0)
    beta = 0.2
    found = [nn.Linear(300, 400).to(dtype) for _ in range(count)]
    for expert in found[:1]:
        expert.weight.data = expert.weight.data.t().contiguous().t()  # of another layout in memory
    before = {
        name: [dict(e.named_parameters())[name].detach().double().clone() for e in found] for name in ("weight", "bias")
    }
    identities = [id(parameter) for expert in found for parameter in expert.parameters()]
    average_experts_(found, beta)
    tolerance = {torch.float32: 1e-7, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype]
    for name, rows in before.items():
        for number, expert in enumerate(found):
            others = sum(row for other, row in enumerate(rows) if other != number)
            expected = (1 - beta) * rows[number] + beta / (count - 1) * others
            got = dict(expert.named_parameters())[name].double()
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * 0.06)
    assert identities == [id(parameter) for expert in found for parameter in expert.parameters()]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_equal_experts_stay_equal_and_their_mean_is_exact(count):
    torch.manual_seed(0)
    one = nn.Linear(40, 50)
    found = [nn.Linear(40, 50) for _ in range(count)]
    for expert in found:
        expert.load_state_dict(one.state_dict())
    assert torch.equal(mean_expert(found)["weight"], one.weight)
    average_experts_(found, 0.3)
    for expert in found:
        assert torch.equal(expert.weight, found[0].weight)
        torch.testing.assert_close(expert.weight, one.weight, rtol=2e-7, atol=0)
    assert torch.equal(mean_expert(found)["weight"], found[0].weight)
    assert expert_spread(found) == 0


def test_spread_by_hand():
    found = [nn.Linear(1, 2, bias=True) for _ in range(2)]
    with torch.no_grad():
        for expert, value in zip(found, (1.0, 3.0), strict=True):
            expert.weight.fill_(value)
            expert.bias.fill_(100 * value)  # no matrix
    assert expert_spread(found) == pytest.approx((4 * 1 / (2 * 1 + 2 * 9)) ** 0.5)


def test_gradients_of_the_mean_reach_all_experts():
    found = experts()
    mean_expert(found)["w"].sum().backward()
    assert all(expert.w.grad.tolist() == [0.25, 0.25] for expert in found)


def test_experts_that_differ_are_named():
    with pytest.raises(UnsupportedSetup, match=r"not alike: weight is \(2, 3\) in one and \(2, 4\)"):
        average_experts_([nn.Linear(3, 2), nn.Linear(4, 2)], 0.1)
    with pytest.raises(UnsupportedSetup, match=r"bias is .* missing"):
        average_experts_([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)], 0.1)
