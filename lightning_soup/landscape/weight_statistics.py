"""What the weights of several networks say of each other, without any data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soup.progress import Progress, silent
from lightning_soup.weights.gram import Gram, gram
from lightning_soup.weights.weights_file import Source, WeightsFile

__all__ = ["WeightStatistics", "effective_rank", "weight_statistics"]


@dataclass(frozen=True)
class WeightStatistics:
    """Distances and angles between K networks.

    Attributes:
        gram: The inner products that all of it comes from.
        distances: ‖θ_i − θ_j‖₂ over all floating tensors, ``[K, K]``.
        cosines: Of the updates θ_i − θ_0 from the common start, ``[K, K]``; None where the start is not known.
        lengths: ‖θ_i − θ_0‖₂, ``[K]``; None likewise.
        norms: ‖θ_i‖₂, ``[K]``.
        rank: Effective rank of the updates, or of the differences from the mean where the start is not known: 1 where
            all lie on one line, K where they are orthogonal and as long as each other.
    """

    gram: Gram
    distances: Tensor
    cosines: Tensor | None
    lengths: Tensor | None
    norms: Tensor
    rank: float

    def distances_by_tensor(self) -> dict[str, Tensor]:
        """``[K, K]`` for each tensor."""
        return {name: _distances(products) for name, products in self.gram.products.items()}


def weight_statistics(
    checkpoints: Sequence[Source | WeightsFile],
    start: Source | WeightsFile | None = None,
    *,
    progress: Progress = silent,
) -> WeightStatistics:
    """Compare networks by their weights, from one pass over their files.

    Args:
        checkpoints: K of them, with the same tensors.
        start: What they all started from, if it is there still.
        progress: Shows how far it is.

    Raises:
        IncompatibleIngredients: Their tensors differ.
    """
    found = gram(checkpoints, start, progress=progress)
    total = found.total
    lengths = total.diagonal().clamp(min=0).sqrt()
    cosines = None
    if found.from_start:
        scale = lengths.clamp(min=1e-300)
        cosines = total / scale / scale[:, None]
    norms = torch.stack(list(found.squares.values())).sum(0).clamp(min=0).sqrt()
    updates = total if found.from_start else _centred(total)
    return WeightStatistics(
        found, _distances(total), cosines, lengths if found.from_start else None, norms, effective_rank(updates)
    )


def effective_rank(products: Tensor) -> float:
    """exp(−Σ p_i·log p_i) over the shares p_i of the eigenvalues of a Gram matrix.

    Source: Roy, Vetterli, The effective rank (2007).
    """
    values = torch.linalg.eigvalsh(products.double()).clamp(min=0)
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = [float(value) / total for value in values if value > 0]
    return math.exp(-sum(share * math.log(share) for share in shares))


def _distances(products: Tensor) -> Tensor:
    own = products.diagonal()
    return (own[:, None] + own[None, :] - 2 * products).clamp(min=0).sqrt()


def _centred(products: Tensor) -> Tensor:
    """The products of differences from the mean."""
    return products - products.mean(0) - products.mean(1, keepdim=True) + products.mean()
