"""Where checkpoints are zero: whether pruned networks have one mask, which their average would keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights.geometry import chunks_of, sampled
from lightning_soup.weights.weights_file import WeightsFile

_SPARSE = 0.05  # share of zeros from which a network counts as pruned; dense ones have next to none
_LOOKED_AT = 24  # matrices that are sampled, spread over the depth of the network
_SAMPLE = 1024  # elements of each


@dataclass(frozen=True)
class Zeros:
    """What is not zero in the matrices of pruned networks.

    Attributes:
        matrices: Names of the tensors of two dimensions or more.
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
    specs = checkpoints[0].specs
    matrices = tuple(name for name, spec in specs.items() if spec.dtype.is_floating_point and len(spec.shape) > 1)
    spread = matrices[:: max(1, len(matrices) // _LOOKED_AT)]
    with single_threaded_torch():
        for file in checkpoints:
            shares = [float((sampled(file.tensors[n], _SAMPLE) == 0).double().mean()) for n in spread if specs[n].numel]
            pruned = [share for share in shares if share < 1]  # a layer that is zero begins so, and was not trained yet
            if not pruned or sum(pruned) / len(pruned) < _SPARSE:
                return None
        kept, together, apart = [0] * len(checkpoints), 0, None
        for name in matrices:
            for parts in zip(*(chunks_of(file.tensors[name]) for file in checkpoints), strict=True):
                masks = [values != 0 for _, values in parts]
                union = masks[0].clone()
                for number, mask in enumerate(masks):
                    union |= mask
                    kept[number] += int(mask.count_nonzero())
                together += int(union.count_nonzero())
                if apart is None and any(not torch.equal(mask, masks[0]) for mask in masks[1:]):
                    apart = name
    size = sum(specs[name].numel for name in matrices)
    return Zeros(matrices, tuple(count / size for count in kept), together / size, apart)
