"""Tensors where they lie: in a file (opened, mapped and read only when asked) or in memory.

Every format reader ends in these two classes, so the kernel in :mod:`.combine` reads any checkpoint in the same way:
a run of elements at a time, into a buffer that stays in the processor's cache.
"""

import math
import mmap
import os
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_soup.errors import UnreadableCheckpoint


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


class DataFile:
    """A file of tensor data. Nothing is opened before a first read.

    A file is opened for each read unless it is held open (:meth:`held`), so any number of checkpoints can be
    combined without running out of file descriptors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file open for many reads."""
        if self._descriptor is not None:
            yield
            return
        self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            yield
        finally:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        descriptor = self._descriptor
        if descriptor is None:
            with self.held_once() as descriptor:
                self._fill(descriptor, buffer, offset)
        else:
            self._fill(descriptor, buffer, offset)

    @contextmanager
    def held_once(self) -> Iterator[int]:
        """Open the file for one read of this thread, without touching what other threads hold."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise UnreadableCheckpoint(
                    f"{self.path}: the file ends at byte {offset + done}, but had {self.size} bytes when it was "
                    "opened. It was truncated or replaced meanwhile; write it again and start over."
                )
            done += count

    def mapped(self) -> mmap.mmap:
        """The whole file, mapped copy-on-write: a caller that writes into a tensor never changes the file."""
        with self._lock:
            if self._map is None:
                with open(self.path, "rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return self._map


class FileTensor:
    """A tensor at rest in a file.

    Args:
        file: The file that holds the data.
        spec: Element type and shape.
        offset: Byte at which element 0 of the tensor lies.
        stride: Strides in elements where the data is not row-major and contiguous.
    """

    __slots__ = ("file", "offset", "spec", "stride")

    def __init__(
        self, file: DataFile, spec: TensorSpec, offset: int, stride: tuple[int, ...] | None = None
    ) -> None:
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
            return torch.empty(shape, dtype=dtype)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, self.stride or (), strict=False))
        count = span if self.stride else self.spec.numel
        if self.offset % dtype.itemsize:  # old writers do not align: such a tensor is copied
            raw = bytearray(count * dtype.itemsize)
            self.file.read_into(memoryview(raw), self.offset)
            flat = torch.frombuffer(raw, dtype=dtype)
        else:
            flat = torch.frombuffer(self.file.mapped(), dtype=dtype, count=count, offset=self.offset)
        return flat.as_strided(shape, self.stride) if self.stride else flat.view(shape)

    def read(self, start: int, stop: int, scratch: Tensor) -> Tensor:
        """Elements ``start`` to ``stop`` in row-major order, in ``scratch`` (uint8, large enough) where possible."""
        if self.stride:
            return self.tensor().reshape(-1)[start:stop]
        width = self.spec.dtype.itemsize
        raw = scratch[: (stop - start) * width]
        self.file.read_into(raw.numpy().data, self.offset + start * width)
        return raw.view(self.spec.dtype)


class MemoryTensor:
    """A tensor that is in memory already; data on an accelerator is brought over in pieces."""

    __slots__ = ("file", "spec", "value")

    def __init__(self, value: Tensor) -> None:
        self.file = None
        self.value = value.detach()
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

    def read(self, start: int, stop: int, scratch: Tensor) -> Tensor:
        """Elements ``start`` to ``stop`` in row-major order, on the CPU."""
        return self.value.reshape(-1)[start:stop].cpu()


StoredTensor = FileTensor | MemoryTensor


def _is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
