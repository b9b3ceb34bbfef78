"""Keeping the variance of weights in an average of unrelated models, which would fall to 1/N of it.

Shape suffixes: K models.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights.chunks import CHUNK_BYTES
from lightning_soup.weights.data_file import hold
from lightning_soup.weights.stored_tensor import Scratch, StoredTensor
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint

__all__ = ["Correction", "correctable", "corrections", "moments", "rescale_"]

_NO_VARIANCE = 1e-24  # relative to the target: what rounding leaves of a variance that is 0 (W and −W)


@dataclass(frozen=True)
class Correction:
    """M ← (M − μ)·s + μ for a tensor, or for each of several equal parts of its rows.

    Attributes:
        factors: s of each part.
        means: μ of each part.
    """

    factors: tuple[float, ...]
    means: tuple[float, ...]


def correctable(weights: WeightsFile, exclude: Sequence[str]) -> list[str]:
    """Names of the matrices (tensors of two dimensions or more), of tied ones the first, that no pattern fits."""
    again = {name for names in weights.ties for name in names[1:]}
    return [
        name
        for name, spec in weights.specs.items()
        if spec.dtype.is_floating_point and len(spec.shape) >= 2 and spec.numel >= 2 and name not in again
        if not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]


def corrections(
    models: Sequence[WeightsFile],
    average: Source | WeightsFile,
    shares: Sequence[float],
    names: Sequence[str],
    chunks: Mapping[str, int],
) -> dict[str, Correction]:
    """What brings the variance of an average back to T = Σᵢ tᵢ·Var(Wᵢ), its mean left as it is.

    Whether Var divides by n or n − 1 makes no difference, as the number of elements is the same everywhere. Where the
    average has no variance (W and −W), nothing can be brought back: s is 1.

    Args:
        models: K models W.
        average: M.
        shares: tᵢ, K.
        names: Tensors to correct.
        chunks: By pattern of names, how many equal parts of rows have a variance each: 3 for a fused ``qkv``.

    Raises:
        RecipeError: The rows of a tensor are no multiple of the number of parts, or a pattern fits nothing.
    """
    opened = open_checkpoint(average)
    parts = _parts(opened, names, chunks)
    used = [(share, model) for share, model in zip(shares, models, strict=True) if share != 0.0]
    found = {}
    for name in names:
        targets = [0.0] * parts[name]
        for share, model in used:
            for part, (_, variance) in enumerate(moments(model.tensors[name], parts[name])):
                targets[part] += share * variance
        own = list(moments(opened.tensors[name], parts[name]))
        factors = tuple(_factor(target, variance) for target, (_, variance) in zip(targets, own, strict=True))
        found[name] = Correction(factors, tuple(mean for mean, _ in own))
    return found


def rescale_(weights: Mapping[str, Tensor], corrected: Mapping[str, Correction]) -> None:
    """Correct tensors in place; computed in float64 and rounded once."""
    with torch.no_grad(), single_threaded_torch():
        for name, correction in corrected.items():
            rows = weights[name].chunk(len(correction.factors))
            for part, factor, mean in zip(rows, correction.factors, correction.means, strict=True):
                part.copy_((part.double() - mean) * factor + mean)


def moments(stored: StoredTensor, parts: int = 1) -> Iterator[tuple[float, float]]:
    """Mean and variance (over n) of each of several equal parts of a tensor's elements, in float64, streamed."""
    size = stored.spec.numel // parts
    step = CHUNK_BYTES // stored.spec.dtype.itemsize
    scratch = Scratch(CHUNK_BYTES)
    with single_threaded_torch(), hold(stored.files):
        for begin in range(0, size * parts, size):
            count, mean, squares = 0, 0.0, 0.0
            for start in range(begin, begin + size, step):
                chunk = stored.read(start, min(start + step, begin + size), scratch)[0].double()
                more, middle = len(chunk), float(chunk.mean())
                apart = middle - mean  # Chan's formula: sums of squares would cancel
                squares += float((chunk - middle).square().sum()) + apart**2 * count * more / (count + more)
                count += more
                mean += apart * more / count
            yield mean, squares / count


def _factor(target: float, variance: float) -> float:
    return math.sqrt(target / variance) if variance > _NO_VARIANCE * target else 1.0


def _parts(weights: WeightsFile, names: Sequence[str], chunks: Mapping[str, int]) -> dict[str, int]:
    found = dict.fromkeys(names, 1)
    for pattern, count in chunks.items():
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise RecipeError(f"chunks: the pattern {pattern!r} fits none of the {len(names)} tensors to correct.")
        for name in fitting:
            rows = weights.specs[name].shape[0]
            if count < 1 or rows % count:
                raise RecipeError(f"chunks: {name} has {rows} rows, which are not divided into {count} equal parts.")
            found[name] = count
    return found
