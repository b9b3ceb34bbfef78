"""Writing a combination into a file, every chunk at its final place, so that memory holds a few chunks only."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_soup.progress import Progress
from lightning_soup.weights.atomic import atomic_path
from lightning_soup.weights.checksum import Checksum
from lightning_soup.weights.chunks import Part
from lightning_soup.weights.streaming import Writer, stream


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a file that is about to be written.

    Attributes:
        offsets: The byte at which each tensor begins, by the first name of its part.
        size: Bytes of the file.
        rest: Gives all that is not tensor data, as positions and bytes, from the tensors' CRC-32 checksums by name.
        checksums: Whether ``rest`` uses the checksums; without, they are not computed.
    """

    offsets: Mapping[str, int]
    size: int
    rest: Callable[[Mapping[str, int]], Iterable[tuple[int, bytes]]]
    checksums: bool = False


def write_parts(parts: Sequence[Part], path: Path, layout: Layout, threads: int, progress: Progress) -> None:
    """Form the parts in a file, atomically.

    Raises:
        UnwritableOutput: The file cannot be written.
    """
    sums = {part.names[0]: Checksum() for part in parts} if layout.checksums else {}
    with atomic_path(path, size=layout.size) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY)
        try:
            writers = [_writer(descriptor, layout.offsets[p.names[0]], sums.get(p.names[0])) for p in parts]
            stream(list(zip(parts, writers, strict=True)), threads, progress)
            for position, data in layout.rest({name: checksum.value() for name, checksum in sums.items()}):
                _write(descriptor, data, position)
        finally:
            os.close(descriptor)


def _writer(descriptor: int, offset: int, checksum: Checksum | None) -> Writer:
    def write(start: int, values: Tensor) -> None:
        data = values.view(torch.uint8).numpy().data
        first = start * values.dtype.itemsize
        if checksum is not None:
            checksum.add(first, data)
        _write(descriptor, data, offset + first)

    return write


def _write(descriptor: int, data: bytes | memoryview, position: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count
