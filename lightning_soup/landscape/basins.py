"""Which networks lie in one basin, by what is measured in the middle between two of them."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soup.errors import NonFiniteScore, NonFiniteWeights, UnsupportedSetup
from lightning_soup.evaluation.evaluator import Evaluator, Weights
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.combine import combine
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

__all__ = ["Basins", "find_basins"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Basins:
    """What validation says.

    Attributes:
        q: Q of each of the K networks, smaller is better; infinite where it is not finite.
        middle: Q in the middle between two, ``[K, K]``; NaN where it was not measured.
        metric: What Q is.
        tolerance: Barriers up to this count as none.
        basins: The networks' numbers by basin, the largest first.
        poor: Those whose own Q is more than three times the median, and ten tolerances above the best: no barrier could
            be told from that.
        order: Those of the largest basin, best first: the order in which a greedy soup will take them up.
        evaluations: How many were made, and how many would be needed for all pairs.
    """

    q: tuple[float, ...]
    middle: Tensor
    metric: str
    tolerance: float
    basins: tuple[tuple[int, ...], ...]
    poor: tuple[int, ...]
    order: tuple[int, ...]
    evaluations: tuple[int, int]

    @property
    def barriers(self) -> Tensor:
        """Q in the middle over the mean of the ends, ``[K, K]``; NaN where it was not measured."""
        own = torch.tensor(self.q, dtype=torch.float64)
        return self.middle - (own[:, None] + own[None, :]) / 2

    def verdict(self, labels: Sequence[str]) -> list[str]:
        """In plain words."""
        told = []
        main = self.basins[0]
        for i in self.poor:
            told.append(
                f"{labels[i]} is far worse by itself: {self.metric} {self.q[i]:.3g}, the best has {min(self.q):.3g}."
            )
        for basin in self.basins[1:]:
            if set(basin) <= set(self.poor):
                continue
            between = self.barriers[list(basin)][:, list(main)]
            known = between[between.isfinite()]
            height = (
                f"a barrier of {float(known.min()):.3g} in {self.metric} at the midpoint"
                if len(known)
                else ("no finite value at the midpoint")
            )
            names = " and ".join(", ".join(labels[i] for i in part) for part in (basin[:-1], basin[-1:]) if part)
            verb = "lies" if len(basin) == 1 else "lie"
            told.append(f"{names} {verb} outside the basin of the other {len(main)}: {height}.")
        best = labels[self.order[0]] if self.order else None
        if best is not None and len(main) > 1:
            told.append(f"{len(main)} of {len(self.q)} lie in one basin; the best of them is {best}.")
        return told


def find_basins(
    checkpoints: Sequence[Source | WeightsFile],
    evaluator: Evaluator,
    *,
    budget: int | None = None,
    tolerance: float | None = None,
    recalibrate: bool = False,
    progress: Progress = silent,
) -> Basins:
    """Evaluate networks, and the middles between them, and say which lie together.

    The best is compared with all others first; those apart from it, in order of their score, with one another; what
    remains of the budget goes to the other pairs. Then, best first, each joins the basin to whose members its barriers
    are lowest in the median, if that is none, or begins another.

    Args:
        checkpoints: K networks that can be averaged.
        evaluator: Judges weights; a metric that is maximised is taken as 1 minus it.
        budget: Evaluations at most, 2K − 1 or more; None: 4K, which is all pairs of seven networks.
        tolerance: Barriers up to this count as none; None: a tenth of the median Q of the networks.
        recalibrate: Estimate BatchNorm's statistics anew for each, where training estimated them.
        progress: Shows how far it is.

    Raises:
        UnsupportedSetup: Fewer than two networks, or a value is out of range.
        IncompatibleIngredients: Their tensors differ.
    """
    opened = [open_checkpoint(item).without(evaluator.ignored()) for item in checkpoints]
    count = len(opened)
    pairs = count * (count - 1) // 2
    budget = min(4 * count if budget is None else budget, count + pairs)
    if count < 2 or budget < min(2 * count - 1, count + pairs) or (tolerance is not None and tolerance < 0):
        raise UnsupportedSetup(
            f"find_basins: got {count} checkpoints, budget={budget}, tolerance={tolerance}; expected two checkpoints "
            f"or more, a budget of 2K − 1 ({2 * count - 1}) evaluations or more, and a tolerance of 0 or more."
        )
    judge = _Judge(evaluator, recalibrate)
    q = [judge(file) for file in progress(opened, "single networks", count)]
    finite = sorted(value for value in q if math.isfinite(value))
    if tolerance is None:
        tolerance = 0.1 * finite[len(finite) // 2] if finite else 0.0
    middle = torch.full((count, count), math.nan, dtype=torch.float64)
    order = sorted(range(count), key=lambda i: q[i])

    usual = finite[len(finite) // 2] if finite else math.inf
    poor = tuple(i for i in range(count) if not q[i] <= max(3 * usual, q[order[0]] + 10 * tolerance))

    def linked(i: int, j: int) -> bool:
        value = float(middle[i, j])
        if i in poor or j in poor:
            return False
        return math.isfinite(value) and value - (q[i] + q[j]) / 2 <= tolerance

    for i, j in progress(
        _pairs([i for i in order if i not in poor], linked, budget - count), "midpoints", budget - count
    ):
        middle[i, j] = middle[j, i] = judge([opened[i], opened[j]])
    parts = _grouped(order, poor, middle, q, tolerance)
    main = sorted(parts[0], key=lambda i: q[i])
    name = evaluator.metric if evaluator.mode == "min" else f"1 − {evaluator.metric}"
    done = judge.evaluations, count + pairs
    return Basins(tuple(q), middle, name, tolerance, tuple(map(tuple, parts)), poor, tuple(main), done)


def _grouped(
    order: Sequence[int], poor: Sequence[int], middle: Tensor, q: Sequence[float], tolerance: float
) -> list[list[int]]:
    """Basins, the largest first; of equal ones that with the best network."""
    parts: list[list[int]] = []
    for i in order:
        heights = []
        for part in parts if i not in poor else ():
            known = [float(middle[i, j]) - (q[i] + q[j]) / 2 for j in part if not math.isnan(float(middle[i, j]))]
            heights.append((statistics.median(known) if known else math.inf, len(heights)))
        height, which = min(heights, default=(math.inf, 0))
        if height <= tolerance:
            parts[which].append(i)
        else:
            parts.append([i])
    return sorted((sorted(part) for part in parts), key=lambda part: (-len(part), min(order.index(i) for i in part)))


def _pairs(order: Sequence[int], linked: Callable[[int, int], bool], count: int) -> Iterator[Pair]:
    """Pairs to measure, in an order that depends on what was measured before."""
    asked: set[Pair] = set()

    def new(pairs: Iterable[Pair]) -> Iterator[Pair]:
        for i, j in pairs:
            pair = (min(i, j), max(i, j))
            if len(asked) < count and pair not in asked:
                asked.add(pair)
                yield pair

    hub = order[0] if order else -1
    yield from new((hub, other) for other in order[1:])
    apart = [i for i in order[1:] if not linked(hub, i)]
    yield from new((i, j) for a, i in enumerate(apart) for j in apart[a + 1 :])
    yield from new((i, j) for a, i in enumerate(order) for j in order[a + 1 :])


class _Judge:
    """Q of weights, or of the middle between two; infinite where it is not finite."""

    def __init__(self, evaluator: Evaluator, recalibrate: bool) -> None:
        self.evaluator, self.recalibrate, self.evaluations = evaluator, recalibrate, 0

    def __call__(self, weights: WeightsFile | Sequence[WeightsFile]) -> float:
        """Evaluate."""
        self.evaluations += 1
        evaluator = self.evaluator
        try:
            held = self._formed(weights)
            value = evaluator.natural(evaluator.score(held))
        except (NonFiniteScore, NonFiniteWeights):
            return math.inf
        return value if evaluator.mode == "min" else 1 - value

    def _formed(self, weights: WeightsFile | Sequence[WeightsFile]) -> Weights:
        held: Weights = weights
        slot = self.evaluator.slot()
        if not isinstance(weights, WeightsFile):
            formed = combine(weights, [0.5, 0.5], slot)
            held = slot or formed
        if self.recalibrate:
            statistics = self.evaluator.recalibrate(held)
            held = slot or {**held, **statistics}
        return held
