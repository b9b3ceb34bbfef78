"""Where checkpoints are zero: whether pruned networks have one mask, which their average would keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights.geometry import chunks_of, sampled
from lightning_soup.weights.stored_tensor import StoredTensor
from lightning_soup.weights.weights_file import WeightsFile

_SPARSE = 0.05  # share of zeros from which a network counts as pruned; dense ones have next to none
_LOOKED_AT = 24  # matrices that are sampled, spread over the depth of the network
_SAMPLE = 1024  # elements of each
_WIDEST = 32  # M of the N:M that are looked for
_FEWEST = 256  # elements that are enough to know a pattern by
_PRUNED = 0.01  # share of zeros from which a matrix counts as pruned


@dataclass(frozen=True)
class Zeros:
    """What is not zero in the matrices of pruned networks.

    Attributes:
        matrices: Names of the tensors of two dimensions or more that are pruned in every checkpoint: a hundredth of
            them or more is zero. Position embeddings, say, and heads that were left out, are not among them.
        densities: Share of them that is not zero, by checkpoint.
        together: Share that is not zero in some checkpoint, and so in their average.
        apart: The first tensor that is zero at different places, if there is one.
    """

    matrices: tuple[str, ...]
    densities: tuple[float, ...]
    together: float
    apart: str | None


def compare_zeros(checkpoints: Sequence[WeightsFile]) -> Zeros | None:
    """Compare where pruned networks are zero, in one pass over them; ``None`` where some are not pruned.

    Whether they are is told from a sample, so dense networks are not read.
    """
    if not all(map(is_pruned, checkpoints)):
        return None
    specs = checkpoints[0].specs
    pruned, kept, together, apart = [], [0] * len(checkpoints), 0, None
    with single_threaded_torch():
        for name in _matrices(checkpoints[0]):
            counts, union, differs = _count([file.tensors[name] for file in checkpoints])
            if not specs[name].numel or max(counts) > (1 - _PRUNED) * specs[name].numel:
                continue
            pruned.append(name)
            kept, together = [a + b for a, b in zip(kept, counts, strict=True)], together + union
            apart = name if differs and apart is None else apart
    size = max(sum(specs[name].numel for name in pruned), 1)
    return Zeros(tuple(pruned), tuple(count / size for count in kept), together / size, apart)


def is_pruned(file: WeightsFile) -> bool:
    """Whether a twentieth of its matrices is zero, told from a sample."""
    specs, matrices = file.specs, _matrices(file)
    spread = matrices[:: max(1, len(matrices) // _LOOKED_AT)]
    with single_threaded_torch():
        shares = [float((sampled(file.tensors[n], _SAMPLE) == 0).double().mean()) for n in spread if specs[n].numel]
    begun = [share for share in shares if share < 1]  # a layer that is zero begins so, and was not trained yet
    return bool(begun) and sum(begun) / len(begun) >= _SPARSE


def pattern_of(file: WeightsFile, names: Sequence[str]) -> str | None:
    """The pattern in which some matrices are pruned: ``rows``, or N:M along their inputs; ``None``: it is neither.

    A pattern is one that nearly all of their zeros follow; there may be a few beside it. A few weights have none, as
    they may follow one by chance.
    """
    size, kept, in_rows = 0, 0, 0
    widths = [m for m in range(2, _WIDEST + 1) if all(file.specs[name].shape[1] % m == 0 for name in names)]
    most = dict.fromkeys(widths, 0)
    with single_threaded_torch():
        for name in names:
            mask = file[name] != 0
            size, kept = size + mask.numel(), kept + int(mask.count_nonzero())
            in_rows += int(mask.flatten(1).any(1).count_nonzero()) * mask[0].numel()
            for m in widths:
                groups = mask.movedim(1, -1).unflatten(-1, (-1, m))
                most[m] = max(most[m], int(groups.sum(-1).max()))
    if size < _FEWEST:
        return None
    if kept > (1 - _PRUNED) * in_rows:
        return "rows"
    found = (f"{n}:{m}" for m, n in most.items() if n < m and kept > (1 - _PRUNED) * size * n / m)
    return next(found, None)


def _matrices(file: WeightsFile) -> tuple[str, ...]:
    return tuple(n for n, spec in file.specs.items() if spec.dtype.is_floating_point and len(spec.shape) > 1)


def _count(tensors: Sequence[StoredTensor]) -> tuple[list[int], int, bool]:
    """How many elements are not zero: of each, and of all together; and whether they are at different places."""
    kept, together, differs = [0] * len(tensors), 0, False
    for parts in zip(*map(chunks_of, tensors), strict=True):
        masks = [values != 0 for _, values in parts]
        union = masks[0].clone()
        for number, mask in enumerate(masks):
            union |= mask
            kept[number] += int(mask.count_nonzero())
            differs = differs or not torch.equal(mask, masks[0])
        together += int(union.count_nonzero())
    return kept, together, differs
