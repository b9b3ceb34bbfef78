"""Searching coefficients whose sum is 1: start vectors, the operators of evolution, and CMA-ES. No weights here.

Shape suffixes: R rows of coefficients (1, or one per block of the network), K checkpoints, N free dimensions R·(K − 1).
All coefficients are float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from cma import CMAEvolutionStrategy


class Member(NamedTuple):
    """Coefficients that were tried, and their worth: the score, less the ridge; −∞ where the score was not finite."""

    alpha_RK: Tensor
    worth: float


def ema_coefficients(count: int, d: float) -> list[float]:
    """What an exponential average over saved checkpoints, begun at the first, gives each of them.

    α_1 = d^{K−1} and α_i = (1 − d)·d^{K−i}, which add up to 1. (A geometric series divided by its sum is not the same.)

    Args:
        count: K.
        d: Decay from one checkpoint to the next: γ^Δ for a decay γ per step and Δ steps between two. 0: the last one.

    Example:
        >>> ema_coefficients(4, 0.5)
        [0.125, 0.125, 0.25, 0.5]
    """
    return [d ** (count - 1), *((1.0 - d) * d ** (count - i) for i in range(2, count + 1))]


def project(alpha_RK: Tensor) -> Tensor:
    """The nearest coefficients whose sum is 1: (Σα − 1) / K less in each.

    Not a division by Σα, which has no bound where the sum is near 0 and turns the signs where it is below.

    Example:
        >>> project(torch.tensor([[2.0, -1.5, -0.4]])).round(decimals=4)
        tensor([[ 2.3000, -1.2000, -0.1000]])
    """
    return alpha_RK - (alpha_RK.sum(-1, keepdim=True) - 1.0) / alpha_RK.shape[-1]


def crossover(a_RK: Tensor, b_RK: Tensor, mask_RK: Tensor) -> Tensor:
    """Each coefficient from one parent or the other: from ``a`` where the mask is set."""
    return torch.where(mask_RK, a_RK, b_RK)


def mix(a_RK: Tensor, b_RK: Tensor, share: float) -> Tensor:
    """λ·a + (1 − λ)·b."""
    return share * a_RK + (1.0 - share) * b_RK


class Search(ABC):
    """Proposes a generation of coefficients at a time, from the worth of those before.

    Whoever proposes again from the same worths proposes the same, so that a search can be resumed from its history.
    """

    @abstractmethod
    def propose(self, number: int) -> list[Tensor]:
        """The generation of this number, from 0."""

    @abstractmethod
    def learn(self, generation: Sequence[Member]) -> None:
        """Take in what the generation that was proposed last, or the start, is worth."""


class Evolution(Search):
    """The search of LCSC: an elitist population, crossover or mixing of two good parents, and noise.

    Args:
        population: P: the most members that are kept.
        generation: Children of one generation; their parents are those that were there when it began.
        sigma: σ of the noise.
        mutation: The probability that a coefficient gets noise.
        crossover: The probability that two parents are crossed and not mixed.
        local: The probability that a child is the best member with two coefficients changed, by δ and −δ, instead.
        seed: Of all that is random.
    """

    def __init__(
        self,
        population: int,
        generation: int,
        sigma: float,
        mutation: float,
        crossover: float,
        local: float,
        seed: int,
    ) -> None:
        self.size, self.generation, self.seed = population, generation, seed
        self.sigma, self.mutation, self.crossover, self.local = sigma, mutation, crossover, local
        self.members: list[Member] = []

    def propose(self, number: int) -> list[Tensor]:
        """As many children as a generation has."""
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        ranked = sorted(self.members, key=lambda member: -member.worth)  # stable, so that the seed decides
        better = ranked[: max(2, math.ceil(len(ranked) / 2))]
        return [self._child(better, draw) for _ in range(self.generation)]

    def _child(self, better: Sequence[Member], draw: torch.Generator) -> Tensor:
        chance, kind, share = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
        first, second = torch.randperm(len(better), generator=draw)[:2].tolist()
        a_RK, b_RK = better[first].alpha_RK, better[second].alpha_RK
        mask_RK = torch.rand(a_RK.shape, generator=draw, dtype=torch.float64) < 0.5
        noised_RK = torch.rand(a_RK.shape, generator=draw, dtype=torch.float64) < self.mutation
        noise_RK = self.sigma * torch.randn(a_RK.shape, generator=draw, dtype=torch.float64)
        if chance < self.local:
            child_RK = better[0].alpha_RK.clone()
            row = int(torch.randint(len(child_RK), (), generator=draw))
            i, j = torch.randperm(child_RK.shape[1], generator=draw)[:2].tolist()
            child_RK[row, i] += noise_RK[row, i]
            child_RK[row, j] -= noise_RK[row, i]
            return child_RK
        child_RK = crossover(a_RK, b_RK, mask_RK) if kind < self.crossover else mix(a_RK, b_RK, share)
        return project(child_RK + noised_RK * noise_RK)

    def learn(self, generation: Sequence[Member]) -> None:
        """Append while there is room, then replace the worst by what is better."""
        for member in generation:
            if len(self.members) < self.size:
                self.members.append(member)
                continue
            worst = min(range(len(self.members)), key=lambda i: self.members[i].worth)
            if member.worth > self.members[worst].worth:
                self.members[worst] = member


class CovarianceAdaptation(Search):
    """CMA-ES (pycma) over the K − 1 free dimensions of each row, around the best start vector.

    Args:
        generation: Candidates of one generation.
        sigma: The first step size.
        seed: Of all that is random.
    """

    def __init__(self, generation: int, sigma: float, seed: int) -> None:
        self.generation, self.sigma, self.seed = generation, sigma, seed
        self._strategy = None
        self._asked: list[np.ndarray] = []

    def propose(self, number: int) -> list[Tensor]:
        """As many candidates as a generation has."""
        self._asked = self._strategy.ask()
        points = [torch.as_tensor(x, dtype=torch.float64).view(len(self._start_RK), -1) for x in self._asked]
        return [project(self._start_RK + point @ self._basis) for point in points]  # which only takes rounding away

    def learn(self, generation: Sequence[Member]) -> None:
        """Begin at the best of the start vectors, then adapt; an unfinished generation teaches nothing."""
        if self._strategy is None:
            self._begin(max(generation, key=lambda member: member.worth).alpha_RK)
            return
        if len(generation) < len(self._asked):
            return
        finite = [member.worth for member in generation if math.isfinite(member.worth)]
        worst = min(finite, default=0.0) - 1.0
        self._strategy.tell(self._asked, [-(m.worth if math.isfinite(m.worth) else worst) for m in generation])

    def _begin(self, start_RK: Tensor) -> None:
        count = start_RK.shape[1]
        self._start_RK, self._basis = start_RK, sum_zero_basis(count)
        self._strategy = cma_strategy(start_RK.shape[0] * (count - 1), self.sigma, self.seed, popsize=self.generation)


def cma_strategy(size: int, sigma: float, seed: int, **options: Any) -> "CMAEvolutionStrategy":
    """CMA-ES of pycma around 0, quiet, and with random numbers of its own: numpy's global state is left alone.

    Args:
        size: Free dimensions.
        sigma: The first step size.
        seed: Of all that is random.
        **options: pycma's own.
    """
    import cma
    import numpy as np

    quiet = {"verbose": -9, "verb_log": 0, "verb_disp": 0}
    drawn = {"seed": np.nan, "randn": np.random.RandomState(seed % 2**32).randn}
    return cma.CMAEvolutionStrategy([0.0] * size, sigma, {**quiet, **drawn, **options})


def sum_zero_basis(count: int) -> Tensor:
    """An orthonormal basis ``[K − 1, K]`` of all changes that leave the sum as it is."""
    rows = torch.zeros(count - 1, count, dtype=torch.float64)
    for i in range(1, count):  # Helmert's: the first i against the next
        rows[i - 1, :i], rows[i - 1, i] = 1.0, -float(i)
    return rows / rows.norm(dim=1, keepdim=True)
