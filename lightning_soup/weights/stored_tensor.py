"""Tensors where they lie: in a file (opened, mapped and read only when asked) or in memory.

Every format reader ends in these classes, so the kernel in :mod:`.combine` reads any checkpoint in the
same way: a run of elements at a time, into a buffer that stays in the processor's cache.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_soup.weights.data_file import DataFile, hold


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What is known of a tensor without reading its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-dimensional tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class Scratch:
    """A buffer that is read into again and again, seen as elements of any type.

    Args:
        room: Bytes; or memory that is there already, of type uint8.
    """

    def __init__(self, room: int | Tensor) -> None:
        self._raw = torch.empty(room, dtype=torch.uint8, device="cpu") if isinstance(room, int) else room
        self._views: dict[tuple[torch.dtype, int], tuple[Tensor, memoryview]] = {}

    def view(self, dtype: torch.dtype, count: int) -> tuple[Tensor, memoryview]:
        """The first ``count`` elements of a type, as a tensor and as bytes."""
        found = self._views.get((dtype, count))
        if found is None:
            if len(self._views) >= 64:  # most chunks are full ones, so few sizes repeat
                self._views.clear()
            raw = self._raw[: count * dtype.itemsize]
            found = self._views[dtype, count] = raw.view(dtype), raw.numpy().data
        return found


class FileTensor:
    """A tensor at rest in a file.

    Args:
        file: The file that holds the data.
        spec: Element type and shape.
        offset: Byte at which element 0 of the tensor lies.
        stride: Strides in elements where the data is not row-major and contiguous.
    """

    __slots__ = ("file", "offset", "spec", "stride")

    def __init__(self, file: DataFile, spec: TensorSpec, offset: int, stride: tuple[int, ...] | None = None) -> None:
        self.file = file
        self.spec = spec
        self.offset = offset
        self.stride = None if stride is None or _is_row_major(spec.shape, stride) else stride

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The files that are open while it is read."""
        return (self.file,)

    @property
    def identity(self) -> Hashable:
        """Equal for two tensors that are the same storage seen in the same way (tied tensors)."""
        return (self.file.place, self.offset, self.spec, self.stride) if self.spec.numel else id(self)

    def tensor(self) -> Tensor:
        """The tensor, memory-mapped."""
        dtype, shape = self.spec.dtype, self.spec.shape
        if not self.spec.numel:
            return torch.empty(shape, dtype=dtype, device="cpu")
        stride = self.stride or row_major(shape)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))  # from the first element to the last
        storage = self.file.storage(self.offset, span * dtype.itemsize, dtype.itemsize)
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)

    def read(self, start: int, stop: int, scratch: Scratch) -> tuple[Tensor, memoryview]:
        """Elements ``start`` to ``stop`` in row-major order, in ``scratch``: as a tensor and as bytes."""
        values, data = scratch.view(self.spec.dtype, stop - start)
        self.fill(start, values, data)
        return values, data

    def copy(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """Elements from ``start`` into 1-dimensional ``out``, of any type; ``scratch`` may be the very same memory."""
        _copy(self, start, out, scratch)

    def fill(self, start: int, values: Tensor, data: memoryview) -> None:
        """Read elements from ``start`` in row-major order into ``values``, whose bytes are ``data``."""
        if self.stride:
            gather(self.tensor(), start, values)
        else:
            self.file.read_into(data, self.offset + start * self.spec.dtype.itemsize)


class MemoryTensor:
    """A tensor that is in memory already; data on an accelerator is brought over in pieces."""

    __slots__ = ("spec", "value")
    files: tuple[DataFile, ...] = ()

    def __init__(self, value: Tensor) -> None:
        self.value = value.detach().resolve_conj().resolve_neg()
        self.spec = TensorSpec(value.dtype, tuple(value.shape))

    @property
    def identity(self) -> Hashable:
        """Equal for two tensors that are the same storage seen in the same way (tied tensors)."""
        if not self.spec.numel:
            return id(self)
        return (self.value.device, self.value.data_ptr(), self.spec, self.value.stride())

    def tensor(self) -> Tensor:
        """The tensor itself (detached)."""
        return self.value

    def read(self, start: int, stop: int, scratch: Scratch) -> tuple[Tensor, memoryview]:
        """Elements ``start`` to ``stop`` in row-major order, as in :class:`FileTensor`; a view if it can."""
        if self.value.is_contiguous():
            values = self.value.view(-1)[start:stop].cpu()
            return values, values.view(torch.uint8).numpy().data
        values, data = scratch.view(self.spec.dtype, stop - start)
        gather(self.value, start, values)
        return values, data

    def copy(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """As in :class:`FileTensor`."""
        if self.value.is_contiguous():
            out.copy_(self.value.view(-1)[start : start + len(out)])
        else:
            _copy(self, start, out, scratch)


class Shard(Protocol):
    """What a piece of a tensor is read from; a :class:`FileTensor` is one."""

    file: DataFile
    spec: TensorSpec

    @property
    def identity(self) -> Hashable:
        """As in :class:`FileTensor`."""

    def fill(self, start: int, values: Tensor, data: memoryview) -> None:
        """As in :class:`FileTensor`."""


class Piece(NamedTuple):
    """A rectangular part of a tensor: where its first element lies in the whole, and its data."""

    start: tuple[int, ...]
    shard: Shard


class PiecewiseTensor:
    """A tensor at rest in rectangular pieces, each in a place of its own, as the ranks of a training wrote them.

    Args:
        spec: Element type and shape of the whole.
        pieces: Parts that do not overlap and together are the whole.
    """

    __slots__ = ("_longest", "_rows", "pieces", "spec")

    def __init__(self, spec: TensorSpec, pieces: Iterable[Piece]) -> None:
        self.spec = spec
        self.pieces = tuple(sorted(pieces, key=lambda piece: piece.start))
        self._rows = [_rows(piece)[0] for piece in self.pieces]
        self._longest = max((stop - start for start, stop in map(_rows, self.pieces)), default=0)

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The files that are open while it is read."""
        return tuple(dict.fromkeys(piece.shard.file for piece in self.pieces))

    @property
    def identity(self) -> Hashable:
        """Equal for two tensors that are the same storage seen in the same way (tied tensors)."""
        pieces = tuple((piece.start, piece.shard.identity) for piece in self.pieces)
        return (self.spec, pieces) if self.spec.numel else id(self)

    def tensor(self) -> Tensor:
        """The tensor, read and put together anew each time."""
        with hold(self.files):
            return self.read(0, self.spec.numel, Scratch(self.spec.nbytes))[0].view(self.spec.shape)

    def read(self, start: int, stop: int, scratch: Scratch) -> tuple[Tensor, memoryview]:
        """Elements ``start`` to ``stop`` in row-major order, as in :class:`FileTensor`."""
        values, data = scratch.view(self.spec.dtype, stop - start)
        done = 0
        for index in row_major_blocks(self.spec.shape, start, stop) if start < stop else ():
            box = _spans(index, self.spec.shape)
            shape = tuple(b - a for a, b in box)
            block = values[done : done + math.prod(shape)].view(shape)
            first, last = box[0] if box else (0, 1)
            begin = bisect_right(self._rows, first - self._longest)
            for piece in self.pieces[begin : bisect_left(self._rows, last)]:
                _fill_common(piece, box, block, values, data)
            done += block.numel()
        return values, data

    def copy(self, start: int, out: Tensor, scratch: Scratch) -> None:
        """As in :class:`FileTensor`."""
        _copy(self, start, out, scratch)


def _copy(stored: "StoredTensor", start: int, out: Tensor, scratch: Scratch) -> None:
    values, _ = stored.read(start, start + len(out), scratch)
    if values.data_ptr() != out.data_ptr():
        out.copy_(values)


def _rows(piece: Piece) -> tuple[int, int]:
    """The rows of the whole that a piece has a part of."""
    return (piece.start[0], piece.start[0] + piece.shard.spec.shape[0]) if piece.start else (0, 1)


def _spans(index: tuple[int | slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where a block of :func:`row_major_blocks` begins and ends in each dimension."""
    spans = [(part.start, part.stop) if isinstance(part, slice) else (part, part + 1) for part in index]
    return spans + [(0, length) for length in shape[len(spans) :]]


def _fill_common(piece: Piece, box: list[tuple[int, int]], block: Tensor, values: Tensor, data: memoryview) -> None:
    """Read what a piece and a block have in common into the block, which lies in ``values`` with bytes ``data``.

    A block is one index in some dimensions, a range in the next and everything in the rest. So what it has in common
    with a piece is one run of the piece's elements, and mostly one run of the block's, which is read where it belongs.
    """
    shape = piece.shard.spec.shape
    low = [max(a, s) for (a, _), s in zip(box, piece.start, strict=True)]
    high = [min(b, s + n) for (_, b), s, n in zip(box, piece.start, shape, strict=True)]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return
    first = sum((a - s) * step for a, s, step in zip(low, piece.start, row_major(shape), strict=True))
    target = block[tuple(slice(a - o, b - o) for a, b, (o, _) in zip(low, high, box, strict=True))]
    count, width = target.numel(), values.dtype.itemsize
    if target.is_contiguous():
        place = target.storage_offset() - values.storage_offset()
        piece.shard.fill(first, values[place : place + count], data[place * width : (place + count) * width])
    else:
        part, raw = Scratch(count * width).view(values.dtype, count)
        piece.shard.fill(first, part, raw)
        target.copy_(part.view(target.shape))


StoredTensor = FileTensor | MemoryTensor | PiecewiseTensor


def gather(source: Tensor, start: int, out: Tensor) -> None:
    """Copy elements of a strided tensor, from ``start`` in row-major order, into 1-dimensional ``out``."""
    done = 0
    for index in row_major_blocks(source.shape, start, start + len(out)):
        block = source[index]
        out[done : done + block.numel()].view(block.shape).copy_(block)
        done += block.numel()


def scatter(values: Tensor, target: Tensor, start: int) -> None:
    """Copy 1-dimensional ``values`` into any strided tensor, from ``start`` in row-major order."""
    done = 0
    for index in row_major_blocks(target.shape, start, start + len(values)):
        block = target[index]
        block.copy_(values[done : done + block.numel()].view(block.shape))
        done += block.numel()


def row_major_blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int | slice, ...]]:
    """Cut a run of a row-major walk into rectangular blocks: at most two for each dimension.

    Yields:
        An index for each block; the blocks follow one another in row-major order.

    Example:
        >>> list(row_major_blocks((3, 4), 2, 9))
        [(0, slice(2, 4, None)), (slice(1, 2, None),), (2, slice(0, 1, None))]
    """
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    row, offset = divmod(start, inner)
    if offset:
        end = min(stop, (row + 1) * inner)
        yield from ((row, *index) for index in row_major_blocks(shape[1:], offset, end - row * inner))
        row, start = row + 1, end
    rows = (stop - start) // inner
    if rows > 0:
        yield (slice(row, row + rows),)
        row, start = row + rows, start + rows * inner
    if start < stop:
        yield from ((row, *index) for index in row_major_blocks(shape[1:], 0, stop - start))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of a shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return all(n == 1 or s == r for n, s, r in zip(shape, stride, row_major(shape), strict=True))
