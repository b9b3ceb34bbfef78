"""The safetensors layout: eight bytes of header length, a JSON header, the data.

The safetensors package reads whole tensors; streaming a combination needs the byte offsets, so the header is
read and written here. Files of either are read by the other (tested).
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch

from lightning_soup.errors import UnreadableCheckpoint, UnwritableOutput
from lightning_soup.weights.stored_tensor import DataFile, FileTensor, TensorSpec

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the format's own implementation


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins with ``head`` has the shape of a safetensors file."""
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER


def read_safetensors(file: DataFile) -> tuple[dict[str, FileTensor], dict[str, str]]:
    """Read the header of a safetensors file.

    Returns:
        The tensors by name, and the file's metadata (names and values are strings).

    Raises:
        UnreadableCheckpoint: The header is damaged or does not fit the file.
    """
    (length,) = struct.unpack("<Q", file.read(0, 8))
    start = 8 + length
    if start > file.size:
        raise UnreadableCheckpoint(
            f"{file.path}: the header says it is {length} bytes long, but the file has {file.size} bytes in "
            "all. It is truncated; copy or download it again."
        )
    try:
        header = json.loads(file.read(8, length))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _entry(file, start, name, entry) for name, entry in header.items()}
        metadata = {key: str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableCheckpoint(
            f"{file.path}: the safetensors header is damaged ({error!r}). Copy, download or write the file again."
        ) from error
    _check_cover(file, start, tensors)
    return tensors, metadata


def _entry(file: DataFile, start: int, name: str, entry: Mapping[str, Any]) -> FileTensor:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in (*shape, *offsets)):
        raise ValueError(f"shape {shape} and offsets {offsets} of tensor {name!r}")
    if math.prod(size for size in shape if size) >= 1 << 62:
        raise ValueError(f"shape {shape} of tensor {name!r} is impossibly large")
    if entry["dtype"] not in _DTYPES:
        raise UnreadableCheckpoint(
            f"{file.path}: tensor {name!r} has the element type {entry['dtype']!r}, which cannot be "
            f"averaged. Supported: {', '.join(_DTYPES)}."
        )
    spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise UnreadableCheckpoint(
            f"{file.path}: tensor {name!r} is {spec}, {spec.nbytes} bytes, but its header entry spans bytes "
            f"{begin} to {end}. The header does not describe the data; write the file again."
        )
    if start + end > file.size:
        raise UnreadableCheckpoint(
            f"{file.path}: tensor {name!r} ends at byte {start + end}, but the file has {file.size} bytes. "
            "It is truncated; copy or download it again."
        )
    return FileTensor(file, spec, start + begin)


def _check_cover(file: DataFile, start: int, tensors: Mapping[str, FileTensor]) -> None:
    """The format demands that tensors follow one another without holes, up to the end of the file."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].spec.nbytes)):
        if tensor.offset != position:
            raise UnreadableCheckpoint(
                f"{file.path}: tensor {name!r} begins at byte {tensor.offset} where byte {position} was "
                "expected: the header describes overlapping tensors or holes. Write the file again."
            )
        position += tensor.spec.nbytes
    if position != file.size:
        raise UnreadableCheckpoint(
            f"{file.path}: the tensors end at byte {position}, but the file has {file.size} bytes. Write it again."
        )


def layout(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Plan a safetensors file.

    Wide element types come first and names are sorted, as the safetensors package does, so that every tensor
    is aligned and equal content gives equal bytes.

    Returns:
        The first bytes of the file (length and header), the byte offset of each tensor, and the file's size.

    Raises:
        UnwritableOutput: A type that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, position = {}, 0
    for name in sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name)):
        spec = specs[name]
        if spec.dtype not in _CODES:
            raise UnwritableOutput(
                f"safetensors cannot hold {spec.dtype}, the type of tensor {name!r}. Save it in torch's format (.pt)."
            )
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        offsets[name] = position
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {k: start + v for k, v in offsets.items()}, start + position
