"""Tensors where they lie: in a file (opened, mapped and read only when asked) or in memory.

Every format reader ends in these two classes, so the kernel in :mod:`.combine` reads any checkpoint in the
same way: a run of elements at a time, into a buffer that stays in the processor's cache.
"""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soup.weights.data_file import DataFile


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
        size: Bytes.
    """

    def __init__(self, size: int) -> None:
        self._raw = torch.empty(size, dtype=torch.uint8, device="cpu")
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
    def identity(self) -> Hashable:
        """Equal for two tensors that are the same storage seen in the same way (tied tensors)."""
        return (self.file.path, self.offset, self.spec, self.stride) if self.spec.numel else id(self)

    def tensor(self) -> Tensor:
        """The tensor, memory-mapped."""
        dtype, shape = self.spec.dtype, self.spec.shape
        if not self.spec.numel:
            return torch.empty(shape, dtype=dtype, device="cpu")
        stride = self.stride or _row_major(shape)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))  # from the first element to the last
        storage = self.file.storage(self.offset, span * dtype.itemsize, dtype.itemsize)
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, stride)

    def read(self, start: int, stop: int, scratch: Scratch) -> tuple[Tensor, memoryview]:
        """Elements ``start`` to ``stop`` in row-major order, in ``scratch``: as a tensor and as bytes."""
        dtype = self.spec.dtype
        values, data = scratch.view(dtype, stop - start)
        if self.stride:
            gather(self.tensor(), start, values)
        else:
            self.file.read_into(data, self.offset + start * dtype.itemsize)
        return values, data


class MemoryTensor:
    """A tensor that is in memory already; data on an accelerator is brought over in pieces."""

    __slots__ = ("file", "spec", "value")

    def __init__(self, value: Tensor) -> None:
        self.file = None
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


StoredTensor = FileTensor | MemoryTensor


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


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    return all(n == 1 or s == r for n, s, r in zip(shape, stride, _row_major(shape), strict=True))
