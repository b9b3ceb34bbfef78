"""Opening a path: a file, an artifact, or a folder by the rules of those who write folders."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_soup.errors import LightningSoupError, UnreadableCheckpoint
from lightning_soup.weights.adapters import (
    ADAPTER_FORMAT,
    CONFIG_ENTRY,
    CONFIG_NAME,
    OLD_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from lightning_soup.weights.artifacts import fetch_artifact
from lightning_soup.weights.atomic import user_path
from lightning_soup.weights.distributed_format import is_distributed, open_distributed
from lightning_soup.weights.formats import WEIGHT_SUFFIXES, open_file, weights_of
from lightning_soup.weights.replica_folder import ReplicaManifest, is_replica_folder
from lightning_soup.weights.weights_file import WeightsFile

_FOLDER_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def open_path(source: str | os.PathLike, which: str) -> WeightsFile:
    """Open a file, a folder or an artifact reference; see :func:`.weights_file.open_checkpoint`."""
    text = os.fspath(source)
    path = fetch_artifact(text) if text.startswith("wandb:") else user_path(text)
    try:
        return _open_folder(path, which) if path.is_dir() else open_file(path, which)
    except LightningSoupError:
        raise
    except OSError as error:
        raise UnreadableCheckpoint(f"{path}: cannot be read ({error.strerror or error}).") from error


def _open_folder(folder: Path, which: str) -> WeightsFile:
    if is_replica_folder(folder):
        return _open_replicas(folder, which)
    if (folder / CONFIG_NAME).exists():
        return _open_adapter(folder, which)
    indices = sorted(folder.glob("*.index.json"), key=_index_rank)
    if indices and _index_rank(indices[0])[0] < len(WEIGHT_SUFFIXES):
        return _open_shards(indices[0], which)
    if is_distributed(folder):
        return open_distributed(folder, which)
    for name in _FOLDER_FILES:
        if (folder / name).exists():
            return open_file(folder / name, which)
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    if len(files) == 1:
        return open_file(files[0], which)
    if files:
        shown = ", ".join(path.name for path in files[:4])
        raise UnreadableCheckpoint(f"{folder}: holds {len(files)} weights files ({shown}); name one of them.")
    raise UnreadableCheckpoint(
        f"{folder}: a folder without weights. Expected a file ending in {', '.join(WEIGHT_SUFFIXES)} or an "
        "*.index.json."
    )


def _index_rank(index: Path) -> tuple[int, str]:
    """Safetensors first, formats of other frameworks (``tf_model.h5.index.json``) last."""
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    return (WEIGHT_SUFFIXES.index(suffix) if suffix in WEIGHT_SUFFIXES else len(WEIGHT_SUFFIXES)), index.name


def _open_shards(index: Path, which: str) -> WeightsFile:
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(_is_file_name, shards.values())):
        raise UnreadableCheckpoint(f"{index}: not an index of shards (no 'weight_map' from tensors to file names).")
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UnreadableCheckpoint(
            f"{index}: names {len(names)} shards, but {', '.join(missing[:4])} is missing. Download the folder again."
        )
    parts: dict[str, dict[str, Any]] = {}
    for name in names:
        part = open_file(index.parent / name, which)
        parts[name] = {part.original_names[short]: tensor for short, tensor in part.tensors.items()}
    absent = [name for name, shard in shards.items() if name not in parts[shard]]
    if absent:
        raise UnreadableCheckpoint(f"{index}: tensor {absent[0]!r} is not in {shards[absent[0]]}. Download it again.")
    tensors = {name: tensor for part in parts.values() for name, tensor in part.items()}
    tensors |= {name: parts[shard][name] for name, shard in shards.items()}
    kind = "safetensors" if names[0].endswith(".safetensors") else "torch"
    return weights_of(tensors, index.parent, f"{kind} shards", metadata={})


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and Path(value).name == value


def _open_replicas(folder: Path, which: str) -> WeightsFile:
    """One replica, by its rank, or the mean of all."""
    manifest = ReplicaManifest.read(folder)
    if which.isdecimal():
        opened = open_file(manifest.path(int(which)), "average")
        opened.label = f"{folder.name} replica {which}"
        return opened
    from lightning_soup.weights.combine import combine  # which opens what it combines

    inner = "average" if which == "mean" else which
    replicas = [open_file(manifest.path(rank), inner) for rank in range(manifest.world_size)]
    for rank, replica in enumerate(replicas):
        replica.label = f"{folder.name} replica {rank}"
    mean = replicas[0].replaced(combine(replicas, [1 / len(replicas)] * len(replicas)))
    mean.label, mean.path, mean.format = folder.name, Path(os.path.abspath(folder)), "replicas"
    return mean


def _open_adapter(folder: Path, which: str) -> WeightsFile:
    for name in (WEIGHTS_NAME, OLD_WEIGHTS_NAME):
        if (folder / name).exists():
            opened = open_file(folder / name, which)
            opened.format, opened.label, opened.path = ADAPTER_FORMAT, folder.name, Path(os.path.abspath(folder))
            opened.metadata[CONFIG_ENTRY] = dict(_json(folder / CONFIG_NAME))
            return opened
    raise UnreadableCheckpoint(
        f"{folder}: {CONFIG_NAME} without {WEIGHTS_NAME} or {OLD_WEIGHTS_NAME}. Download it again."
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UnreadableCheckpoint(f"{path}: not JSON ({error}). Download the folder again.") from error
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{path}: expected a JSON object. Download the folder again.")
    return content
