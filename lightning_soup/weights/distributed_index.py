"""The index of a torch.distributed.checkpoint folder: which rectangular shards a tensor has, and where each lies.

The index is a pickle, ``.metadata``, of a few dataclasses. They are not made here: as any object of a foreign file
they come as placeholders that hold what the pickle puts into them.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.inert_pickle import Placeholder, load_inert, pickle_end
from lightning_soup.weights.stored_tensor import TensorSpec
from lightning_soup.weights.torch_records import BUILDERS, MAX_BYTES, Extent

INDEX_NAME = ".metadata"
SAVE_AGAIN = "Copy the whole folder again, or save the checkpoint again."


class ShardEntry(NamedTuple):
    """A shard as the index describes it.

    Attributes:
        start: Where its first element lies in the tensor.
        shape: Its shape.
        file_name: The file that holds it.
        extent: The bytes of that file that hold it.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file_name: str
    extent: Extent


class _Properties(Placeholder):
    """A tensor's element type and other properties, which are pickled as a tuple."""

    dtype: torch.dtype | None = None

    def __setstate__(self, state: object) -> None:
        values = state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
        self.dtype = next((value for value in values if isinstance(value, torch.dtype)), None)


_BUILDERS = {
    **BUILDERS,
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): _Properties,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): _Properties,  # before torch 2.3
}


class DistributedIndex:
    """What ``.metadata`` says. Tensors are checked when they are asked for (:meth:`tensor`), so only those wanted are.

    Args:
        path: The file.

    Attributes:
        names: The names of all tensors, optimizer state among them.
        keys: For each name the keys of the nested dictionaries that led to it, unless the writer left that out.

    Raises:
        UnreadableCheckpoint: It is damaged, something else, or holds no tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        try:
            content = load_inert(data[: pickle_end(data)], _BUILDERS, _no_storage)
        except Exception as error:  # a damaged pickle can fail in any way
            raise UnreadableCheckpoint(
                f"{path}: cannot be read ({type(error).__name__}: {error}). It is damaged or truncated. {SAVE_AGAIN}"
            ) from error
        entries, places = self._mapping(content, "state_dict_metadata"), self._mapping(content, "storage_data")
        self._tensors = {name: value.state for name, value in entries.items() if _is(value, "TensorStorageMetadata")}
        self._places = {_place_of(index): value for index, value in places.items()}
        if not self._tensors:
            raise UnreadableCheckpoint(f"{path}: a distributed checkpoint without tensors. Save the weights in it.")
        if not all(isinstance(name, str) for name in self._tensors):
            raise self._damaged("a name in it is not a string.")
        lists = [state.get("chunks") for state in self._tensors.values()]
        if not all(isinstance(chunks, list) for chunks in lists) or sum(map(len, lists)) > len(data):
            raise self._damaged("its lists of shards are wrong.")
        self.names = list(self._tensors)
        keys = content.state.get("planner_data")
        self.keys: Mapping[Any, Any] = keys if isinstance(keys, dict) else {}

    def tensor(self, name: str) -> tuple[TensorSpec, list[ShardEntry]]:
        """Type and shape of a tensor, and the shards that are it.

        Raises:
            UnreadableCheckpoint: They are not: one lies outside, has no place in a file, or overlaps another, or they
                do not cover the tensor.
        """
        state = self._tensors[name]
        dtype, shape = getattr(state.get("properties"), "dtype", None), state.get("size")
        if not isinstance(dtype, torch.dtype) or not _counts(shape):
            raise self._damaged(f"tensor {name!r} has no element type or shape.")
        spec = TensorSpec(dtype, shape)
        what = f"tensor {name!r} ({spec})"
        if spec.nbytes > MAX_BYTES:
            raise self._damaged(f"{what} is impossibly large.")
        shards = []
        for chunk in state["chunks"]:
            part = chunk.state if _is(chunk, "ChunkStorageMetadata") else {}
            start, size = part.get("offsets"), part.get("sizes")
            if not _counts(start) or not _counts(size) or not len(start) == len(size) == len(shape):
                raise self._damaged(f"{what} has a shard without a place.")
            if any(a + n > length for a, n, length in zip(start, size, shape, strict=True)):
                raise self._damaged(f"{what} has a shard of {list(size)} at {list(start)}, which lies outside of it.")
            if math.prod(size):  # a rank may hold nothing of a small tensor
                shards.append(ShardEntry(start, size, *self._place(name, start, what)))
        held = sum(math.prod(shard.shape) for shard in shards)
        two = _overlapping(shards)
        if two:
            raise self._damaged(f"{what} has shards at {list(two[0].start)} and {list(two[1].start)} that overlap.")
        if held != spec.numel:
            raise self._damaged(f"{what} has shards for {held} of its {spec.numel} elements.")
        return spec, shards

    def _place(self, name: str, start: tuple[int, ...], what: str) -> tuple[str, Extent]:
        """The file and the bytes that hold a shard."""
        info = self._places.get((name, start))
        state = info.state if _is(info, "_StorageInfo") else {}
        file_name, extent = state.get("relative_path"), (state.get("offset"), state.get("length"))
        if not isinstance(file_name, str) or not _counts(extent):
            raise self._damaged(f"it does not say in which bytes of which file the shard of {what} at {start} lies.")
        if state.get("transform_descriptors"):
            raise UnreadableCheckpoint(
                f"{self.path}: the shards of {what} are compressed or encrypted. Save them without extensions."
            )
        return file_name, Extent(*extent)

    def _mapping(self, content: object, name: str) -> dict[Any, Any]:
        found = content.state.get(name) if _is(content, "Metadata") else None
        if not isinstance(found, dict) or isinstance(found, Placeholder):
            kind = content.name if isinstance(content, Placeholder) else type(content).__name__
            raise self._damaged(f"not the index of a distributed checkpoint (a {kind} without {name}).")
        return found

    def _damaged(self, what: str) -> UnreadableCheckpoint:
        return UnreadableCheckpoint(f"{self.path}: {what} The file is damaged. {SAVE_AGAIN}")


def _no_storage(_pid: object) -> Placeholder:
    return Placeholder()


def _is(value: object, name: str) -> bool:
    """Whether an object of the pickle is of a class. torch has moved these classes between modules."""
    return isinstance(value, Placeholder) and value.name.rpartition(".")[2] == name


def _place_of(index: object) -> Hashable:
    """Name and first element of a shard, from its key in the index."""
    name, start = (index.state.get("fqn"), index.state.get("offset")) if _is(index, "MetadataIndex") else (None, None)
    return (name, start) if isinstance(name, str) and _counts(start) else None


def _counts(value: object) -> bool:
    return isinstance(value, tuple) and all(type(count) is int and 0 <= count < 1 << 62 for count in value)


def _overlapping(shards: Sequence[ShardEntry]) -> tuple[ShardEntry, ShardEntry] | None:
    """Two shards that have an element in common."""

    def stop(shard: ShardEntry, dimension: int) -> int:
        return shard.start[dimension] + shard.shape[dimension]

    dimensions = range(len(shards[0].start) if shards else 0)
    # Sorted by the dimension with the most cuts, a shard can overlap few others: those that have not ended yet.
    by = max(dimensions, key=lambda d: len({shard.start[d] for shard in shards}), default=None)
    unended: list[ShardEntry] = []
    for shard in shards if by is None else sorted(shards, key=lambda shard: shard.start[by]):
        unended = [other for other in unended if by is None or stop(other, by) > shard.start[by]]
        for other in unended:
            if all(shard.start[d] < stop(other, d) and other.start[d] < stop(shard, d) for d in dimensions):
                return other, shard
        unended.append(shard)
    return None
