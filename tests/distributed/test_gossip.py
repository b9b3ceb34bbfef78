"""Gossip: graphs, the merge against the recipe and golden numbers, and many merges in a row."""

import pytest
import torch
from torch import Tensor, nn

from lightning_soup import VarianceCorrectedSoup, open_checkpoint
from lightning_soup.distributed.gossip import GossipStep
from lightning_soup.distributed.outer_step import Layout, Replica
from lightning_soup.distributed.simulation import SimulatedReplicas
from lightning_soup.distributed.topology import neighbours
from lightning_soup.errors import UnsupportedSetup

MATRIX = Layout(("w.weight",), (torch.Size([2, 2]),), 4, torch.float64)
SELF, FIRST, SECOND = (torch.tensor(v, dtype=torch.float64) for v in ((0, 1, 0, 3), (1, 2, 3, 4), (4, 2, 0, 2)))


def merged(target: str, own: int = 0) -> Tensor:
    step = GossipStep("complete", VarianceCorrectedSoup(beta=0.5, target=target))
    others = [rank for rank in range(3) if rank != own]
    models = {own: SELF, others[0]: FIRST, others[1]: SECOND}
    return Replica(step, MATRIX, SELF).average(SELF, models, own)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("others", [1.054912, 1.434971, 0.294795, 3.715322]),
        ("self", [1.077277, 1.442426, 0.346981, 3.633316]),
        ("mix", [1.065983, 1.438661, 0.320627, 3.674729]),
    ],
)
@pytest.mark.parametrize("own", [0, 1, 2])
def test_golden_merges(target: str, expected: list[float], own: int) -> None:
    assert merged(target, own).tolist() == pytest.approx(expected, abs=1e-6)


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def test_a_merge_is_that_of_the_recipe() -> None:
    torch.manual_seed(1)
    modules = [_network() for _ in range(4)]
    before = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    SimulatedReplicas(modules, GossipStep("ring")).average()
    recipe = VarianceCorrectedSoup(beta=0.5)
    for rank, module in enumerate(modules):
        others = [before[(rank - 1) % 4], before[(rank + 1) % 4]]
        soup = recipe.cook([open_checkpoint(state) for state in (before[rank], *others)]).weights()
        for name, parameter in module.named_parameters():
            assert torch.allclose(parameter, soup[name], atol=1e-6), name
        means = torch.stack([state["1.running_mean"] for state in (before[rank], *others)]).mean(0)
        assert torch.allclose(module[1].running_mean, means)


def test_norms_and_biases_are_averaged_only() -> None:
    torch.manual_seed(1)
    modules = [_network() for _ in range(3)]
    scales = torch.stack([torch.tensor([1.1, 0.9, 1, 1, 1]), torch.ones(5), torch.ones(5)])
    for module, scale in zip(modules, scales, strict=True):
        module[1].weight.data.copy_(scale)
    SimulatedReplicas(modules, GossipStep("complete", VarianceCorrectedSoup())).average()
    assert all(torch.allclose(module[1].weight, scales.mean(0)) for module in modules)


def test_plain_gossip_divides_the_variance_and_the_correction_keeps_it() -> None:
    def variance_after(correct: bool) -> float:
        torch.manual_seed(2)
        modules = [nn.Linear(64, 64, bias=False) for _ in range(8)]
        begun = modules[0].weight.var().item()
        replicas = SimulatedReplicas(modules, GossipStep("complete", variance_correction=correct))
        for _ in range(25):
            replicas.average()
        return modules[0].weight.var().item() / begun

    assert variance_after(False) == pytest.approx(1 / 8, rel=0.2)
    assert variance_after(True) == pytest.approx(1, rel=0.02)


def test_a_thousand_merges_do_not_drift() -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(16, 16, bias=False) for _ in range(4)]
    begun = sum(module.weight.var().item() for module in modules) / 4
    replicas = SimulatedReplicas(modules, GossipStep("ring"))
    for _ in range(1000):
        replicas.average()
    assert modules[2].weight.var().item() == pytest.approx(begun, rel=0.02)
    directions = [module.weight / module.weight.norm() for module in modules]
    assert all(torch.allclose(one, directions[0], atol=1e-5) for one in directions)


@pytest.mark.parametrize(("target", "apart"), [("others", True), ("mix", False)])
def test_in_a_ring_of_even_length_two_halves_swap_the_variance_of_others(target: str, apart: bool) -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(16, 16, bias=False) for _ in range(4)]
    for module in modules[::2]:
        module.weight.data *= 2
    replicas = SimulatedReplicas(modules, GossipStep("ring", VarianceCorrectedSoup(beta=0.5, target=target)))
    for _ in range(60):
        replicas.average()
    ratio = modules[0].weight.var() / modules[1].weight.var()
    assert (abs(ratio.item() - 1) > 0.5) == apart


def test_factors_of_related_replicas_are_one() -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(8, 8) for _ in range(3)]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    step = GossipStep("complete")
    SimulatedReplicas(modules, step).average()
    assert step.factors == pytest.approx([1.0], abs=1e-6)


@pytest.mark.parametrize(
    ("topology", "world_size", "expected"),
    [
        ("ring", 4, [(1, 3), (0, 2), (1, 3), (0, 2)]),
        ("ring", 2, [(1,), (0,)]),
        ("complete", 3, [(1, 2), (0, 2), (0, 1)]),
        ([[0, 1], [1, 2]], 3, [(1,), (0, 2), (1,)]),
    ],
)
def test_graphs(topology: object, world_size: int, expected: list[tuple[int, ...]]) -> None:
    assert neighbours(topology, world_size) == expected


def test_regular_graphs_are_regular_and_the_same_everywhere() -> None:
    graph = neighbours("regular", 16, degree=4, seed=3)
    assert all(len(ranks) == 4 for ranks in graph)
    assert all(rank in graph[other] for rank, ranks in enumerate(graph) for other in ranks)
    assert graph == neighbours("regular", 16, degree=4, seed=3) != neighbours("regular", 16, degree=4, seed=4)


@pytest.mark.parametrize(
    ("topology", "degree", "message"),
    [
        ("star", 4, "expected 'ring'"),
        ("regular", 5, "no graph of 5 replicas"),
        ("regular", 3, "no graph of 5 replicas"),
        ([[0, 1], [2, 3], [3, 4]], 4, r"\[0, 1\] are not connected"),
        ([[0, 1, 2]], 4, "no pair"),
        ([[0, 5]], 4, "no pair"),
        ([[1, 1]], 4, "no pair"),
        ([0, 1], 4, "0 is no pair"),
        ([], 4, "not connected"),
    ],
)
def test_graphs_that_cannot_be_are_refused(topology: object, degree: int, message: str) -> None:
    with pytest.raises(UnsupportedSetup, match=message):
        GossipStep(topology, degree=degree).check(5)


def test_nothing_to_correct_is_refused() -> None:
    step = GossipStep("complete")
    with pytest.raises(UnsupportedSetup, match="no matrix"):
        step.corrected({"bias": torch.zeros(4)})
