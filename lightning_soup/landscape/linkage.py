"""Average linkage: the tree that networks make when the nearest groups are joined again and again."""

from dataclasses import dataclass

from torch import Tensor

from lightning_soup.errors import UnsupportedSetup

__all__ = ["Join", "average_linkage"]


@dataclass(frozen=True)
class Join:
    """Two groups become one.

    Attributes:
        left: Members of one of them, in the order of the leaves.
        right: Members of the other.
        height: The mean distance between members of both.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    height: float

    @property
    def members(self) -> tuple[int, ...]:
        """All of them, in the order of the leaves."""
        return self.left + self.right


def average_linkage(distances: Tensor) -> list[Join]:
    """Join the two nearest groups until one is left; the last join holds the order of the leaves.

    Args:
        distances: ``[K, K]``, symmetric.

    Raises:
        UnsupportedSetup: Not a square matrix of finite numbers.

    Source: Sokal, Michener (1958), UPGMA.
    """
    if distances.ndim != 2 or len(distances) != distances.shape[1] or not distances.isfinite().all():
        raise UnsupportedSetup(
            f"average_linkage: got {list(distances.shape)}; expected a square matrix of finite distances."
        )
    groups: list[tuple[int, ...]] = [(i,) for i in range(len(distances))]
    joins = []

    def between(a: tuple[int, ...], b: tuple[int, ...]) -> float:
        return float(distances[list(a)][:, list(b)].mean())

    while len(groups) > 1:
        pairs = ((between(a, b), i, j) for i, a in enumerate(groups) for j, b in enumerate(groups[:i]))
        height, i, j = min(pairs)
        joins.append(Join(groups[j], groups[i], height))
        groups = [group for k, group in enumerate(groups) if k not in (i, j)] + [joins[-1].members]
        groups.sort(key=min)
    return joins
