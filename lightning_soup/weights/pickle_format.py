"""Reading ``torch.save`` files without running anything from them and without reading their data.

A pickle can name any class or function of the interpreter. Here a name is looked up in a table of a dozen entries that
only build plain containers and tensor records; every other name becomes an inert :class:`Placeholder`. So a malicious
file opens as a lump of placeholders, and a Lightning checkpoint full of foreign hyperparameter objects opens as usual.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.stored_tensor import DataFile, FileTensor, TensorSpec

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_HEAD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class Placeholder(dict):
    """Stands for an object of a class that is not opened. Holds what the pickle puts into it, and does nothing."""

    name = "object"
    state: dict[str, Any] = {}  # noqa: RUF012 - replaced, never filled

    def __new__(cls, *args: object, **kwargs: object) -> "Placeholder":
        return dict.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state

    def append(self, item: object) -> None:
        """Accept a list item and drop it."""

    def extend(self, items: object) -> None:
        """Accept list items and drop them."""

    add = append

    def __call__(self, *args: object, **kwargs: object) -> "Placeholder":
        return self

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"<{self.name}>"


class _Dict(dict):
    """An ``OrderedDict`` of the file. ``state`` holds its attributes: a state dict's ``_metadata``."""

    state: dict[str, Any] = {}  # noqa: RUF012 - replaced, never filled

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state


@dataclass(frozen=True)
class _Storage:
    """A storage of the file: where it begins is known once the whole stream has been read."""

    key: str
    dtype: torch.dtype
    shift: int  # bytes from the storage's beginning, for views
    locate: Callable[[str], int]
    file: DataFile


class _StorageType:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class StoredRecord:
    """A tensor of the pickle whose file offset is resolved when it is used."""

    def __init__(self, storage: _Storage, dtype: torch.dtype, offset: int, size: Any, stride: Any) -> None:
        self.spec = TensorSpec(dtype, tuple(size))
        self.storage, self.offset, self.stride = storage, offset, tuple(stride)

    def resolve(self, name: str) -> FileTensor:
        """The tensor at rest.

        Raises:
            UnreadableCheckpoint: The data would lie outside the file.
        """
        store = self.storage
        start = store.locate(store.key) + store.shift + self.offset * self.spec.dtype.itemsize
        reach = 1 + sum((n - 1) * s for n, s in zip(self.spec.shape, self.stride, strict=True))
        if min(self.spec.shape + self.stride, default=0) < 0:
            raise UnreadableCheckpoint(f"{store.file.path}: tensor {name!r} has negative sizes; the file is damaged.")
        if self.spec.numel and not 0 <= start <= store.file.size - reach * self.spec.dtype.itemsize:
            raise UnreadableCheckpoint(
                f"{store.file.path}: tensor {name!r} ({self.spec}) reaches beyond the end of the file. "
                "The file is damaged; copy or download it again."
            )
        return FileTensor(store.file, self.spec, start, self.stride)


def _rebuild_tensor(storage: _Storage, offset: int, size: Any, stride: Any, *_: object) -> StoredRecord:
    return StoredRecord(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(
    storage: _Storage, offset: int, size: Any, stride: Any, _grad: object, _hooks: object, dtype: torch.dtype, *_: object
) -> StoredRecord:
    return StoredRecord(storage, dtype, offset, size, stride)


def _first(data: Any, *_: object) -> Any:
    return data


def _rebuild_from_type(function: Callable[..., Any], _type: object, args: tuple, _state: object) -> Any:
    return function(*args)


_STORAGES = {
    f"{name}Storage": _StorageType(dtype)
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Untyped": torch.uint8,
    }.items()
}
_DTYPE_NAMES = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_SAFE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
    ("builtins", "tuple"): tuple,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("torch", "Size"): tuple,
    ("torch", "device"): str,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    **{("torch", name): kind for name, kind in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _STORAGES["UntypedStorage"],
    **{("torch", name): dtype for name, dtype in _DTYPE_NAMES.items()},
}


