"""Opening a checkpoint of any format as a read-only mapping of memory-mapped tensors."""

import copy
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.data_file import hold
from lightning_soup.weights.soup_record import check_record
from lightning_soup.weights.stored_tensor import MemoryTensor, Scratch, StoredTensor, TensorSpec

Source = str | os.PathLike | Mapping[str, Tensor] | nn.Module
PROVENANCE_KEY = "lightning_soup"
_HASH_CHUNK = 1 << 20


class WeightsFile(Mapping[str, Tensor]):
    """Weights at rest: names, shapes and dtypes are known at once, data is read only when it is asked for.

    Made by :func:`open_checkpoint`. Indexing gives memory-mapped tensors. Writing into one never changes the
    file, but does show in later accesses through this object: clone before writing. Those of a distributed checkpoint
    are put together anew for each access.

    Attributes:
        label: Short name for messages and plots: the file's name.
        path: The file or folder, or ``None`` for weights in memory.
        format: ``"safetensors"``, ``"safetensors shards"``, ``"torch shards"``, ``"lightning"``, ``"torch"``,
            ``"torchscript"``, ``"torch distributed"``, ``"peft adapter"`` or ``"memory"``.
        key: The entry of the file that held the weights (``"state_dict"``, ``"model"``, …), or ``None``.
        original_names: The names as they stand in the source, by cleaned name.
        metadata: Plain values that stood beside the weights. For a Lightning file: ``hyper_parameters``,
            ``epoch``, ``global_step``, ``callbacks``.
        dropped: Names of entries beside the weights that are objects of foreign classes and were not opened.
        tensors: The stored tensors by name, for the kernel.
        left_out: Names of tensors of the source that :meth:`without` took away.
    """

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        *,
        label: str,
        path: Path | None = None,
        format: str = "memory",
        key: str | None = None,
        original_names: Mapping[str, str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        dropped: Iterable[str] = (),
    ) -> None:
        self.tensors = dict(tensors)
        self.label = label
        self.path = None if path is None else Path(os.path.abspath(path))  # the program may change its folder
        self.format = format
        self.key = key
        self.original_names = dict(original_names or {name: name for name in self.tensors})
        self.metadata = dict(metadata or {})
        self.dropped = tuple(dropped)
        self.left_out: tuple[str, ...] = ()
        self._digest: str | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"WeightsFile({str(self.path or self.label)!r}, {self.format}, {len(self)} tensors)"

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Element type and shape of every tensor, without reading data."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        """Number of floating-point elements, tied tensors counted once."""
        tied = {name for names in self.ties for name in names[1:]}
        return sum(
            spec.numel
            for name, spec in self.specs.items()
            if name not in tied and (spec.dtype.is_floating_point or spec.dtype.is_complex)
        )

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names that share one storage, such as an embedding and the output layer tied to it."""
        groups: dict[Any, list[str]] = {}
        for name, tensor in self.tensors.items():
            groups.setdefault(tensor.identity, []).append(name)
        return tuple(tuple(names) for names in groups.values() if len(names) > 1)

    def without(self, prefixes: tuple[str, ...]) -> "WeightsFile":
        """These weights without the tensors whose names begin so; this very object where there are none."""
        return self._leaving_out({name for name in self.tensors if name.startswith(prefixes)} if prefixes else set())

    def only(self, names: Collection[str]) -> "WeightsFile":
        """Some of these tensors; this very object where they are all."""
        return self._leaving_out({name for name in self.tensors if name not in names})

    def _leaving_out(self, left_out: set[str]) -> "WeightsFile":
        if not left_out:
            return self
        kept = copy.copy(self)
        kept.tensors = {name: tensor for name, tensor in self.tensors.items() if name not in left_out}
        kept.original_names = {name: raw for name, raw in self.original_names.items() if name not in left_out}
        kept.left_out = (*self.left_out, *sorted(left_out))
        kept._digest = None
        return kept

    def replaced(self, tensors: Mapping[str, Tensor]) -> "WeightsFile":
        """These weights with some tensors replaced by others, of the same shapes, in memory."""
        changed = copy.copy(self)
        changed.tensors = self.tensors | {name: MemoryTensor(value) for name, value in tensors.items()}
        changed.path = changed._digest = None
        return changed

    def mapping_beside(self, name: str) -> dict[str, Any]:
        """An entry of the metadata that should be a mapping; empty where a foreign file has something else there."""
        value = self.metadata.get(name)
        return dict(value) if isinstance(value, Mapping) else {}

    @property
    def provenance(self) -> dict[str, Any] | None:
        """How the weights were cooked, where lightning_soup wrote them.

        Raises:
            UnreadableCheckpoint: It was changed and is not what lightning_soup writes any more.
        """
        text = self.metadata.get(PROVENANCE_KEY)
        if not isinstance(text, str):
            return None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UnreadableCheckpoint(f"{self.path or self.label}: its provenance is damaged ({error}).") from error
        if not isinstance(content, dict):
            return None
        check_record(content, self.path or self.label)
        return content

    def digest(self) -> str:
        """Content hash over names, types, shapes and data (XXH3, 128 bits): equal weights have equal digests.

        It does not depend on the file format. It finds changed and duplicate files; it is not a signature
        against someone who forges one.
        """
        if self._digest is None or self.path is None:  # weights in memory may have changed
            hasher = xxhash.xxh3_128()
            scratch = Scratch(_HASH_CHUNK)
            for name in sorted(self.tensors):
                tensor = self.tensors[name]
                hasher.update(f"{name}|{tensor.spec}|".encode())
                step = _HASH_CHUNK // tensor.spec.dtype.itemsize
                with hold(tensor.files):
                    for start in range(0, tensor.spec.numel, step):
                        hasher.update(tensor.read(start, min(start + step, tensor.spec.numel), scratch)[1])
            self._digest = f"xxh3-128:{hasher.hexdigest()}"
        return self._digest


