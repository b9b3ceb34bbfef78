"""Distances, angles and inner products between checkpoints, streamed from their files."""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_soup.errors import IncompatibleIngredients
from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights.chunks import CHUNK_BYTES
from lightning_soup.weights.compatibility import check_compatible
from lightning_soup.weights.data_file import hold
from lightning_soup.weights.stored_tensor import Scratch, StoredTensor
from lightning_soup.weights.weights_file import Source, WeightsFile, open_checkpoint


def inner_products(checkpoints: Sequence[Source | WeightsFile], direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute ⟨G, θᵢ⟩ for each tensor: what the gradient of a loss at Σ cᵢ·θᵢ says about each coefficient.

    Args:
        checkpoints: K checkpoints.
        direction: Tensors G by name, for example a gradient; names that it lacks are left out.

    Returns:
        By tensor name, K inner products in float64.

    Raises:
        IncompatibleIngredients: A checkpoint lacks a tensor of the direction, or has it in another shape.
    """
    opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    for file in opened:
        for name, tensor in direction.items():
            if name not in file:
                raise IncompatibleIngredients(f"{name!r} is missing in {file.label}, but is in the direction.")
            spec = file.tensors[name].spec
            if spec.shape != tensor.shape:
                raise IncompatibleIngredients(
                    f"{name!r} is {spec} in {file.label}, but the direction has {list(tensor.shape)}."
                )
    found = {}
    with single_threaded_torch():
        for name, tensor in direction.items():
            flat = tensor.detach().reshape(-1).cpu()
            flat = flat if flat.dtype == torch.float64 else flat.float()
            totals = _dots([file.tensors[name] for file in opened], flat)
            found[name] = torch.tensor(totals, dtype=torch.float64, device="cpu")
    return found


def _dots(rows: Sequence[StoredTensor], flat: Tensor) -> list[float]:
    """Each row's inner product with one tensor, a chunk of which stays in the cache while all rows are read."""
    totals, scratch = [0.0] * len(rows), Scratch(CHUNK_BYTES)
    step = CHUNK_BYTES // max(row.spec.dtype.itemsize for row in rows)
    with hold(file for row in rows for file in row.files):
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            for i, row in enumerate(rows):
                chunk, _ = row.read(start, start + len(part), scratch)
                totals[i] += float(torch.dot(chunk.to(part.dtype), part))
    return totals


def differing(checkpoints: Sequence[Source | WeightsFile]) -> tuple[str, ...]:
    """The tensors that are not the same in all checkpoints; frozen ones are, and need not be added to be averaged.

    Args:
        checkpoints: With the same tensors. One that differs is read as far as its first difference.
    """
    first, *others = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    with single_threaded_torch():
        return tuple(
            name for name, stored in first.tensors.items() if not all(_same(stored, o.tensors[name]) for o in others)
        )


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    if a.spec != b.spec:
        return False
    with hold(b.files):
        scratch = Scratch(CHUNK_BYTES)
        return all(torch.equal(x, b.read(start, start + len(x), scratch)[0]) for start, x in chunks_of(a))


def relative_distance(
    a: Source | WeightsFile, b: Source | WeightsFile, *, scale: float = 1.0, sample: int = 16384
) -> float:
    """Estimate ‖a − s·b‖ / ‖s·b‖ over all floating tensors.

    Args:
        a: A checkpoint.
        b: The one to measure from.
        scale: The factor s; 1/n where ``b`` is a sum of n models.
        sample: Elements to read of each tensor at most, spread over it; each tensor counts with its full
            size.

    Raises:
        IncompatibleIngredients: They hold other tensors.
    """
    difference, norm = 0.0, 0.0
    a, b = open_checkpoint(a), open_checkpoint(b)
    check_compatible([a, b])
    with single_threaded_torch():
        for name, stored in b.tensors.items():
            if not stored.spec.dtype.is_floating_point or not stored.spec.numel:
                continue
            x, y = sampled(a.tensors[name], sample), sampled(stored, sample) * scale
            y = torch.nan_to_num(y, posinf=0.0, neginf=0.0)  # masks hold infinities in both
            x = torch.nan_to_num(x, posinf=0.0, neginf=0.0)
            weight = stored.spec.numel / len(y)
            norm += weight * float(y.square().sum())
            difference += weight * float((x - y).square().sum())
    if not norm:
        return math.inf if difference else 0.0
    return (difference / norm) ** 0.5


def cosines(
    checkpoints: Sequence[Source | WeightsFile], names: Sequence[str], *, sample: int = 16384
) -> dict[str, Tensor]:
    """Compute the cosine between every two checkpoints, tensor by tensor.

    Networks trained from one start stay at small angles; matrices of independently initialised ones are
    almost orthogonal. A sample is enough to tell: its error is about ``sample ** -0.5``.

    Args:
        checkpoints: K checkpoints.
        names: Tensors to compare.
        sample: Elements to read of each tensor at most, spread over it.

    Returns:
        By tensor name, a [K, K] float64 tensor. A tensor that is all zero has cosine 0 with every other.
    """
    opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    found = {}
    with single_threaded_torch():
        for name in names:
            rows_KN = torch.stack([sampled(file.tensors[name], sample) for file in opened])
            unit_KN = torch.nn.functional.normalize(rows_KN, dim=1)
            found[name] = unit_KN @ unit_KN.T
    return found


def sampled(stored: StoredTensor, sample: int) -> Tensor:
    """Up to ``sample`` elements, in float64: 16 runs, evenly spread, so that few pages are read."""
    total = stored.spec.numel
    run = total if total <= sample else max(sample // 16, 1)
    starts = [0] if total <= sample else [round(i * (total - run) / 15) for i in range(16)]
    scratch = Scratch(run * stored.spec.dtype.itemsize)
    return torch.cat([stored.read(start, start + run, scratch)[0].double() for start in starts])


def chunks_of(stored: StoredTensor) -> Iterator[tuple[int, Tensor]]:
    """All elements in turn, with the number of the first of each part; a part is overwritten by the next."""
    scratch = Scratch(CHUNK_BYTES)
    step = CHUNK_BYTES // stored.spec.dtype.itemsize
    with hold(stored.files):
        for start in range(0, stored.spec.numel, step):
            yield start, stored.read(start, min(start + step, stored.spec.numel), scratch)[0]