class _InertUnpickler(pickle.Unpickler):
    """Unpickles containers, plain values and tensor records; anything else becomes a :class:`Placeholder`."""

    def __init__(
        self, stream: Any, file: DataFile, locate: Callable[[str], int], widths: dict[str, int]
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self._file, self._locate, self._widths = file, locate, widths

    def find_class(self, module: str, name: str) -> Any:
        known = _SAFE.get(("builtins" if module == "__builtin__" else module, name))
        if known is not None:
            return known
        return type("Placeholder", (Placeholder,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or not pid:
            raise pickle.UnpicklingError(f"unknown persistent id {pid!r}")
        if pid[0] == "module":  # old files name a module's class and source
            return pid[1]
        if pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        view = pid[5] if len(pid) > 5 else None
        shift = view[1] * pid[1].dtype.itemsize if view else 0
        self._widths[str(pid[2])] = pid[1].dtype.itemsize
        return _Storage(str(pid[2]), pid[1].dtype, shift, self._locate, self._file)


def read_zip(file: DataFile) -> tuple[Any, bool]:
    """Read the object of a zip ``torch.save`` file, or of a TorchScript archive.

    Returns:
        The object (tensors as :class:`StoredRecord`), and whether the file is a TorchScript archive.

    Raises:
        UnreadableCheckpoint: Not such an archive, or a damaged one.
    """
    try:
        with zipfile.ZipFile(file.path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
            if not pickles:
                raise UnreadableCheckpoint(
                    f"{file.path}: a zip archive, but not one of torch.save (no data.pkl in it). It holds "
                    f"{', '.join(list(entries)[:4])}. Give the weights file itself."
                )
            root = pickles[0].removesuffix("data.pkl")
            if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
                raise UnreadableCheckpoint(f"{file.path}: saved on a big-endian machine; save it again on this one.")
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise UnreadableCheckpoint(
            f"{file.path}: a damaged or truncated torch.save file ({error}). Copy, download or save it again."
        ) from error

    def locate(key: str) -> int:
        entry = entries.get(f"{root}data/{key}")
        if entry is None:
            raise UnreadableCheckpoint(f"{file.path}: storage {key!r} is missing in the archive.")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UnreadableCheckpoint(f"{file.path}: compressed storages are not supported; save it with torch.save.")
        local = bytearray(30)
        file.read_into(memoryview(local), entry.header_offset)
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        return entry.header_offset + 30 + name_length + extra_length

    return _load(io.BytesIO(content), file, locate, {}), root + "constants.pkl" in entries


def read_legacy(file: DataFile) -> Any:
    """Read the object of a ``torch.save`` file from before torch 1.6: pickles, then one storage after the other."""
    positions: dict[str, int] = {}
    widths: dict[str, int] = {}
    with open(file.path, "rb") as stream:

        def load() -> Any:
            return _load(stream, file, positions.__getitem__, widths)

        if load() != _LEGACY_MAGIC:
            raise UnreadableCheckpoint(f"{file.path}: not a torch.save file.")
        load()  # protocol version
        load()  # sizes and byte order of the writing machine
        content, keys = load(), load()
        position = stream.tell()
        for key in keys:
            stream.seek(position)
            field = stream.read(8)
            if len(field) < 8 or str(key) not in widths:
                raise UnreadableCheckpoint(f"{file.path}: truncated before storage {key!r}; copy or save it again.")
            positions[str(key)] = position + 8
            position += 8 + struct.unpack("<q", field)[0] * widths[str(key)]
    return content


def _load(stream: Any, file: DataFile, locate: Callable[[str], int], widths: dict[str, int]) -> Any:
    try:
        return _InertUnpickler(stream, file, locate, widths).load()
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UnreadableCheckpoint(
            f"{file.path}: the file cannot be read ({type(error).__name__}: {error}). It is damaged or not made by "
            "torch.save; copy or save it again."
        ) from error
