"""Gossip: replicas average with their neighbours in a graph, and keep the variance of their weights."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_soup.distributed.outer_step import Layout, OuterStep
from lightning_soup.distributed.topology import Topology, neighbours
from lightning_soup.errors import RecipeError, UnsupportedSetup
from lightning_soup.recipes.variance_corrected import VarianceCorrectedSoup
from lightning_soup.weights.variance import correctable, corrections, rescale_
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["GossipStep"]


class GossipStep(OuterStep):
    """M = β·W_self + (1 − β)·mean of the neighbours', each layer of it brought back to the variance T_l.

    The arithmetic is that of :class:`.VarianceCorrectedSoup`, with the node's own model as its first ingredient.

    Args:
        topology: See :func:`.neighbours`.
        merge: β, the target of the variance, and which tensors are corrected.
        variance_correction: Whether they are; without, it is plain gossip.
        degree: Of a random regular graph.
        seed: Of it.

    Attributes:
        factors: Those of the last merge; empty without correction.
    """

    def __init__(
        self,
        topology: Topology = "ring",
        merge: VarianceCorrectedSoup | None = None,
        variance_correction: bool = True,
        degree: int = 4,
        seed: int = 0,
    ) -> None:
        self.topology, self.merge = topology, merge or VarianceCorrectedSoup(beta=0.5)
        self.variance_correction, self.degree, self.seed = variance_correction, degree, seed
        self.factors: tuple[float, ...] = ()
        self._neighbours: dict[int, list[tuple[int, ...]]] = {}
        self._names: list[str] | None = None

    def check(self, world_size: int) -> None:
        """Refuse a graph that cannot be, or in which some never meet."""
        self._graph(world_size)

    def group(self, round_: int, rank: int, world_size: int) -> tuple[int, ...]:
        """The replica and its neighbours."""
        return tuple(sorted((rank, *self._graph(world_size)[rank])))

    def _graph(self, world_size: int) -> list[tuple[int, ...]]:
        if world_size not in self._neighbours:
            self._neighbours[world_size] = neighbours(self.topology, world_size, self.degree, self.seed)
        return self._neighbours[world_size]

    def start(self, weights: Tensor) -> dict[str, Tensor]:
        """No state."""
        return {}

    def message(self, weights: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """W."""
        return weights

    def update(
        self, weights: Tensor, state: dict[str, Tensor], messages: Sequence[Tensor], own: int, layout: Layout
    ) -> Tensor:
        """Average and correct."""
        order = [own, *(i for i in range(len(messages)) if i != own)]
        if len(order) == 1:
            return weights.clone()
        coefficients, shares = self.merge.coefficients(len(order))
        models = [messages[i] for i in order]
        average = models[0] * coefficients[0]
        for coefficient, model in zip(coefficients[1:], models[1:], strict=True):
            average.add_(model, alpha=coefficient)
        if self.variance_correction:
            self._correct(average, models, shares, layout)
        return average

    def _correct(self, average: Tensor, models: Sequence[Tensor], shares: Sequence[float], layout: Layout) -> None:
        merged = layout.views(average)
        names = self.corrected(merged)
        files = [open_checkpoint(_some(layout.views(model), names)) for model in models]
        try:
            found = corrections(files, _some(merged, names), shares, names, self.merge.chunks)
        except RecipeError as error:
            raise UnsupportedSetup(f"GossipAveraging: {error}") from error
        rescale_(merged, found)
        self.factors = tuple(factor for correction in found.values() for factor in correction.factors)

    def corrected(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors whose variance is kept: matrices that the patterns do not exclude.

        Raises:
            UnsupportedSetup: There is none.
        """
        if self._names is None:
            self._names = correctable(open_checkpoint(dict(tensors)), self.merge.exclude)
            if not self._names:
                raise UnsupportedSetup(
                    "GossipAveraging: there is no matrix whose variance could be kept. Look at exclude, or set "
                    "variance_correction to false."
                )
        return self._names


def _some(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}
