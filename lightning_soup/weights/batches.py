"""The arithmetic of one chunk of several combinations of the same checkpoints.

Forming θ = Σᵢ cᵢ·θᵢ is bound by reading the θᵢ. So B combinations of K checkpoints are formed in one read, as the
product of their coefficients ``[B, K]`` and the chunks of the checkpoints ``[K, N]``, small enough for the cache.

Shape suffixes: B combinations, K checkpoints, N elements of the chunk.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_soup.weights.chunks import CHUNK_BYTES, Buffers, Part, Term, combine_chunk
from lightning_soup.weights.compatibility import kind
from lightning_soup.weights.stored_tensor import Scratch, TensorSpec

# Of all rows, read and written, of a chunk. 2 MiB take 1.2 times as long, 1 MiB 1.8 times: for 16 combinations of 20
# checkpoints a row is 29,000 elements, long enough for the product, and the whole stays in the cache that cores share.
_BATCH_BYTES = 4 * CHUNK_BYTES
_HEAD = 16  # elements that are compared before a whole chunk is, to see whether all ingredients hold the same values


@dataclass(frozen=True)
class Batch:
    """One tensor of B results, and what they are made of.

    Attributes:
        parts: The tensor in each of the results; all of the same type and shape, and from the same checkpoints.
        place: Where the results lie, if they are rows ``[B, elements]`` of one matrix: they are formed there.
    """

    parts: tuple[Part, ...]
    place: Tensor | None = None

    @property
    def spec(self) -> TensorSpec:
        """Its type and shape in each of the results."""
        return self.parts[0].spec

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The tensors that are read, each once; K of them. The coefficients here are those of one of the results."""
        found = {term.place: term for part in self.parts for term in part.terms}
        return tuple(found[place] for place in sorted(found))

    @cached_property
    def accumulator(self) -> torch.dtype:
        """The type in which all are added: the widest of them, where one leaves out the checkpoint that is wider."""
        return max((part.accumulator for part in self.parts), key=lambda dtype: dtype.itemsize)

    @property
    def step(self) -> int:
        """Elements of a chunk."""
        rows = len(self.terms) + len(self.parts)
        fitting = _BATCH_BYTES // (rows * self.accumulator.itemsize)
        return max(min(fitting, *(part.step for part in self.parts)), 1)

    @cached_property
    def c_BK(self) -> Tensor:
        """The coefficients."""
        rows = [{term.place: term.coefficient for term in part.terms} for part in self.parts]
        values = [[row.get(term.place, 0.0) for term in self.terms] for row in rows]
        return torch.tensor(values, dtype=self.accumulator, device="cpu")


class BatchBuffers(threading.local):
    """Buffers of one thread: the rows that are read, the rows of the results, and those of a single combination."""

    def __init__(self) -> None:
        self.single = Buffers()
        self.results = Scratch(_BATCH_BYTES)
        self.other = Scratch(CHUNK_BYTES)
        self._rows: dict[tuple[int, torch.dtype, int], tuple[Tensor, list[Scratch]]] = {}
        self._raw = torch.empty(_BATCH_BYTES, dtype=torch.uint8, device="cpu")

    def rows(self, count: int, dtype: torch.dtype, length: int) -> tuple[Tensor, list[Scratch]]:
        """A matrix of ``count`` rows of ``length`` elements, and each row as a buffer that can be read into."""
        key = (count, dtype, length)
        if key not in self._rows:
            if len(self._rows) >= 64:  # most chunks are full ones, so few sizes repeat
                self._rows.clear()
            raw = self._raw[: count * length * dtype.itemsize]
            self._rows[key] = raw.view(dtype).view(count, length), [Scratch(row) for row in raw.view(count, -1)]
        return self._rows[key]


def combine_batch(batch: Batch, start: int, stop: int, buffers: BatchBuffers) -> Sequence[Tensor] | None:
    """Elements ``start`` to ``stop`` of each combination, in the type of the result; ``None`` if they are in place.

    They equal those of :func:`.combine_chunk` within the rounding of the accumulator; where an ingredient holds
    something that is no ordinary number, or all ingredients hold the same, that function forms them.

    Raises:
        IncompatibleIngredients: As :func:`.combine_chunk` does.
        NonFiniteWeights: The same.
    """
    dtype = batch.spec.dtype
    if kind(dtype) == "floating" and dtype.itemsize > 1 and batch.terms:
        x_KN = _read(batch, start, stop, buffers)
        if x_KN is not None:
            count, direct = len(batch.parts), batch.place is not None and dtype == x_KN.dtype
            if direct:
                out_BN = batch.place[:, start:stop]
            else:
                out_BN = buffers.results.view(x_KN.dtype, count * (stop - start))[0].view(count, -1)
            values = torch.mm(batch.c_BK, x_KN, out=out_BN).to(dtype)
            checksum = values.sum(dtype=x_KN.dtype).item()
            if checksum - checksum == 0:  # a sum over finite numbers may overflow, and is looked at closer then
                return None if direct else values
    return [combine_chunk(part, start, stop, buffers.single).clone() for part in batch.parts]


def _read(batch: Batch, start: int, stop: int, buffers: BatchBuffers) -> Tensor | None:
    """The chunk of each checkpoint ``[K, N]``; ``None`` where all hold the same."""
    x_KN, scratches = buffers.rows(len(batch.terms), batch.accumulator, stop - start)
    for row, scratch, term in zip(x_KN, scratches, batch.terms, strict=True):
        term.tensor.copy(start, row, scratch if term.tensor.spec.dtype == row.dtype else buffers.other)
    heads_equal = bool((x_KN[:, :_HEAD] == x_KN[:1, :_HEAD]).all())
    return None if heads_equal and bool((x_KN == x_KN[:1]).all()) else x_KN
