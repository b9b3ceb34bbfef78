"""The exact k-th smallest score of tens of millions, without sorting or copying them."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_soup.threads import one_thread

__all__ = ["above", "kth_smallest"]

_CHUNK = 1 << 17  # elements worked on at a time: a chunk and what is compared of it stay in the cache
_STRIDE = 257  # of the sample; odd, so that it does not run along the columns of a matrix
_MARGIN = 5.0  # half the width of the bracket, in standard deviations of a quantile of the sample
_FEW = 1 << 20  # candidates that are worth selecting among, instead of another pass
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_smallest(scores: Sequence[Tensor], k: int, absolute: bool = False) -> tuple[Tensor, int, int]:
    """The k-th smallest of all scores together, how many are smaller, and how many are equal.

    A bracket around it is estimated from a sample; one pass over the scores counts those below and collects those
    inside, among which it is selected. Where the sample misled, the bracket is moved and the pass repeated: the result
    is exact always, and takes no memory beyond the sample, a chunk and the candidates.

    Args:
        scores: Finite tensors of float64, float32 or 16 bits, which are compared as float32 unless one has 64 bits, and
            on the device of the first.
        k: 1 … their number.
        absolute: Take magnitudes. Else no score may be negative.

    Returns:
        The value, without dimensions, as float32 or float64; the number of scores below it, less than k; and of those
        equal to it, 1 or more.

    Raises:
        ValueError: k is out of range.
    """
    total = sum(score.numel() for score in scores)
    if not 1 <= k <= total:
        raise ValueError(f"k={k}: expected 1 … {total}.")
    flat = [score.detach().reshape(-1) for score in scores]
    wide = torch.float32
    for score in flat:
        wide = torch.promote_types(wide, score.dtype)
    with torch.no_grad(), one_thread(flat):
        sample = torch.cat([score[::_STRIDE].to(flat[0].device, wide) for score in flat])
        low, high = _bracket(sample.abs_() if absolute else sample, k / total)
        del sample
        return _search(lambda: _chunks(flat, wide, absolute), k, low, high)


def above(scores: Sequence[Tensor], value: Tensor, skipped: int, absolute: bool = False) -> list[Tensor]:
    """Where scores are above a value or equal to it, but for the first of these equals.

    Args:
        scores: As of :func:`kth_smallest`.
        value: As :func:`kth_smallest` gives it; its type is that of the comparison.
        skipped: How many of the equals are left out, in the order of tensors and of their elements.
        absolute: As of :func:`kth_smallest`.

    Returns:
        A contiguous boolean tensor for each, on its device.
    """
    places = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    limit = float(value)
    with torch.no_grad(), one_thread(scores):
        for score, place in zip(scores, places, strict=True):
            left = place.view(-1)
            for chunk in _chunks([score.detach().reshape(-1)], value.dtype, absolute):
                equals = _compare(chunk, limit, left[: len(chunk)])
                left[equals[skipped:]] = True
                skipped = max(skipped - len(equals), 0)
                left = left[len(chunk) :]
    return places


def _compare(chunk: Tensor, limit: float, larger: Tensor) -> Tensor:
    """Write where a chunk is larger; the places where it is equal."""
    if chunk.device.type != "cpu":
        torch.gt(chunk, limit, out=larger)
        return (chunk == limit).nonzero().squeeze(1)
    values = chunk.numpy()
    np.greater(values, limit, out=larger.numpy())
    return torch.from_numpy(np.flatnonzero(values == limit))


def _chunks(flat: Sequence[Tensor], wide: torch.dtype, absolute: bool) -> Iterator[Tensor]:
    """All scores in turn, in memory that is used again."""
    device, longest = flat[0].device, max(len(score) for score in flat)
    step = max(1, min(longest, _CHUNK) if device.type == "cpu" else longest)
    scratch = torch.empty(step, dtype=wide, device=device)
    for score in flat:
        for start in range(0, len(score), step):
            part = score[start : start + step]
            here = part.dtype == wide and part.device == device
            if absolute and here:
                yield torch.abs(part, out=scratch[: len(part)])
            elif not here:
                chunk = scratch[: len(part)].copy_(part)
                yield chunk.abs_() if absolute else chunk
            else:
                yield part


def _bracket(sample: Tensor, quantile: float) -> tuple[float, float]:
    """Two values between which the quantile very probably lies."""
    count = len(sample)
    margin = _MARGIN * (quantile * (1 - quantile) * count) ** 0.5
    below, above = int(quantile * count - margin), int(quantile * count + margin) + 1
    low = float(_kth(sample, below)) if below >= 1 else 0.0
    high = float(_kth(sample, above)) if above <= count else torch.finfo(sample.dtype).max
    return low, high


def _kth(values: Tensor, k: int) -> Tensor:
    """The k-th smallest; may reorder the values.

    Not by ``torch.kthvalue``: its places take memory, and a GPU refuses it where deterministic algorithms are wanted.
    """
    if values.device.type != "cpu":
        return values.sort().values[k - 1]
    values.numpy().partition(k - 1)
    return values[k - 1]


def _search(chunks: Callable[[], Iterator[Tensor]], k: int, low: float, high: float) -> tuple[Tensor, int, int]:
    """Narrow what is known, beginning with a guess, until few enough lie inside or all that do are equal."""
    dtype = next(chunks()).dtype
    least, most = 0, _bits(torch.finfo(dtype).max, dtype)  # between which the value lies for sure, as bits
    while True:
        below, inside, candidates = _collect(chunks(), low, high)
        if k <= below:
            most = _bits(low, dtype) - 1
        elif k > below + inside:
            least = _bits(high, dtype) + 1
        elif candidates is not None:
            value = _kth(candidates, k - below)
            return value, below + int((candidates < value).sum()), int((candidates == value).sum())
        elif low == high:
            return torch.tensor(low, dtype=dtype, device=next(chunks()).device), below, inside
        else:
            least, most = _bits(low, dtype), _bits(high, dtype)
        # Halve, in values that can be written: the lower half, down to a single value.
        low, high = _value(least, dtype), _value((least + most) // 2, dtype)


def _collect(chunks: Iterator[Tensor], low: float, high: float) -> tuple[int, int, Tensor | None]:
    """How many scores are below, how many between, and these unless they are too many."""
    below = inside = 0
    found: list[Tensor] | None = []
    for chunk in chunks:
        fewer, places = _split(chunk, low, high)
        below += fewer
        inside += len(places)
        if inside > _FEW:
            found = None
        if found is not None:
            found.append(chunk[places])
    return below, inside, None if found is None else torch.cat(found)


def _split(chunk: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """How many are below, and the places of those between."""
    if chunk.device.type != "cpu":
        smaller = chunk < low
        return int(smaller.sum()), (chunk <= high).logical_xor_(smaller).nonzero().squeeze(1)
    values = chunk.numpy()  # whose comparisons are four times faster than torch's on one thread
    smaller = values < low
    places = np.flatnonzero((values <= high) ^ smaller)
    return int(np.count_nonzero(smaller)), torch.from_numpy(places)


def _bits(value: float, dtype: torch.dtype) -> int:
    """A number in which non-negative floats are ordered as themselves, without gaps."""
    return int(torch.tensor(value, dtype=dtype).view(_INTEGERS[dtype]))


def _value(bits: int, dtype: torch.dtype) -> float:
    return float(torch.tensor(bits, dtype=_INTEGERS[dtype]).view(dtype))
