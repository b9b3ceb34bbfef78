"""Folders of torch.distributed.checkpoint: an index and ``.distcp`` files full of shards.

Each shard is a ``torch.save`` archive of its own in the middle of a file. Only the index (:mod:`.distributed_index`)
is read here; an archive is looked into when the first element of its shard is asked for. Beside them, Lightning and
Fabric write what is not sharded into ``meta.pt``.
"""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.data_file import DataFile
from lightning_soup.weights.distributed_index import INDEX_NAME, SAVE_AGAIN, DistributedIndex, ShardEntry
from lightning_soup.weights.formats import LIGHTNING_VERSION, WEIGHT_KEYS, find_weights
from lightning_soup.weights.stored_tensor import FileTensor, Piece, PiecewiseTensor, TensorSpec
from lightning_soup.weights.torch_format import read_zip
from lightning_soup.weights.torch_records import Extent, StoredRecord
from lightning_soup.weights.weights_file import WeightsFile

_REST_NAME = "meta.pt"
_Keys = tuple[str, ...]


def is_distributed(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint, be it a damaged one."""
    return (folder / INDEX_NAME).is_file() or any(folder.glob("*.distcp"))


def open_distributed(folder: Path, which: str) -> WeightsFile:
    """Open the weights of a distributed checkpoint. Optimizer state in it is not looked at.

    Args:
        folder: The folder.
        which: As in :func:`.open_checkpoint`. Lightning's raw weights and live averages stand in ``meta.pt``.

    Raises:
        UnreadableCheckpoint: The index is missing or damaged, a shard file is missing or too short, shards do not make
            up their tensor, or there are no weights.
    """
    if not (folder / INDEX_NAME).is_file():
        raise UnreadableCheckpoint(
            f"{folder}: holds .distcp files but no {INDEX_NAME}, which is written last. Saving was interrupted, or "
            "each rank saved for itself (without rank coordination); save it again."
        )
    index = DistributedIndex(folder / INDEX_NAME)
    keys, wrapper = _unwrapped(_without_optimizer(_keys(index)))
    files = _ShardFiles(folder)
    nested: dict[str, Any] = {}
    flat: dict[str, Any] = {}
    for name, (top, *rest) in keys.items():
        spec, shards = index.tensor(name)
        pieces = [Piece(shard.start, files.shard(name, TensorSpec(spec.dtype, shard.shape), shard)) for shard in shards]
        place, key = (nested.setdefault(top, {}), ".".join(rest)) if rest else (flat, top)
        place[key] = PiecewiseTensor(spec, pieces)
    rest = _rest(folder)
    if LIGHTNING_VERSION in rest and "state_dict" not in nested and "model" in nested:
        nested["state_dict"] = nested.pop("model")  # Lightning's FSDPStrategy names it otherwise than all others
    opened = find_weights({**rest, **nested, **flat}, folder, which)
    if opened.format == "torch":
        opened.format = "torch distributed"
    if opened.key is None and wrapper:
        opened.key = wrapper[-1]
    return opened


def _rest(folder: Path) -> dict[str, Any]:
    """What is not sharded."""
    if not (folder / _REST_NAME).is_file():
        return {}
    file = DataFile(folder / _REST_NAME)
    with file.held():
        content, _ = read_zip(file)
    return dict(content) if isinstance(content, dict) else {}


# ------------------------------------------------------------------------------------------------------
# names: torch joins the keys of nested dictionaries with dots


def _keys(index: DistributedIndex) -> dict[str, _Keys]:
    """The keys that lead to each tensor; guessed from its name where the writer did not keep them."""
    found: dict[str, _Keys] = {name: (name,) for name in index.names}
    if index.keys:
        kept = {name: keys for name in found if isinstance(keys := index.keys.get(name), tuple) and keys}
        return found | {name: tuple(map(str, keys)) for name, keys in kept.items()}
    tops = {name.partition(".")[0] for name in found}
    if tops & set(WEIGHT_KEYS) and all(top in WEIGHT_KEYS or top.startswith("optim") for top in tops):
        return {name: tuple(name.split(".", 1)) for name in found}
    return found


def _without_optimizer(keys: Mapping[str, _Keys]) -> dict[str, _Keys]:
    """Leave out ``optimizer``, ``optim``, ``optimizer_0`` and the like."""
    return {name: path for name, path in keys.items() if len(path) == 1 or not path[0].startswith("optim")}


def _unwrapped(keys: dict[str, _Keys]) -> tuple[dict[str, _Keys], _Keys]:
    """Take off keys around everything else: an application's (``{"app": {"model": …}}``), or the model's own name."""
    wrapper: _Keys = ()
    while True:
        tops = {path[0] for path in keys.values()}
        if len(tops) != 1 or tops & set(WEIGHT_KEYS) or any(len(path) == 1 for path in keys.values()):
            return keys, wrapper
        wrapper += tuple(tops)
        keys = _without_optimizer({name: path[1:] for name, path in keys.items()})


# ------------------------------------------------------------------------------------------------------
# shards


class _Shard:
    """A shard at rest."""

    __slots__ = ("_found", "extent", "file", "name", "spec")

    def __init__(self, file: DataFile, extent: Extent, spec: TensorSpec, name: str) -> None:
        self.file, self.extent, self.spec, self.name = file, extent, spec, name
        self._found: FileTensor | None = None

    @property
    def identity(self) -> Hashable:
        """As in :class:`.FileTensor`."""
        return self.file.place, self.extent, self.spec

    def fill(self, start: int, values: Tensor, data: memoryview) -> None:
        """As in :class:`.FileTensor`."""
        if self._found is None:  # two threads may both look, and find the same
            self._found = self._look()
        self._found.fill(start, values, data)

    def _look(self) -> FileTensor:
        with self.file.held():
            content, _ = read_zip(self.file, self.extent)
            if isinstance(content, StoredRecord) and content.spec == self.spec:
                return content.resolve(self.name)
        found = content.spec if isinstance(content, StoredRecord) else getattr(content, "name", type(content).__name__)
        raise UnreadableCheckpoint(
            f"{self.file.path}: at byte {self.extent.start} lies a {found}, where {INDEX_NAME} says that a shard of "
            f"{self.name!r} ({self.spec}) is. Only dense, unquantised tensors can be averaged; if this is one, the "
            f"folder is damaged or mixed from two checkpoints. {SAVE_AGAIN}"
        )


class _ShardFiles:
    """The files of a folder, looked up once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = {path.name for path in folder.iterdir() if path.is_file()}
        self._opened: dict[str, DataFile] = {}

    def shard(self, name: str, spec: TensorSpec, entry: ShardEntry) -> _Shard:
        """Find the file of a shard, and check that it reaches that far."""
        if entry.file_name not in self._names:  # so no path leads out of the folder
            raise UnreadableCheckpoint(
                f"{self._folder}: {entry.file_name!r} is missing, the file that holds a shard of {name!r}. {SAVE_AGAIN}"
            )
        if entry.file_name not in self._opened:
            self._opened[entry.file_name] = DataFile(self._folder / entry.file_name)
        file, end = self._opened[entry.file_name], entry.extent.start + entry.extent.size
        if end > file.size:
            raise UnreadableCheckpoint(
                f"{file.path}: ends at byte {file.size}, but a shard of {name!r} reaches to byte {end}. The file is "
                f"truncated. {SAVE_AGAIN}"
            )
        return _Shard(file, entry.extent, spec, name)
