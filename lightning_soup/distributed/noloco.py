"""NoLoCo and DiLoCo: replicas train apart and take an outer step together, in random pairs or all at once."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_soup.distributed.outer_step import Layout, OuterStep, check_number, mean_in_order
from lightning_soup.errors import UnsupportedSetup

__all__ = ["DiLoCoStep", "NoLoCoStep", "largest_gamma", "papers_interval", "random_groups"]

Momentum = Literal["heavy-ball", "nesterov"]


def random_groups(round_: int, world_size: int, size: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Cut one random permutation of the replicas, which all draw alike, into groups.

    Where they do not go into the number of replicas, the last group is smaller: of an odd number in pairs, one is
    alone.

    Args:
        round_: Number of the outer step, from 0.
        world_size: How many replicas there are.
        size: n, of a group.
        seed: Of the permutations.
    """
    order = np.random.default_rng([seed, round_]).permutation(world_size).tolist()
    return [tuple(sorted(order[start : start + size])) for start in range(0, world_size, size)]


def largest_gamma(alpha: float, group_size: int) -> float:
    """2(1 − α²) / (1 − α(n − 2)/n): from here on γ makes replicas drift apart.

    Exact for random groups of many replicas: the recursion of the mean squares of (φ, δ) is stable below it. It is
    derived for this package; the paper's own interval (:func:`papers_interval`) allows values that diverge.
    """
    return 2 * (1 - alpha**2) / (1 - alpha * (group_size - 2) / group_size)


def papers_interval(alpha: float, group_size: int) -> tuple[float, float]:
    """The paper's interval for γ (its Eq. 74), for comparison: α√(n/(2(n−1))) to √(n(2+α²)/(2(n−1)))."""
    n = group_size
    return alpha * math.sqrt(n / (2 * (n - 1))), math.sqrt(n * (2 + alpha**2) / (2 * (n - 1)))


class NoLoCoStep(OuterStep):
    """δᵢ ← αδᵢ + (β/n)·Σⱼ Δⱼ − γ(φᵢ − (1/n)·Σⱼ φⱼ),  φᵢ ← φᵢ + δᵢ,  θᵢ ← φᵢ, over the n members j of a group.

    Sent is sⱼ = βΔⱼ + γφⱼ alone, of which δᵢ ← αδᵢ − γφᵢ + mean sⱼ is the same: one tensor for each peer where φ and
    Δ would be two. With γ = β it is βθⱼ.

    Args:
        alpha: α, outer momentum (heavy-ball).
        beta: β, outer learning rate.
        gamma: γ, pull towards the group's slow weights; None: β, as in the released code, which has no other.
        group_size: n.
        seed: Of the groups.

    Source: Kolehmainen et al., NoLoCo, 2025 (arXiv 2506.10911), Eq. 2; its printed sign of the Δ term is that of
    ascent, its appendix (Eq. 32) and code have this one.
    """

    def __init__(
        self, alpha: float = 0.5, beta: float = 0.7, gamma: float | None = None, group_size: int = 2, seed: int = 0
    ) -> None:
        self.alpha, self.beta, self.gamma = alpha, beta, beta if gamma is None else gamma
        self.group_size, self.seed = group_size, seed
        check_number("NoLoCo", "alpha", alpha, -1e-12, 1)
        check_number("NoLoCo", "beta", beta, 0, math.inf)
        check_number("NoLoCo", "gamma", self.gamma, -1e-12, math.inf)
        if group_size < 2:
            raise UnsupportedSetup(f"NoLoCo(group_size={group_size}): expected 2 or more.")

    def check(self, world_size: int) -> None:
        """Refuse γ outside of the bound. Where a group is all replicas, they are equal after each step and γ is inert.

        Raises:
            UnsupportedSetup: Replicas would drift apart.
        """
        size, largest = self.group_size, largest_gamma(self.alpha, self.group_size)
        if world_size > size and self.gamma >= largest:
            raise UnsupportedSetup(
                f"NoLoCo(alpha={self.alpha}, gamma={self.gamma}, group_size={size}): replicas drift apart unless "
                f"0 < gamma < 2(1 − α²)/(1 − α(n − 2)/n) = {largest:.4g}. Give a smaller gamma or alpha; they contract "
                "fastest at gamma ≈ 0.3 for alpha = 0.5 in pairs."
            )

    def group(self, round_: int, rank: int, world_size: int) -> tuple[int, ...]:
        """The random group of this round."""
        groups = random_groups(round_, world_size, self.group_size, self.seed)
        return next(group for group in groups if rank in group)

    def start(self, weights: Tensor) -> dict[str, Tensor]:
        """φ = θ, δ = 0."""
        return {"phi": weights.clone(), "delta": torch.zeros_like(weights)}

    def message(self, weights: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """S = βΔ + γφ."""
        return torch.add(self.beta * weights, state["phi"], alpha=self.gamma - self.beta)

    def update(
        self, weights: Tensor, state: dict[str, Tensor], messages: Sequence[Tensor], own: int, layout: Layout
    ) -> Tensor:
        """δ ← αδ − γφ + mean s,  φ ← φ + δ,  θ ← φ."""
        phi, delta = state["phi"], state["delta"]
        delta.mul_(self.alpha).add_(mean_in_order(messages).sub_(phi, alpha=self.gamma))
        phi.add_(delta)
        return phi.clone()


class DiLoCoStep(OuterStep):
    """The mean Δ of all replicas is the gradient of an outer optimizer: SGD with momentum.

    Heavy-ball: δ ← αδ + β·mean Δ, φ ← φ + δ. Nesterov, as torch.optim.SGD has it: φ ← φ + αδ + β·mean Δ with the new δ.

    Args:
        alpha: α, outer momentum.
        beta: β, outer learning rate.
        momentum: ``"heavy-ball"``, as in NoLoCo's baseline and its code; ``"nesterov"``, as in DiLoCo's paper.

    Source: Douillard et al., DiLoCo, 2023 (arXiv 2311.08105); α = 0.3 as NoLoCo's authors found best for it.
    """

    collective: ClassVar[bool] = True

    def __init__(self, alpha: float = 0.3, beta: float = 0.7, momentum: Momentum = "heavy-ball") -> None:
        self.alpha, self.beta, self.momentum = alpha, beta, momentum
        check_number("DiLoCo", "alpha", alpha, -1e-12, 1)
        check_number("DiLoCo", "beta", beta, 0, math.inf)
        if momentum not in ("heavy-ball", "nesterov"):
            raise UnsupportedSetup(f"DiLoCo(momentum={momentum!r}): expected 'heavy-ball' or 'nesterov'.")

    def check(self, world_size: int) -> None:
        """Any number of replicas will do."""

    def group(self, round_: int, rank: int, world_size: int) -> tuple[int, ...]:
        """All replicas."""
        return tuple(range(world_size))

    def start(self, weights: Tensor) -> dict[str, Tensor]:
        """φ = θ, δ = 0."""
        return {"phi": weights.clone(), "delta": torch.zeros_like(weights)}

    def message(self, weights: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """βΔ."""
        return (weights - state["phi"]).mul_(self.beta)

    def update(
        self, weights: Tensor, state: dict[str, Tensor], messages: Sequence[Tensor], own: int, layout: Layout
    ) -> Tensor:
        """Take the outer optimizer's step."""
        phi, delta, mean = state["phi"], state["delta"], mean_in_order(messages)
        delta.mul_(self.alpha).add_(mean)
        if self.momentum == "nesterov":
            phi.add_(mean).add_(delta, alpha=self.alpha)
        else:
            phi.add_(delta)
        return phi.clone()
