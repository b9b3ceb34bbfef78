"""The two layouts of ``torch.save``: a zip archive since torch 1.6, pickles and bare storages before.

Only the pickle is read here; tensors come as :class:`.StoredRecord`.
"""

import io
import mmap
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.data_file import DataFile
from lightning_soup.weights.inert_pickle import load_inert, pickle_end
from lightning_soup.weights.torch_records import BUILDERS, Extent, StorageRecord, storage_record

ZIP_HEAD = b"PK\x03\x04"
LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_BIG_ENDIAN = "saved on a big-endian machine; load and save it again on this one."


class _Window(io.RawIOBase):
    """Some bytes of a file as a file of its own."""

    def __init__(self, file: DataFile, window: Extent) -> None:
        self._file, self._window, self._position = file, window, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._window.size}[whence]
        if start + offset < 0:
            raise OSError(f"a place before the beginning ({start + offset})")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._window.size - self._position), 0)
        self._file.read_into(view[:count], self._window.start + self._position)
        self._position += count
        return count


def read_zip(file: DataFile, window: Extent | None = None) -> tuple[Any, bool]:
    """Read the object of a zip ``torch.save`` file, or of a TorchScript archive.

    Args:
        file: The file.
        window: The part of the file that is the archive, if it is not all of it.

    Returns:
        The object, and whether the file is a TorchScript archive.

    Raises:
        UnreadableCheckpoint: Not such an archive, or a damaged one.
    """
    window = Extent(0, file.size) if window is None else window
    try:
        with zipfile.ZipFile(_Window(file, window)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
            if not pickles:
                shown = ", ".join(list(entries)[:4]) or "nothing"
                raise UnreadableCheckpoint(
                    f"{file.path}: a zip archive, but not one of torch.save (no data.pkl in it). It holds "
                    f"{shown}. Give the weights file itself."
                )
            root = pickles[0].removesuffix("data.pkl")
            wanted = [entries[name] for name in (pickles[0], root + "byteorder") if name in entries]
            if any(not _stored(entry, window) for entry in wanted):
                raise UnreadableCheckpoint(f"{file.path}: a compressed or damaged archive. {_SAVE_AGAIN}")
            content, *byteorder = (archive.read(entry) for entry in wanted)
    except UnreadableCheckpoint:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise UnreadableCheckpoint(
            f"{file.path}: a damaged or truncated torch.save file ({error}). Copy, download or save it again."
        ) from error
    if byteorder and byteorder != [b"little"]:
        raise UnreadableCheckpoint(f"{file.path}: {_BIG_ENDIAN}")

    def locate(key: str) -> Extent:
        entry = entries.get(f"{root}data/{key}")
        if entry is None:
            raise UnreadableCheckpoint(f"{file.path}: storage {key!r} is missing in the archive. {_SAVE_AGAIN}")
        if not _stored(entry, window):
            raise UnreadableCheckpoint(f"{file.path}: storage {key!r} is compressed or damaged. {_SAVE_AGAIN}")
        head = file.read(window.start + entry.header_offset, 30)
        name_length, extra_length = struct.unpack("<HH", head[26:30])
        start = entry.header_offset + 30 + name_length + extra_length
        if head[:4] != ZIP_HEAD or start + entry.file_size > window.size:
            raise UnreadableCheckpoint(f"{file.path}: storage {key!r} is damaged. {_SAVE_AGAIN}")
        return Extent(window.start + start, entry.file_size)

    return _load(content, 0, file, locate, {})[0], root + "constants.pkl" in entries


_SAVE_AGAIN = "Save it with torch.save, or copy it again."


def _stored(entry: zipfile.ZipInfo, window: Extent) -> bool:
    """Whether an entry is what torch writes: uncompressed, and within the archive."""
    plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 0x1
    within = entry.header_offset + 30 + entry.file_size <= window.size
    return plain and entry.file_size == entry.compress_size and within


def read_legacy(file: DataFile) -> Any:
    """Read the object of a ``torch.save`` file from before torch 1.6: pickles, then the storages.

    Raises:
        UnreadableCheckpoint: A damaged file.
    """
    extents: dict[str, Extent] = {}
    widths: dict[str, int] = {}

    def locate(key: str) -> Extent:
        if key not in extents:
            raise UnreadableCheckpoint(f"{file.path}: storage {key!r} is missing. {_SAVE_AGAIN}")
        return extents[key]

    with open(file.path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        position, found = 0, []
        for _ in range(5):  # magic number, protocol version, the writing machine, the object, the storages' names
            item, position = _load(view, position, file, locate, widths)
            found.append(item)
    magic, protocol, machine, content, keys = found
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or not isinstance(keys, list):
        raise UnreadableCheckpoint(f"{file.path}: not a torch.save file, or a damaged one.")
    if not (isinstance(machine, dict) and machine.get("little_endian")):
        raise UnreadableCheckpoint(f"{file.path}: {_BIG_ENDIAN}")
    with file.held():
        for key in map(str, keys):
            count = struct.unpack("<q", file.read(position, 8))[0] if position + 8 <= file.size else -1
            size = count * widths.get(key, 1)
            if count < 0 or position + 8 + size > file.size:
                raise UnreadableCheckpoint(
                    f"{file.path}: ends inside storage {key!r}. It is truncated; copy, download or save it again."
                )
            extents[key] = Extent(position + 8, size)
            position += 8 + size
    return content


def _load(
    data: Any, start: int, file: DataFile, locate: Callable[[str], Extent], widths: dict[str, int]
) -> tuple[Any, int]:
    """Unpickle, and note the element width of each storage: old files count storages in elements.

    Returns:
        The object, and where its pickle ends.
    """

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # old files name a module's class and source
            return pid[1]
        storage = storage_record(pid, locate, file)
        if isinstance(storage, StorageRecord):
            widths[storage.key] = storage.dtype.itemsize
        return storage

    try:
        end = pickle_end(data, start)
        return load_inert(data[start:end], BUILDERS, persistent), end
    except Exception as error:  # a damaged pickle can fail in any way
        raise UnreadableCheckpoint(
            f"{file.path}: the file cannot be read ({type(error).__name__}: {error}). It is damaged or not "
            "made by torch.save; copy or save it again."
        ) from error
