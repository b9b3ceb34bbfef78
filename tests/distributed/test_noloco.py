"""The outer steps of NoLoCo and DiLoCo: golden numbers, the bound on γ, groups."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_soup.distributed.noloco import (
    DiLoCoStep,
    NoLoCoStep,
    largest_gamma,
    papers_interval,
    random_groups,
)
from lightning_soup.distributed.outer_step import Layout, OuterStep, Replica
from lightning_soup.distributed.simulation import SimulatedReplicas
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup

ONE = Layout(("w",), (torch.Size([1]),), 1, torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


class Numbers:
    """Replicas of one weight each."""

    def __init__(self, step: OuterStep, phi: list[float], delta: list[float] | None = None) -> None:
        self.replicas = [Replica(step, ONE, number(value)) for value in phi]
        for replica, value in zip(self.replicas, delta or [], strict=False):
            replica.state["delta"] = number(value)

    def take(self, theta: list[float], groups: list[tuple[int, ...]]) -> list[float]:
        messages = [r.message(number(t)) for r, t in zip(self.replicas, theta, strict=True)]
        found = {}
        for group in groups:
            for i in group:
                received = {j: messages[j] for j in group}
                found[i] = self.replicas[i].average(number(theta[i]), received, i).item()
        return [found[i] for i in range(len(theta))]

    @property
    def delta(self) -> list[float]:
        return [replica.state["delta"].item() for replica in self.replicas]


def test_a_first_step_ascends_along_what_was_learnt() -> None:
    numbers = Numbers(NoLoCoStep(), [1, 1])
    assert numbers.take([1.4, 0.8], [(0, 1)]) == pytest.approx([1.07, 1.07], abs=1e-12)  # not 0.93, as printed
    assert numbers.delta == pytest.approx([0.07, 0.07], abs=1e-12)


@pytest.mark.parametrize(
    ("gamma", "delta", "phi"), [(None, [0.505, -0.345], [1.505, 1.655]), (1.0, [0.655, -0.495], [1.655, 1.505])]
)
def test_gamma_pulls_towards_the_slow_weights(gamma: float | None, delta: list[float], phi: list[float]) -> None:
    numbers = Numbers(NoLoCoStep(gamma=gamma), [1, 2], [0.1, -0.2])
    assert numbers.take([1.5, 1.8], [(0, 1)]) == pytest.approx(phi, abs=1e-12)
    assert numbers.delta == pytest.approx(delta, abs=1e-12)


def test_four_replicas_over_three_rounds() -> None:
    numbers = Numbers(NoLoCoStep(), [0, 0, 0, 0])
    phi = numbers.take([1, 0.5, -0.5, 0.2], [(0, 1), (2, 3)])
    assert phi == pytest.approx([0.525, 0.525, -0.105, -0.105], abs=1e-12)
    phi = numbers.take([p + d for p, d in zip(phi, (0.1, -0.2, 0.3, 0), strict=True)], [(0, 2), (1, 3)])
    assert numbers.delta == pytest.approx([0.182, -0.028, 0.308, 0.098], abs=1e-12)
    assert phi == pytest.approx([0.707, 0.497, 0.203, -0.007], abs=1e-12)
    assert np.mean(phi) == pytest.approx(0.35)
    assert np.std(phi, ddof=1) == pytest.approx(0.315233, abs=1e-6)
    assert numbers.take(phi, [(0, 3), (1, 2)]) == pytest.approx([0.5481, 0.3801, 0.4599, 0.2919], abs=1e-12)


def test_of_an_odd_number_one_is_alone() -> None:
    numbers = Numbers(NoLoCoStep(), [1, 2, 3], [0.2, 0, -0.1])
    assert numbers.take([1.1, 2.2, 2.7], [(0, 2), (1,)]) == pytest.approx([1.73, 2.14, 2.18], abs=1e-12)
    assert numbers.delta == pytest.approx([0.73, 0.14, -0.82], abs=1e-12)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_one_message_says_what_two_would(group_size: int) -> None:
    generator = np.random.default_rng(group_size)
    phi, theta, delta = generator.normal(size=(3, group_size))
    alpha, beta, gamma = 0.4, 0.8, 0.6
    numbers = Numbers(NoLoCoStep(alpha, beta, gamma, group_size), phi.tolist(), delta.tolist())
    found = numbers.take(theta.tolist(), [tuple(range(group_size))])
    expected = alpha * delta + beta * (theta - phi).mean() - gamma * (phi - phi.mean())
    assert numbers.delta == pytest.approx(expected.tolist(), abs=1e-14)
    assert found == pytest.approx((phi + expected).tolist(), abs=1e-14)


def test_without_momentum_it_is_gossip_of_weights() -> None:
    numbers = Numbers(NoLoCoStep(alpha=0, beta=1, gamma=1), [5, -3])
    assert numbers.take([2, 4], [(0, 1)]) == pytest.approx([3, 3])


@pytest.mark.parametrize(
    ("alpha", "momentum", "expected"),
    [(0.3, "heavy-ball", [1.07, 1.231]), (0.9, "nesterov", [1.133, 1.4557]), (0.3, "nesterov", [1.091, 1.2793])],
)
def test_diloco_is_sgd_with_momentum(alpha: float, momentum: str, expected: list[float]) -> None:
    numbers = Numbers(DiLoCoStep(alpha, 0.7, momentum), [1.0])
    weight = nn.Parameter(number(1.0))
    outer = torch.optim.SGD([weight], lr=0.7, momentum=alpha, nesterov=momentum == "nesterov")
    phi = [1.0]
    for change, value in zip((0.1, 0.2), expected, strict=True):
        phi = numbers.take([phi[0] + change], [(0,)])
        weight.grad = number(-change)
        outer.step()
        assert phi == pytest.approx([value], abs=1e-12)
        assert weight.item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("step", [NoLoCoStep(0.3, group_size=4), DiLoCoStep()])
def test_a_full_group_is_diloco(step: OuterStep) -> None:
    numbers = Numbers(step, [1, 1, 1, 1], [0.05] * 4)
    assert numbers.take([1.2, 0.8, 1.6, 1], [(0, 1, 2, 3)]) == pytest.approx([1.12] * 4, abs=1e-12)


@pytest.mark.parametrize(
    ("n", "alpha", "low", "high", "exact"),
    [
        (2, 0.5, 0.5, 1.5, 1.5),
        (2, 0.9, 0.9, 1.676305, 0.38),
        (4, 0.5, 0.408248, 1.224745, 2.0),
        (4, 0.9, 0.734847, 1.368698, 0.690909),
    ],
)
def test_bounds_on_gamma(n: int, alpha: float, low: float, high: float, exact: float) -> None:
    assert papers_interval(alpha, n) == pytest.approx((low, high), abs=1e-6)
    assert largest_gamma(alpha, n) == pytest.approx(exact, abs=1e-6)


def _variance(alpha: float, gamma: float, group_size: int = 2, replicas: int = 64, rounds: int = 200) -> float:
    """By what the variance of replicas that learn nothing is multiplied."""
    phi = np.random.default_rng(0).normal(size=replicas)
    delta, before = np.zeros(replicas), phi.var()
    for round_ in range(rounds):
        for group in random_groups(round_, replicas, group_size):
            members = list(group)
            delta[members] = alpha * delta[members] - gamma * (phi[members] - phi[members].mean())
        phi += delta
    return phi.var() / before


@pytest.mark.parametrize(("alpha", "group_size"), [(0.5, 2), (0.9, 2), (0.5, 4), (0.9, 4)])
def test_the_bound_parts_what_contracts_from_what_diverges(alpha: float, group_size: int) -> None:
    bound = largest_gamma(alpha, group_size)
    assert _variance(alpha, 0.8 * bound, group_size) < 1e-2
    assert _variance(alpha, 1.5 * bound, group_size) > 1e2


def test_the_papers_interval_allows_what_diverges() -> None:
    low, high = papers_interval(0.9, 2)
    assert low < 1.0 < high
    assert _variance(0.9, 1.0) > 1e10
    with pytest.raises(UnsupportedSetup, match=r"drift apart unless 0 < gamma < .* = 0\.38"):
        NoLoCoStep(0.9, gamma=1.0).check(64)
    with pytest.raises(UnsupportedSetup, match="drift apart"):
        NoLoCoStep(alpha=0.9).check(3)  # gamma is beta, 0.7


def test_gamma_is_inert_where_a_group_is_everybody() -> None:
    NoLoCoStep(0.9, gamma=1.0).check(2)
    modules = [nn.Linear(3, 2) for _ in range(2)]
    replicas = SimulatedReplicas(modules, NoLoCoStep())
    for _ in range(3):
        with torch.no_grad():
            for module in modules:
                module.weight += torch.randn(2, 3)
        replicas.average()
        # the first step begins from different weights, of which nothing but the pull of gamma is left
    first, second = (module.weight for module in modules)
    assert (first - second).abs().max() < 1.0


@pytest.mark.parametrize("world_size", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [2, 3])
def test_groups_cut_a_permutation(world_size: int, size: int) -> None:
    seen = set()
    for round_ in range(12):
        groups = random_groups(round_, world_size, size, seed=4)
        assert sorted(rank for group in groups for rank in group) == list(range(world_size))
        assert all(len(group) == size for group in groups[: world_size // size])
        assert groups == random_groups(round_, world_size, size, seed=4)
        seen.add(tuple(sorted(groups)))
    assert len(seen) > 1 or world_size <= 2


def test_all_pairs_come_up_equally_often() -> None:
    counts = np.zeros((6, 6))
    for round_ in range(3000):
        for a, b in random_groups(round_, 6, 2):
            counts[a, b] += 1
    assert counts[np.triu_indices(6, 1)] == pytest.approx(np.full(15, 600), rel=0.15)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NoLoCoStep(alpha=1.0),
        lambda: NoLoCoStep(alpha=-0.1),
        lambda: NoLoCoStep(beta=0.0),
        lambda: NoLoCoStep(gamma=float("nan")),
        lambda: NoLoCoStep(group_size=1),
        lambda: DiLoCoStep(alpha=1.5),
        lambda: DiLoCoStep(momentum="adam"),
    ],
)
def test_options_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(UnsupportedSetup, match="expected"):
        make()


def test_layout_keeps_types_and_names_what_is_not_finite() -> None:
    weights = {"a": torch.randn(2, 3).bfloat16(), "c": torch.randn(2, dtype=torch.complex64)}
    buffers = {"b": torch.randn(4)}
    layout = Layout.of(weights, buffers)
    tensors = [*weights.values(), *buffers.values()]
    vector = layout.flatten(tensors)
    assert (vector.dtype, len(vector), layout.weights) == (torch.float32, 14, 10)
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    layout.write(vector, copies)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert list(layout.views(vector[:10])) == ["a", "c"]
    layout.check(vector, "NoLoCo")
    vector[11] = float("inf")
    with pytest.raises(NonFiniteWeights, match="NoLoCo: b holds"):
        layout.check(vector, "NoLoCo")


def test_a_layout_is_float64_where_a_tensor_is() -> None:
    assert Layout.of({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float64)}, {}).dtype == torch.float64


def test_buffers_become_the_mean_of_the_group() -> None:
    modules = [nn.BatchNorm1d(2) for _ in range(4)]
    for number_, module in enumerate(modules):
        module.running_mean.fill_(number_)
    step = NoLoCoStep()
    SimulatedReplicas(modules, step).average()
    for rank, module in enumerate(modules):
        assert module.running_mean.tolist() == [np.mean(step.group(0, rank, 4))] * 2
        assert module.num_batches_tracked == 0
