"""Distributed checkpoints: by torch's own writer, and by hand where ranks would be needed or damage is wanted."""

import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[Sequence[int], Sequence[int]]  # where a shard begins, and its shape


def save(content: Mapping[str, Any], folder: Path) -> Path:
    """Write a folder as one process that knows no others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(content), checkpoint_id=str(folder), no_dist=True)
    return folder


def grid(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Box]:
    """The boxes of a tensor that is cut at some places in each dimension."""
    sides = [list(itertools.pairwise([0, *c, n])) for n, c in zip(shape, cuts, strict=True)]
    return [([a for a, _ in box], [b - a for a, b in box]) for box in itertools.product(*sides)]


def write_shards(
    folder: Path,
    tensors: Mapping[str, tuple[Tensor, Sequence[Box]]],
    files: int = 2,
    change: Callable[[Metadata], Any] | None = None,
) -> Path:
    """Write a folder as ranks would that hold these boxes of tensors, which go to the files in turn.

    Args:
        folder: The folder.
        tensors: By key (``model.weight`` is the ``weight`` of ``model``), a tensor and its shards.
        files: How many.
        change: Changes the index before it is written.
    """
    folder.mkdir(exist_ok=True)
    entries, places, streams = {}, {}, [io.BytesIO() for _ in range(files)]
    turn = itertools.cycle(range(files))
    for name, (tensor, boxes) in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(start), torch.Size(shape)) for start, shape in boxes]
        entries[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
        for i, (start, shape) in enumerate(boxes):
            file = next(turn)
            offset = streams[file].tell()
            part = tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
            torch.save(part.clone(memory_format=torch.contiguous_format), streams[file])
            length = streams[file].tell() - offset
            places[MetadataIndex(name, start, i)] = _StorageInfo(f"__{file}_0.distcp", offset, length)
    entries["epoch"] = BytesStorageMetadata()
    offset = streams[0].tell()
    torch.save(3, streams[0])
    places[MetadataIndex("epoch")] = _StorageInfo("__0_0.distcp", offset, streams[0].tell() - offset)
    for i, stream in enumerate(streams):
        (folder / f"__{i}_0.distcp").write_bytes(stream.getvalue())
    keys = {name: tuple(name.split(".", 1)) for name in entries}
    index = Metadata(entries, keys, places)
    if change is not None:
        change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder
