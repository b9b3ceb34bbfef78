"""The zip layout of ``torch.save``, planned before any tensor is there, so that tensors can be streamed into it.

``torch.save`` wants all tensors in memory. Here the pickle is made from their types and shapes alone, and the archive's
entries get their places from it. Files of either are read by the other, and by ``unzip`` (tested).
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_soup.weights.file_output import Layout
from lightning_soup.weights.stored_tensor import TensorSpec, row_major
from lightning_soup.weights.torch_records import TYPED_STORAGES

_ALIGNMENT = 64  # torch's own, which its memory maps rely on
_STORAGE_TYPES = {dtype: getattr(torch, name) for name, dtype in TYPED_STORAGES.items()}
_LIMIT = 0xFFFFFFFF  # sizes and offsets from here on stand in zip64 fields
_NEEDED = 45  # the version of zip that has zip64
_UTF8 = 0x800
_DATE = 1 << 5 | 1  # 1980-01-01, the earliest: equal content gives equal bytes


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """Stands in the object that is saved for a tensor whose data comes later; one for tensors that are tied.

    Attributes:
        name: What :class:`.Layout` calls it.
        key: Its storage's name in the archive.
        spec: Its type and shape.
    """

    name: str
    key: str
    spec: TensorSpec


def torch_layout(content: Any, tensors: Sequence[SavedTensor]) -> Layout:
    """Plan the file that ``torch.save(content)`` would write.

    Args:
        content: Plain values and containers, with a :class:`SavedTensor` in each tensor's place.
        tensors: The tensors in it.
    """
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(content)
    small = {"data.pkl": stream.getvalue(), "byteorder": b"little", "version": b"3\n"}
    entries, position = {}, 0
    for name, size in [
        ("data.pkl", len(small["data.pkl"])),
        ("byteorder", len(small["byteorder"])),
        *((f"data/{tensor.key}", tensor.spec.nbytes) for tensor in tensors),
        ("version", len(small["version"])),
    ]:
        entries[name] = entry = _Entry(f"archive/{name}".encode(), position, size)
        position = entry.data + size
    end = position

    def rest(checksums: Mapping[str, int]) -> Iterator[tuple[int, bytes]]:
        found = {name: zlib.crc32(data) for name, data in small.items()}
        found |= {f"data/{tensor.key}": checksums[tensor.name] for tensor in tensors}
        for name, entry in entries.items():
            yield entry.position, entry.local_header(found[name])
        for name, data in small.items():
            yield entries[name].data, data
        yield end, _directory([(entry, found[name]) for name, entry in entries.items()], end)

    offsets = {tensor.name: entries[f"data/{tensor.key}"].data for tensor in tensors}
    size = end + len(_directory([(entry, 0) for entry in entries.values()], end))
    return Layout(offsets, size, rest, checksums=True)


class _Storage:
    def __init__(self, tensor: SavedTensor) -> None:
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    """Writes tensors as torch does: a call that rebuilds them from a storage, which is named by its type and key."""

    def reducer_override(self, item: Any) -> Any:
        if not isinstance(item, SavedTensor):
            return NotImplemented
        shape, dtype = item.spec.shape, item.spec.dtype
        arguments = _Storage(item), 0, shape, row_major(shape), False, OrderedDict()
        if dtype in _STORAGE_TYPES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, dtype)

    def persistent_id(self, item: Any) -> Any:
        if not isinstance(item, _Storage):
            return None
        spec, key = item.tensor.spec, item.tensor.key
        if spec.dtype in _STORAGE_TYPES:
            return "storage", _STORAGE_TYPES[spec.dtype], key, "cpu", spec.numel
        return "storage", torch.UntypedStorage, key, "cpu", spec.nbytes


# ----------------------------------------------------------------------------------------------------------------- zip


class _Entry:
    """An uncompressed entry of the archive: a header, padding up to the alignment, and the data."""

    def __init__(self, name: bytes, position: int, size: int) -> None:
        self.name, self.position, self.size = name, position, size
        self._extra = _zip64([size, size]) if size >= _LIMIT else b""
        start = position + 30 + len(name) + len(self._extra) + 4
        padding = -start % _ALIGNMENT
        self._extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # the field that torch pads with
        self.data = start + padding

    def local_header(self, checksum: int) -> bytes:
        size = min(self.size, _LIMIT)
        fields = (_NEEDED, _UTF8, 0, 0, _DATE, checksum, size, size, len(self.name), len(self._extra))
        return struct.pack("<4s5H3L2H", b"PK\3\4", *fields) + self.name + self._extra

    def directory_record(self, checksum: int) -> bytes:
        size, position = min(self.size, _LIMIT), min(self.position, _LIMIT)
        large = [self.size, self.size] * (self.size >= _LIMIT) + [self.position] * (self.position >= _LIMIT)
        extra = _zip64(large) if large else b""
        fields = (_NEEDED, _NEEDED, _UTF8, 0, 0, _DATE, checksum, size, size, len(self.name), len(extra))
        return struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields, 0, 0, 0, 0, position) + self.name + extra


def _zip64(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def _directory(entries: Sequence[tuple[_Entry, int]], position: int) -> bytes:
    """The end of an archive: a record of each entry, and where these records lie."""
    records = b"".join(entry.directory_record(checksum) for entry, checksum in entries)
    count, size = len(entries), len(records)
    end = b""
    if position >= _LIMIT or size >= _LIMIT or count >= 0xFFFF:
        fields = (44, _NEEDED, _NEEDED, 0, 0, count, count, size, position)
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", *fields)
        end += struct.pack("<4sLQL", b"PK\6\7", 0, position + size, 1)
    count, size, position = min(count, 0xFFFF), min(size, _LIMIT), min(position, _LIMIT)
    return records + end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, position, 0)
