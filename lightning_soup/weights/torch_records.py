"""What a ``torch.save`` pickle says of its tensors: builders that make records of where the data lies."""

import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.data_file import DataFile
from lightning_soup.weights.inert_pickle import Builder, Placeholder, Sealed, StatefulDict
from lightning_soup.weights.stored_tensor import FileTensor, TensorSpec

_MAX_DIMENSIONS = 64  # torch's own limit
MAX_BYTES = 1 << 40  # of one tensor; an expanded view of a few bytes may claim any size


class Extent(NamedTuple):
    """Where a storage lies in its file, in bytes."""

    start: int
    size: int


class _StorageType(Sealed):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class StorageRecord(Sealed):
    """A storage of the file. Where it lies is known once the whole pickle has been read.

    Args:
        key: Its name in the file.
        dtype: Its element type, which gives the width of offsets.
        shift: Bytes from its beginning (old files have views of storages).
        locate: Finds the storage of a name.
        file: The file.
    """

    __slots__ = ("dtype", "file", "key", "locate", "shift")

    def __init__(
        self, key: str, dtype: torch.dtype, shift: int, locate: Callable[[str], Extent], file: DataFile
    ) -> None:
        self.key, self.dtype, self.shift, self.locate, self.file = key, dtype, shift, locate, file


class StoredRecord(Sealed):
    """A tensor of the pickle, whose place in the file is looked up when it is used."""

    __slots__ = ("conjugate", "offset", "spec", "storage", "stride")

    def __init__(self, storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any, metadata: Any = None) -> None:
        counts = (offset, *shape, *stride)
        if not isinstance(storage, StorageRecord) or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"a tensor without a storage ({storage!r})")
        if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
            raise pickle.UnpicklingError(f"a tensor of shape {shape!r} and strides {stride!r}")
        if any(type(count) is not int or not 0 <= count < 1 << 63 for count in counts):
            raise pickle.UnpicklingError(f"a tensor of shape {shape!r}, strides {stride!r} at {offset!r}")
        self.spec = TensorSpec(dtype, tuple(shape))
        self.storage, self.offset, self.stride = storage, offset, tuple(stride)
        self.conjugate = bool(metadata)

    def resolve(self, name: str) -> FileTensor:
        """The tensor at rest; ``name`` is for messages.

        Raises:
            UnreadableCheckpoint: The data would lie outside its storage.
        """
        store, width = self.storage, self.spec.dtype.itemsize
        path = store.file.path
        if self.conjugate:
            raise UnreadableCheckpoint(
                f"{path}: tensor {name!r} is a conjugated or negated view. Save it after resolve_conj()."
            )
        extent = store.locate(store.key)
        start = store.shift + self.offset * store.dtype.itemsize
        reach = 1 + sum((n - 1) * s for n, s in zip(self.spec.shape, self.stride, strict=True))
        if self.spec.nbytes > MAX_BYTES or math.prod(n for n in self.spec.shape if n) >= 1 << 62:
            raise UnreadableCheckpoint(f"{path}: tensor {name!r} ({self.spec}) is impossibly large. {_DAMAGED}")
        if self.spec.numel and start + reach * width > extent.size:
            raise UnreadableCheckpoint(
                f"{path}: tensor {name!r} ({self.spec}) reaches beyond its {extent.size} bytes of data. {_DAMAGED}"
            )
        return FileTensor(store.file, self.spec, extent.start + start, self.stride)


_DAMAGED = "The file is damaged; copy or download it again."


def storage_record(pid: Any, locate: Callable[[str], Extent], file: DataFile) -> StorageRecord | Placeholder:
    """Build the storage that a persistent identifier of the pickle names; a placeholder for an unknown type."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise pickle.UnpicklingError(f"unknown persistent identifier {pid!r}")
    if not isinstance(pid[1], _StorageType):
        return Placeholder()
    dtype = pid[1].dtype
    view = pid[5] if len(pid) > 5 else None
    shift = 0 if view is None else view[1] * dtype.itemsize
    if type(shift) is not int or shift < 0:
        raise pickle.UnpicklingError(f"unknown view of a storage {view!r}")
    return StorageRecord(str(pid[2]), dtype, shift, locate, file)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredRecord | Placeholder:
    if isinstance(storage, Placeholder):
        return storage
    metadata = rest[2] if len(rest) > 2 else None  # after requires_grad and hooks
    return StoredRecord(storage, storage.dtype, offset, shape, stride, metadata)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> StoredRecord:
    return StoredRecord(storage, dtype, offset, shape, stride, metadata)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _from_type(function: Any, _type: Any, args: tuple, _state: Any) -> Any:
    if not isinstance(function, Builder):
        raise pickle.UnpicklingError(f"a tensor made by {function!r}")
    return function(*args)


def _size(dimensions: Any) -> tuple:
    if len(dimensions) > _MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a shape of too many dimensions")
    return tuple(dimensions)


def _device(*parts: Any) -> str:
    return ":".join(str(part) for part in parts)


class _NumpyType(Sealed):
    """A numpy dtype of the file: hyperparameters drawn with numpy are numpy scalars."""

    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = str(code)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.code = ">" + self.code


def _numpy_scalar(dtype: Any, raw: Any = b"") -> Any:
    if not isinstance(dtype, _NumpyType) or dtype.code.lstrip(">") not in _NUMPY_NUMBERS:
        return Placeholder()
    return np.frombuffer(raw, dtype.code, count=1)[0].item()


_NUMPY_NUMBERS = {"b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"}


def _latin1_bytes(text: Any, encoding: Any = "latin1") -> bytes:
    return str(text).encode("latin1")  # how protocol 2 writes bytes


TYPED_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_STORAGES = {name: _StorageType(dtype) for name, dtype in {**TYPED_STORAGES, "UntypedStorage": torch.uint8}.items()}

BUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): StatefulDict,
    ("builtins", "complex"): complex,
    ("__builtin__", "complex"): complex,
    ("_codecs", "encode"): Builder(_latin1_bytes),
    ("numpy", "dtype"): _NumpyType,
    ("numpy.core.multiarray", "scalar"): Builder(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): Builder(_numpy_scalar),
    ("torch", "Size"): Builder(_size),
    ("torch", "device"): Builder(_device),
    ("torch._utils", "_rebuild_tensor"): Builder(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Builder(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Builder(_from_type),
    **{("torch", name): kind for name, kind in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): _STORAGES["UntypedStorage"],
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
