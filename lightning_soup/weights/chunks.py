"""The arithmetic of one chunk: some thousand elements of one tensor of the result.

Symbols: θ = Σᵢ cᵢ·θᵢ, over the checkpoints i whose coefficient cᵢ is not 0.
"""

import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_soup.errors import IncompatibleIngredients, NonFiniteWeights
from lightning_soup.weights.compatibility import kind
from lightning_soup.weights.stored_tensor import Scratch, StoredTensor, TensorSpec

# Of the accumulator. Larger chunks cost less Python, smaller ones fit the level-2 cache: half a MiB takes 1.2
# times as long, 4 MiB 1.1 times (8 ViT-B, one thread of a processor with 1 MiB of level-2 cache).
CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 64  # compared before a whole chunk is, to see whether all ingredients hold the same values


class Term(NamedTuple):
    """One cᵢ·θᵢ: a tensor, its coefficient, the label of its checkpoint, and the number i of that."""

    tensor: StoredTensor
    coefficient: float
    label: str
    place: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the result (under several names where it is tied) and what it is made of.

    Attributes:
        names: Its names.
        spec: Its type and shape as it is written.
        terms: What is added, at least one.
        accumulator: The type in which floating tensors are added.
        checked: Whether NaN and infinities are refused.
    """

    names: tuple[str, ...]
    spec: TensorSpec
    terms: tuple[Term, ...]
    accumulator: torch.dtype
    checked: bool = True

    @property
    def step(self) -> int:
        """Elements of a chunk."""
        widths = (term.tensor.spec.dtype.itemsize for term in self.terms)
        return CHUNK_BYTES // max(*widths, self.accumulator.itemsize, self.spec.dtype.itemsize)


class Buffers(threading.local):
    """Buffers of one thread: the first ingredient's chunk, the next one's, a wider copy, and the sum."""

    def __init__(self) -> None:
        self.first, self.next, self.wide, self.sum = (Scratch(CHUNK_BYTES) for _ in range(4))


def combine_chunk(part: Part, start: int, stop: int, buffers: Buffers) -> Tensor:
    """Elements ``start`` to ``stop`` of the combination, in the type of the result.

    Raises:
        IncompatibleIngredients: An integer or bool tensor differs.
        NonFiniteWeights: A NaN, an infinity that not all ingredients share, or an overflow.
    """
    if kind(part.spec.dtype) in ("integer", "bool"):
        return _agreed(part, start, stop, buffers)
    (source, coefficient, *_), *others = part.terms
    first, first_data = source.read(start, stop, buffers.first)
    if not others and coefficient == 1.0:
        return _rounded(part, first, start, stop)
    total, _ = buffers.sum.view(part.accumulator, stop - start)
    if first.dtype == total.dtype:
        torch.mul(first, coefficient, out=total)
    else:
        total.copy_(first).mul_(coefficient)
    head = first_data[:_HEAD_BYTES]
    equal = abs(sum(term.coefficient for term in part.terms) - 1.0) < _ONE
    for other, other_coefficient, *_ in others:
        chunk, data = other.read(start, stop, buffers.next)
        if equal:
            equal = data[:_HEAD_BYTES] == head and _same_bytes(chunk, first)
        if chunk.dtype != total.dtype:
            chunk = buffers.wide.view(part.accumulator, stop - start)[0].copy_(chunk)
        total.add_(chunk, alpha=other_coefficient)
    # What all ingredients share, such as frozen layers, stays exactly as it is.
    return _rounded(part, first if equal else total, start, stop)


_ONE = 1e-6  # coefficients from a float32 softmax add up to 1 within this


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _agreed(part: Part, start: int, stop: int, buffers: Buffers) -> Tensor:
    """Integers and bools are not averaged: all agree, or they are counters and the largest is taken."""
    (source, _, label, *_), *others = part.terms
    values, _ = source.read(start, stop, buffers.first)
    for other, _, other_label, *_ in others:
        chunk, _ = other.read(start, stop, buffers.next)
        if _same_bytes(chunk, values):
            continue
        a, b = values.to(torch.int64), chunk.to(torch.int64)
        if part.names[0].endswith("num_batches_tracked"):
            values = torch.maximum(a, b)
        elif not torch.equal(a, b):
            raise IncompatibleIngredients(
                f"the {kind(part.spec.dtype)} tensor {part.names[0]!r} ({part.spec}) differs between {label} "
                f"and {other_label}. Such values cannot be averaged; give all ingredients the same ones, or "
                "leave the tensor out of the files."
            )
    result = values.to(part.spec.dtype)
    if result.dtype != values.dtype and not torch.equal(result.to(torch.int64), values.to(torch.int64)):
        raise IncompatibleIngredients(
            f"the tensor {part.names[0]!r} holds numbers that do not fit {part.spec}, the type of the result."
        )
    return result


# ------------------------------------------------------------------------------------------------------
# finite or not


def _rounded(part: Part, total: Tensor, start: int, stop: int) -> Tensor:
    """Round to the type of the result, and refuse NaN and infinities.

    Only infinities that all ingredients share at their place, a mask, stay.
    """
    values = total.to(part.spec.dtype)
    if not part.checked:
        return values
    if values.dtype.itemsize == 1 and values.dtype != total.dtype:  # some of these types saturate instead
        limit = torch.finfo(values.dtype).max
        if ((total.abs() > limit) & torch.isfinite(total)).any():
            raise _overflow(part)
    probe = values if values.dtype.itemsize >= 4 else values.float()
    checksum = probe.sum().item()
    if checksum - checksum == 0:  # one pass for all; a sum of finite numbers may overflow, so look closer if it is not
        return values
    finite = torch.isfinite(probe)
    if finite.all():
        return values
    chunks = [_read_again(term.tensor, start, stop).to(part.accumulator) for term in part.terms]
    mask = torch.isinf(chunks[0])
    for chunk in chunks[1:]:
        mask &= chunk == chunks[0]
    if (finite | mask).all():
        return torch.where(mask, chunks[0].to(probe.dtype), probe).to(values.dtype)
    where = f"tensor {part.names[0]!r} ({part.spec})"
    for term, chunk in zip(part.terms, chunks, strict=True):
        wrong = ~torch.isfinite(chunk) & ~mask
        if wrong.any():
            what = "NaN" if torch.isnan(chunk[wrong]).any() else "an infinity"
            raise NonFiniteWeights(f"{term.label}: {where} holds {what}. Leave this checkpoint out or train it again.")
    raise _overflow(part)


def _overflow(part: Part) -> NonFiniteWeights:
    return NonFiniteWeights(
        f"tensor {part.names[0]!r} ({part.spec}): the combination overflows {part.spec.dtype} although every "
        "ingredient is finite. Use smaller coefficients or float32 ingredients."
    )


def _read_again(tensor: StoredTensor, start: int, stop: int) -> Tensor:
    return tensor.read(start, stop, Scratch((stop - start) * tensor.spec.dtype.itemsize))[0]
