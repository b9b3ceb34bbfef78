"""Gossip as a callback: neighbours in a graph average, and the variance of their weights is kept."""

import statistics
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_soup.callbacks.replica_averaging import ReplicaAveraging
from lightning_soup.distributed.gossip import GossipStep
from lightning_soup.errors import RecipeError, UnsupportedSetup
from lightning_soup.layers.prunable_weights import NOT_PRUNABLE
from lightning_soup.recipes.variance_corrected import NOTHING, VarianceCorrectedSoup

__all__ = ["GossipAveraging"]


class GossipAveraging(ReplicaAveraging):
    """Each replica averages with its neighbours: M = β·W_self + (1 − β)·mean of theirs, with their layers' variance.

    For fully decentralised training: no rank has a special role. Averaging N unrelated models divides the variance of
    their layers by N, and signals fade; the correction M ← (M − μ)·√(T/Var(M)) + μ brings it back; see
    :class:`.VarianceCorrectedSoup`. Nodes that draw their own weights are made by
    ``ReplicaStrategy(common_start=False)``. With a common start replicas are related, the factors are near 1, and a
    warning says that nothing is corrected.

    Args:
        topology: Who is whose neighbour: ``"ring"``, ``"complete"``, ``"regular"`` (a random graph in which all have
            ``degree`` neighbours), or edges as pairs of ranks: ``[[0, 1], [1, 2]]``.
        every: Optimizer steps between merges.
        beta: β, the share of a replica's own weights; None: all in the group alike.
        variance_correction: Whether the variance is kept; false: plain gossip.
        target: Whose variance: ``"others"``, ``"self"`` or ``"mix"``; with ``beta`` only. Where neighbours of
            neighbours are never neighbours (a ring of even length), two halves swap the variances of ``"others"`` at
            each merge; those of ``"mix"`` agree in the end.
        exclude: Patterns of matrices that are averaged only; by default those of embeddings.
        chunks: By pattern of names, into how many equal parts of rows a fused matrix falls: ``{"*.qkv.weight": 3}``.
        degree: Of ``"regular"``.
        seed: Of ``"regular"``.

    Raises:
        UnsupportedSetup: Before training: no such graph, replicas that are not connected, one replica, another
            strategy, or an option out of range.
        ReplicaLost: A neighbour died or did not answer, and the strategy has no patience.

    Source: Tian, Al-Ars, Kitsak, Hofstee, Vanishing Variance Problem in Fully Decentralized Neural-Network Systems,
    2024 (arXiv 2404.04616). Its simulator counts ticks; here all merge after the same number of steps.
    """

    def __init__(
        self,
        topology: Literal["ring", "complete", "regular"] | list[list[int]] = "ring",
        every: int = 1,
        beta: float | None = 0.5,
        variance_correction: bool = True,
        target: Literal["others", "self", "mix"] = "others",
        exclude: list[str] | None = None,
        chunks: dict[str, int] | None = None,
        degree: int = 4,
        seed: int = 0,
    ) -> None:
        patterns = list(NOT_PRUNABLE) if exclude is None else list(exclude)
        merge = VarianceCorrectedSoup(beta=beta, target=target, exclude=patterns, chunks=dict(chunks or {}))
        try:
            merge.check()
        except RecipeError as error:
            raise UnsupportedSetup(str(error).replace("VarianceCorrectedSoup", "GossipAveraging", 1)) from error
        super().__init__(GossipStep(topology, merge, variance_correction, degree, seed), every)
        self.topology, self.beta, self.variance_correction, self.target = topology, beta, variance_correction, target
        self.exclude, self.chunks, self.degree, self.seed = exclude, chunks, degree, seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out which layers are corrected, before anything is sent."""
        super().on_train_start(trainer, pl_module)
        if self.variance_correction:
            self.step.corrected(self._layout.views(self._layout.flatten(self._tensors)[: self._layout.weights]))

    def _figures(self) -> dict[str, float]:
        factors = self.step.factors
        if not factors:
            return {}
        if self.round == 1 and max(abs(factor - 1) for factor in factors) <= NOTHING:
            rank_zero_warn(
                f"GossipAveraging: all {len(factors)} factors of the first merge are within {NOTHING:.0%} of 1, so the "
                "correction of variances does nothing: the replicas are related (a common start). It is meant for "
                "ReplicaStrategy(common_start=False); set variance_correction to false to save its time."
            )
        name = type(self).__name__
        return {
            f"{name}/factor_mean": statistics.fmean(factors),
            f"{name}/factor_min": min(factors),
            f"{name}/factor_max": max(factors),
        }

    def _options(self) -> dict[str, Any]:
        named = {"beta": self.beta, "variance_correction": self.variance_correction, "target": self.target}
        graph = {"topology": self.topology, "degree": self.degree, "seed": self.seed}
        layers = {"exclude": self.step.merge.exclude, "chunks": self.step.merge.chunks}
        return {**super()._options(), **named, **graph, **layers}
