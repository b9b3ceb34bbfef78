"""What is kept of what stands beside the weights: numbers, strings, lists and dictionaries, nothing else."""

from collections.abc import Mapping
from typing import Any

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.inert_pickle import Placeholder
from lightning_soup.weights.torch_records import StoredRecord

# Optimizer and loop state is bulky and belongs to the run, not to the model.
_OF_THE_RUN = {"optimizer_states", "optimizer", "lr_schedulers", "loops", "scaler", "MixedPrecision"}
_MAX_DEPTH = 100
_MAX_VALUES = 100_000  # of one value written out: a list that holds one list twice, 40 times over, has 2^40
_DROP = object()


def plain_values(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split what an unpickled file holds into plain values and the names of everything else.

    Tensors of one element become numbers; other tensors, placeholders of foreign objects, and what nobody could write
    out (too deep, or too large because it holds itself again and again) are dropped.

    Returns:
        The plain values, and the dotted names of what was dropped.

    Example:
        >>> plain_values({"epoch": 3, "hyper_parameters": {"lr": 0.1, "net": Placeholder()}})
        ({'epoch': 3, 'hyper_parameters': {'lr': 0.1}}, ['hyper_parameters.net'])
    """
    dropped: list[str] = []
    kept: dict[int, Any] = {}  # by identity: an object that stands in many places is walked once
    sizes: dict[int, int] = {}  # how many values it has when written out

    def keep(value: Any, name: str, depth: int) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return value
        if id(value) not in kept:
            kept[id(value)] = _DROP  # also what a structure that holds itself finds
            kept[id(value)] = walk(value, name, depth + 1) if depth < _MAX_DEPTH else _DROP
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            sizes[id(value)] = 1 + sum(sizes.get(id(part), 1) for part in parts if kept.get(id(part)) is not _DROP)
            if sizes[id(value)] > _MAX_VALUES:
                kept[id(value)] = _DROP
        if kept[id(value)] is _DROP:
            dropped.append(name)
        return kept[id(value)]

    def walk(value: Any, name: str, depth: int) -> Any:
        if isinstance(value, StoredRecord):
            return _number(value, name)
        if isinstance(value, dict) and (value or not isinstance(value, Placeholder)):
            items = {key: keep(item, f"{name}.{key}" if name else str(key), depth) for key, item in value.items()}
            return {key: item for key, item in items.items() if item is not _DROP}
        if isinstance(value, (list, tuple)):
            items = [keep(item, f"{name}[{i}]", depth) for i, item in enumerate(value)]
            return type(value)(item for item in items if item is not _DROP)
        return _DROP

    return walk({key: value for key, value in content.items() if key not in _OF_THE_RUN}, "", 0), dropped


def _number(record: StoredRecord, name: str) -> Any:
    if record.spec.numel != 1:
        return _DROP
    try:
        return record.resolve(name).tensor().item()
    except (UnreadableCheckpoint, RuntimeError):  # torch has types that it cannot give as a number
        return _DROP
