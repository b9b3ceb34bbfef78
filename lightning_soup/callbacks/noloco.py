"""NoLoCo and DiLoCo as callbacks."""

from typing import Any, Literal

from lightning_soup.callbacks.replica_averaging import ReplicaAveraging
from lightning_soup.distributed.noloco import DiLoCoStep, NoLoCoStep

__all__ = ["DiLoCo", "NoLoCo"]


class NoLoCo(ReplicaAveraging):
    """Low-communication training without any all-reduce: random pairs of replicas average their slow weights.

    Every m optimizer steps a replica meets the others of a random group and takes the outer step
    δ ← αδ + (β/n)·ΣΔ − γ(φ − mean φ), φ ← φ + δ, θ ← φ; see :class:`.NoLoCoStep`. It sends one tensor to each, and
    waits for nobody else. Needs :class:`.ReplicaStrategy`, whose ``patience`` says what happens when a peer does not
    come. Keep global synchronisation out of the steps between: ``log(…, sync_dist=True)``, validation and saving do
    synchronise.

    Clip gradients in each replica (the paper: norm 1), and let the learning rate decay: replicas lie apart in
    proportion to it, and a single one is not "the model" before.

    Args:
        every: m, optimizer steps between outer steps.
        alpha: α, outer momentum.
        beta: β, outer learning rate.
        gamma: γ, pull towards the slow weights of the group; None: β. Refused where replicas would drift apart.
        group_size: n, replicas in a group; an odd one is alone for a round.
        seed: Of the groups.

    Raises:
        UnsupportedSetup: Before training: γ ≥ 2(1 − α²)/(1 − α(n − 2)/n), one replica, or another strategy.
        ReplicaLost: A peer died or did not answer, and the strategy has no patience.

    Example:
        >>> trainer = Trainer(devices=4, strategy="replicas", callbacks=[NoLoCo(every=50)])  # doctest: +SKIP

    Source: Kolehmainen et al., NoLoCo, 2025 (arXiv 2506.10911). It has no value for γ; its code uses β. Its bound on γ
    lets some choices diverge; the one here is exact for many replicas. Its random pipeline routing is not needed where
    each replica is whole.
    """

    def __init__(
        self,
        every: int = 50,
        alpha: float = 0.5,
        beta: float = 0.7,
        gamma: float | None = None,
        group_size: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(NoLoCoStep(alpha, beta, gamma, group_size, seed), every)
        self.alpha, self.beta, self.gamma, self.group_size, self.seed = alpha, beta, gamma, group_size, seed

    def _options(self) -> dict[str, Any]:
        named = {"alpha": self.alpha, "beta": self.beta, "gamma": self.step.gamma}
        return {**super()._options(), **named, "group_size": self.group_size, "seed": self.seed}


class DiLoCo(ReplicaAveraging):
    """All replicas average what they have learnt since the last outer step, as the gradient of an outer optimizer.

    The baseline of :class:`NoLoCo`: an all-reduce, for which all wait; see :class:`.DiLoCoStep`.

    Args:
        every: H, optimizer steps between outer steps. NoLoCo's authors compare at 100; DiLoCo's paper has 500.
        alpha: α, outer momentum. DiLoCo's paper has 0.9, with Nesterov.
        beta: β, outer learning rate.
        momentum: ``"heavy-ball"`` or ``"nesterov"``.

    Raises:
        UnsupportedSetup: Before training: one replica, or another strategy.
        ReplicaLost: A rank died or did not answer, and the strategy has no patience.

    Source: Douillard et al., DiLoCo, 2023 (arXiv 2311.08105); defaults as in arXiv 2506.10911.
    """

    def __init__(
        self,
        every: int = 100,
        alpha: float = 0.3,
        beta: float = 0.7,
        momentum: Literal["heavy-ball", "nesterov"] = "heavy-ball",
    ) -> None:
        super().__init__(DiLoCoStep(alpha, beta, momentum), every)
        self.alpha, self.beta, self.momentum = alpha, beta, momentum

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "alpha": self.alpha, "beta": self.beta, "momentum": self.momentum}