def open_checkpoint(source: Source | WeightsFile, *, which: str | int = "average") -> WeightsFile:
    """Open weights of any supported format without reading them and without running code from the file.

    Formats, told apart by their content and not by their suffix: safetensors; ``torch.save`` files, old and
    new, whose weights stand at the top or under ``state_dict``, ``model``, ``model_state_dict``,
    ``state_dict_ema`` and the like; Lightning checkpoints; TorchScript archives; folders of shards with an
    ``*.index.json``; folders of torch.distributed.checkpoint (``.metadata`` and ``.distcp`` files); PEFT adapter
    folders; folders of replicas (:class:`.ReplicaStrategy`); folders with one weights file;
    ``wandb:entity/project/artifact:version``. The wrapper prefixes ``module.`` and ``_orig_mod.`` are removed from
    names.

    Args:
        source: A path, a mapping from name to tensor, a module, or an opened file (returned as it is).
        which: Files that hold an average and the raw weights (Lightning's averaging callbacks, timm's
            ``state_dict_ema``) open as the average; ``"raw"`` opens the weights as training left them, and the name
            of a live average (``"ema"``, …) that one of several. Of a folder of replicas, a rank opens that replica,
            and ``"mean"``, or nothing, the mean of all.

    Returns:
        The opened weights.

    Raises:
        UnreadableCheckpoint: The source does not exist, is damaged, holds no weights, or no average of that name.

    Example:
        >>> import torch
        >>> weights = open_checkpoint(torch.nn.Linear(2, 3))
        >>> {name: str(spec) for name, spec in weights.specs.items()}
        {'weight': 'float32 [3, 2]', 'bias': 'float32 [3]'}
    """
    if isinstance(which, bool) or not isinstance(which, (str, int)) or which == "":
        raise ValueError(f"which={which!r}: expected 'average', 'raw', the name of a live average, or a rank.")
    if isinstance(source, WeightsFile):
        return source
    if isinstance(source, nn.Module):
        return _open_module(source)
    if isinstance(source, Mapping):
        return _open_mapping(source, f"weights in memory ({len(source)} tensors)")
    from lightning_soup.weights.opening import open_path  # the readers end in WeightsFile

    return open_path(source, str(which))


def _open_module(module: nn.Module) -> WeightsFile:
    return _open_mapping(module_tensors(module), type(module).__name__)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights: its state dict without extra state (``get_extra_state``) and without what metrics count."""
    counted = metric_prefixes(module)
    return {
        name: value
        for name, value in module.state_dict().items()
        if not name.startswith(counted) and (isinstance(value, Tensor) or not name.endswith("_extra_state"))
    }


def metric_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names that belong to torchmetrics' metrics inside a module.

    Their states are in the state dict once they were made persistent, but they are no weights.
    """
    metric = getattr(sys.modules.get("torchmetrics"), "Metric", None)  # without the package there is no metric
    if metric is None:
        return ()
    parts = module.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, part in parts if name and isinstance(part, metric))


def _open_mapping(weights: Mapping[str, Tensor], label: str) -> WeightsFile:
    if not weights:
        raise UnreadableCheckpoint(f"{label}: expected a mapping from names to tensors, got an empty one.")
    for name, value in weights.items():
        why = _why_not(name, value)
        if why:
            raise UnreadableCheckpoint(f"{label}: {name!r} {why}")
    names = clean_names(weights, label)
    tensors = {names[name]: MemoryTensor(value) for name, value in weights.items()}
    return WeightsFile(tensors, label=label, original_names={short: name for name, short in names.items()})


def _why_not(name: object, value: object) -> str | None:
    """Why an entry of a mapping cannot be averaged."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}; expected a mapping from names to tensors."
    if not isinstance(name, str):
        return "is not a string; expected a mapping from names to tensors."
    if is_lazy(value):
        return "has no shape yet. Run one batch through the module first."
    if value.is_meta:
        return "is on the meta device and has no data. Load or initialise the module first."
    if is_traceable_wrapper_subclass(value):
        return f"is a {type(value).__name__}, held in parts. Gather it first (full_tensor())."
    if value.layout != torch.strided or value.is_quantized:
        return "is sparse or quantised. Only dense, unquantised tensors can be averaged."
    return None


def clean_names(names: Iterable[str], label: str) -> dict[str, str]:
    """Map names to themselves without the prefixes that DDP (``module.``) and ``torch.compile`` leave behind.

    Raises:
        UnreadableCheckpoint: Two tensors would get the same name.
    """
    cleaned = {name: name.replace("_orig_mod.", "") for name in names}
    while cleaned and all(name.startswith("module.") for name in cleaned.values()):
        cleaned = {name: short.removeprefix("module.") for name, short in cleaned.items()}
    if len(set(cleaned.values())) != len(cleaned):
        raise UnreadableCheckpoint(f"{label}: holds tensors both with and without a wrapper prefix (_orig_mod.).")
    return cleaned
