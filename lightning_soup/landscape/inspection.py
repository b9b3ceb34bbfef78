"""Whether checkpoints can be averaged, and which, from their weights alone."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_soup.errors import IncompatibleIngredients, UnsupportedSetup
from lightning_soup.landscape.weight_statistics import WeightStatistics, weight_statistics
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.compatibility import check_compatible
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

__all__ = ["Inspection", "inspect_weights"]

_RELATED = 0.5  # cosine of weight matrices; fine-tunes of one start lie above 0.9, independent ones near 0
_FAR = 3.0  # times the usual distance to the others of its group


@dataclass(frozen=True)
class Inspection:
    """What the weights say.

    Attributes:
        labels: Names of the K checkpoints.
        incompatible: Those with other tensors than most, and why. They take no part in what follows.
        broken: Those with a NaN or an infinity, and in which tensor first. Likewise.
        compared: The numbers of those that remain.
        statistics: Of those; None where fewer than two remain.
        groups: Their numbers by common start, the largest group first.
        far: Those that are far from the rest of their group, and how many times the usual distance.
        duplicates: Pairs with the same weights.
    """

    labels: tuple[str, ...]
    incompatible: dict[int, str]
    broken: dict[int, str]
    compared: tuple[int, ...]
    statistics: WeightStatistics | None
    groups: tuple[tuple[int, ...], ...]
    far: dict[int, float]
    duplicates: tuple[tuple[int, int], ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def hopeless(self) -> tuple[int, ...]:
        """Those that no soup of the others should hold: incompatible, broken, from another start, or far away."""
        others = [i for group in self.groups[1:] for i in group]
        return tuple(sorted({*self.incompatible, *self.broken, *others, *self.far}))

    def verdict(self) -> list[str]:
        """In plain words, one sentence a finding."""
        told = [f"{self.labels[i]} cannot be averaged with the others: {why}" for i, why in self.incompatible.items()]
        told += [f"{self.labels[i]} is broken: {why}" for i, why in self.broken.items()]
        if len(self.compared) < 2:
            return [*told, "There are not two that could be averaged."]
        alone = tuple(group[0] for group in self.groups[1:] if len(group) == 1)
        for group in (*(group for group in self.groups[1:] if len(group) > 1), *([alone] if alone else [])):
            verb = "comes" if len(group) == 1 else "come" if group is not alone else "each come"
            told.append(
                f"{self._named(group)} {verb} from another start than the other {len(self.groups[0])}, or went so far "
                "that nothing is left of it: the weight matrices have no more in common than by chance, and an average "
                "would be of no use."
            )
        for i, times in self.far.items():
            told.append(
                f"{self.labels[i]} lies {times:.1f} times as far from the others as is usual among them: a far larger "
                "learning rate, or a training that went astray. It is a poor ingredient unless validation says else."
            )
        told += [
            f"{self.labels[j]} and {self.labels[i]} hold the same weights: one is enough." for i, j in self.duplicates
        ]
        good = [i for i in range(len(self.labels)) if i not in self.hopeless]
        if len(good) >= 2:
            rest = "All" if len(good) == len(self.labels) else self._named(good)
            told.append(f"{rest} can be averaged, as far as weights can tell.")
        else:
            told.append("No two of them should be averaged.")
        return told

    def _named(self, numbers: Iterable[int]) -> str:
        names = [self.labels[i] for i in numbers]
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def inspect_weights(
    checkpoints: Sequence[Source | WeightsFile],
    start: Source | WeightsFile | None = None,
    *,
    labels: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Inspection:
    """Look at checkpoints before anything is evaluated; each file is read once.

    - *Incompatible* are those with other tensors than most of them.
    - *From another start* are those whose weight matrices have a median cosine below 0.5 with all of the largest group.
    - *Far* are those whose median distance to the rest of their group is more than three times the group's usual one.

    Args:
        checkpoints: Two or more.
        start: What they all started from, if it is there still: then the angles of the updates are known too.
        labels: Names; by default those of the files.
        progress: Shows how far it is.

    Raises:
        UnsupportedSetup: Fewer than two checkpoints.
        UnreadableCheckpoint: A file cannot be opened.
    """
    opened = [open_checkpoint(item) for item in checkpoints]
    if len(opened) < 2:
        raise UnsupportedSetup(f"inspect compares checkpoints, and got {len(opened)}. Give two or more.")
    names = tuple(labels or _distinct([file.label for file in opened]))
    incompatible = _incompatible(opened)
    compared = [i for i in range(len(opened)) if i not in incompatible]
    broken: dict[int, str] = {}
    found = None
    if len(compared) >= 2:
        found = weight_statistics([opened[i] for i in compared], start, progress=progress)
        for place, tensor in found.gram.broken:
            broken.setdefault(compared[place], f"{tensor} holds NaN or an infinity: its training diverged.")
    whole = [place for place, i in enumerate(compared) if i not in broken]
    groups, far, duplicates = (), {}, ()
    if found is not None and len(whole) >= 2:
        cosines = _cosines(found, opened[compared[0]])
        parts = components(whole, lambda i, j: float(cosines[i, j]) >= _RELATED)
        far = {compared[i]: times for part in parts for i, times in outliers(found.distances, part).items()}
        groups = tuple(tuple(compared[i] for i in part) for part in parts)
        same = [(i, j) for a, i in enumerate(whole) for j in whole[a + 1 :] if not found.distances[i, j]]
        duplicates = tuple((compared[i], compared[j]) for i, j in same)
    return Inspection(names, incompatible, broken, tuple(compared), found, groups, far, duplicates)


def components(items: Sequence[int], linked: Callable[[int, int], bool]) -> list[list[int]]:
    """Connected components, the largest first; of equal ones that with the first item."""
    parts: list[list[int]] = []
    for item in items:
        near = [part for part in parts if any(linked(item, other) for other in part)]
        joined = sorted([item, *(other for part in near for other in part)])
        parts = [part for part in parts if part not in near] + [joined]
    return sorted(parts, key=lambda part: (-len(part), part[0]))


def outliers(distances: Tensor, group: Sequence[int], far: float = _FAR) -> dict[int, float]:
    """Who is far from the rest of a group: how many times the median of all members' median distances.

    Groups of fewer than four have no usual distance.
    """
    if len(group) < 4:
        return {}
    typical = {i: statistics.median(float(distances[i, j]) for j in group if j != i) for i in group}
    usual = statistics.median(typical.values())
    if usual <= 0:
        return {}
    return {i: value / usual for i, value in typical.items() if value > far * usual}


def _incompatible(opened: Sequence[WeightsFile]) -> dict[int, str]:
    """Those with other tensors than the largest set of like ones."""
    kinds: dict[tuple, list[int]] = {}
    for i, file in enumerate(opened):
        signature = tuple(sorted((n, tuple(s.shape), s.dtype.is_floating_point) for n, s in file.specs.items()))
        kinds.setdefault(signature, []).append(i)
    most = max(kinds.values(), key=len)
    found = {}
    for i in range(len(opened)):
        if i not in most:
            try:
                check_compatible([opened[most[0]], opened[i]])
            except IncompatibleIngredients as error:
                message = str(error)
                cause = message.partition("Likely cause: ")[2].partition("\n")[0]
                found[i] = cause or message.partition("\n")[2].strip().partition("\n")[0]
    return found


def _cosines(found: WeightStatistics, example: WeightsFile) -> Tensor:
    """The median over weight matrices of the cosines between weights, ``[K, K]``."""
    specs = example.specs
    matrices = [name for name in found.gram.products if specs[name].numel > max(specs[name].shape, default=1)]
    rows = []
    for name in matrices or list(found.gram.products):
        squares, products = found.gram.squares[name], found.gram.products[name]
        own = products.diagonal()
        apart = own[:, None] + own[None, :] - 2 * products
        scale = (squares[:, None] * squares[None, :]).clamp(min=0).sqrt()
        cosine = (squares[:, None] + squares[None, :] - apart) / 2 / scale.clamp(min=1e-300)
        rows.append(torch.where(scale > 0, cosine, math.nan))
    return torch.stack(rows).nanmedian(0).values


def _distinct(labels: Sequence[str]) -> list[str]:
    """File names, with numbers where some are the same."""
    return [
        f"{label} ({labels[:i].count(label) + 1})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]
