"""Which format a path holds, and where in it the weights stand."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.artifacts import fetch_artifact
from lightning_soup.weights.pickle_format import LEGACY_HEAD, Placeholder, StoredRecord, read_legacy, read_zip
from lightning_soup.weights.safetensors_format import looks_like_safetensors, read_safetensors
from lightning_soup.weights.stored_tensor import DataFile, FileTensor
from lightning_soup.weights.weights_file import PROVENANCE_KEY, WeightsFile, clean_names

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_AVERAGE_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_RAW_KEYS = ("state_dict", "model_state_dict", "model", "module", "params", "net")
_FOLDER_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def open_path(source: str | os.PathLike, which: str) -> WeightsFile:
    """Open a file, a folder or an artifact reference; see :func:`.weights_file.open_checkpoint`."""
    text = os.fspath(source)
    path = fetch_artifact(text) if text.startswith("wandb:") else Path(text).expanduser()
    if path.is_dir():
        return _open_folder(path, which)
    if not path.exists():
        raise UnreadableCheckpoint(f"{path}: no such file or folder. Check the path of the checkpoint.")
    try:
        return _open_file(path, which)
    except PermissionError as error:
        raise UnreadableCheckpoint(f"{path}: no permission to read it.") from error


def _open_file(path: Path, which: str) -> WeightsFile:
    file = DataFile(path)
    with open(path, "rb") as stream:
        head = stream.read(64)
    if head.startswith(b"PK\x03\x04"):
        content, scripted = read_zip(file)
        if scripted:
            return _finish(_script_tensors(content), path, "torchscript")
        return _from_object(content, path, which)
    if head.startswith(LEGACY_HEAD):
        return _from_object(read_legacy(file), path, which)
    if looks_like_safetensors(head, file.size):
        tensors, metadata = read_safetensors(file)
        for dropped, kept in metadata.items():  # the format's convention for tied tensors, written once
            if dropped not in tensors and kept in tensors:
                tensors[dropped] = tensors[kept]
        return _finish(tensors, path, "safetensors", metadata=metadata)
    raise UnreadableCheckpoint(f"{path}: {_describe(head, file.size)}")


def _describe(head: bytes, size: int) -> str:
    """What a file is that holds no weights, in words that help."""
    text = head.lstrip().lower()
    if size == 0:
        return "the file is empty (0 bytes). Writing or downloading it was interrupted; get it again."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page, not weights. The download was answered by an error or login page; get it again."
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not weights. Run `git lfs pull` where it was cloned."
    if head.startswith(b"\x89HDF"):
        return "this is an HDF5 file (Keras). Export the weights as safetensors first."
    if head.startswith(b"\x80"):
        return "a pickle, but not one of torch.save. Only tensors are opened: save a state dict with torch.save."
    if b"ustar" in head or text.startswith(b"././@"):
        return "a torch.save file from before 2018 (tar). Load and save it again with a current torch."
    return (
        f"not a checkpoint (it begins with {head[:16]!r}). "
        "Expected safetensors, a torch.save file or a Lightning checkpoint; it may be damaged or truncated."
    )


def _from_object(content: Any, path: Path, which: str) -> WeightsFile:
    """Find the weights in what a torch.save file holds."""
    if not isinstance(content, dict) or (isinstance(content, Placeholder) and not content):
        what = content.name if isinstance(content, Placeholder) else type(content).__name__
        raise UnreadableCheckpoint(
            f"{path}: holds one object ({what}), expected a state dict or a checkpoint with one. "
            "Save module.state_dict() instead."
        )
    lightning = "pytorch-lightning_version" in content
    if which == "raw" and lightning and "current_model_state" in content:
        keys: tuple[str, ...] = ("current_model_state",)
    else:
        keys = (_RAW_KEYS + _AVERAGE_KEYS) if which == "raw" or lightning else (_AVERAGE_KEYS + _RAW_KEYS)
    if _is_weights(content):
        stamp = getattr(content, "state", {}).get("_metadata", {}).get(PROVENANCE_KEY, {})
        return _finish(content, path, "torch", beside=stamp)
    for key in keys:
        if _is_weights(content.get(key)):
            beside = {name: value for name, value in content.items() if name != key}
            return _finish(content[key], path, "lightning" if lightning else "torch", key=key, beside=beside)
    for key in keys:
        if isinstance(content.get(key), Placeholder):
            raise UnreadableCheckpoint(
                f"{path}: {key!r} is a whole object ({content[key].name}), which would have to be unpickled. "
                "Save its state_dict() instead."
            )
    shown = ", ".join(f"{name!r} ({type(value).__name__})" for name, value in list(content.items())[:8])
    raise UnreadableCheckpoint(
        f"{path}: no weights found. It holds {shown or 'nothing'}; expected tensors at the top or under one of "
        f"{', '.join(_RAW_KEYS + _AVERAGE_KEYS)}."
    )


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, (StoredRecord, FileTensor)) for item in value.values())


def _finish(
    found: Mapping[str, Any],
    path: Path,
    format: str,
    *,
    key: str | None = None,
    beside: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> WeightsFile:
    """Resolve records, clean names, and keep what is plain beside the weights."""
    tensors: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, StoredRecord):
            tensors[name] = value.resolve(name)
        elif isinstance(value, FileTensor):
            tensors[name] = value
        elif isinstance(value, Placeholder):
            raise UnreadableCheckpoint(
                f"{path}: {name!r} is a {value.name}, which is not a plain tensor. Only dense, unquantised tensors can "
                "be averaged; convert it and save again."
            )
    if "n_averaged" in tensors and all(name.startswith("module.") for name in tensors if name != "n_averaged"):
        del tensors["n_averaged"]  # the counter of torch's AveragedModel is not part of the model
    if not tensors:
        raise UnreadableCheckpoint(f"{path}: holds no tensors.")
    names = clean_names(tensors, str(path))
    plain, dropped = _plain(beside or {})
    return WeightsFile(
        {names[name]: tensor for name, tensor in tensors.items()},
        label=path.name,
        path=path,
        format=format,
        key=key,
        original_names={short: name for name, short in names.items()},
        metadata=plain if metadata is None else metadata,
        dropped=dropped,
    )


def _plain(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Split what stands beside the weights into plain values and the names of everything else."""
    dropped: list[str] = []

    def keep(value: Any, name: str) -> Any:
        if isinstance(value, StoredRecord) and value.spec.numel == 1:
            return value.resolve(name).tensor().item()
        if isinstance(value, dict) and (value or not isinstance(value, Placeholder)):
            items = {key: keep(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
            return {key: item for key, item in items.items() if item is not _DROP}
        if isinstance(value, (list, tuple)):
            kept = [keep(item, f"{name}[{i}]") for i, item in enumerate(value)]
            return type(value)(item for item in kept if item is not _DROP)
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return value
        dropped.append(name)
        return _DROP

    # Optimizer and loop state is bulky and belongs to the run, not to the model.
    skip = {"optimizer_states", "optimizer", "lr_schedulers", "loops", "scaler", "MixedPrecision"}
    return keep({key: value for key, value in content.items() if key not in skip}, ""), dropped


_DROP = object()


def _script_tensors(content: Any) -> dict[str, StoredRecord]:
    """The tensors of a TorchScript archive, named by the path of attributes that leads to them."""
    found: dict[str, StoredRecord] = {}
    stack = [("", content)]
    while stack:
        prefix, value = stack.pop()
        if isinstance(value, StoredRecord):
            found[prefix] = value
        elif isinstance(value, Placeholder):
            items = list(value.state.items())
            stack.extend((f"{prefix}.{name}" if prefix else name, item) for name, item in reversed(items))
    return found


def _open_folder(folder: Path, which: str) -> WeightsFile:
    if (folder / "adapter_config.json").exists():
        return _open_adapter(folder, which)
    indices = sorted(folder.glob("*.index.json"))
    if indices:
        return _open_shards(indices[0], which)
    if (folder / ".metadata").exists() and list(folder.glob("*.distcp")):
        raise UnreadableCheckpoint(
            f"{folder}: a distributed checkpoint, which is not supported yet. Convert it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
        )
    for name in _FOLDER_FILES:
        if (folder / name).exists():
            return _open_file(folder / name, which)
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if len(files) == 1:
        return _open_file(files[0], which)
    if files:
        shown = ", ".join(path.name for path in files[:4])
        raise UnreadableCheckpoint(f"{folder}: holds {len(files)} weights files ({shown}); name one of them.")
    raise UnreadableCheckpoint(
        f"{folder}: a folder without weights. Expected a file ending in {', '.join(WEIGHT_SUFFIXES)} or an *.index.json."
    )


def _open_shards(index: Path, which: str) -> WeightsFile:
    try:
        shards = json.loads(index.read_text())["weight_map"]
        names = sorted(set(shards.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableCheckpoint(f"{index}: not an index of shards (no 'weight_map'): {error!r}.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UnreadableCheckpoint(
            f"{index}: names {len(names)} shards, but {', '.join(missing[:4])} is missing. Download the folder again."
        )
    parts = {name: _open_file(index.parent / name, which) for name in names}
    absent = [name for name, shard in shards.items() if name not in parts[shard].original_names.values()]
    if absent:
        raise UnreadableCheckpoint(f"{index}: tensor {absent[0]!r} is not in {shards[absent[0]]}. Download it again.")
    tensors: dict[str, Any] = {}
    for part in parts.values():
        tensors |= {part.original_names.get(name, name): tensor for name, tensor in part.tensors.items()}
    kind = "safetensors" if names[0].endswith(".safetensors") else "torch"
    return _finish(tensors, index.parent, f"{kind} shards", metadata={})


def _open_adapter(folder: Path, which: str) -> WeightsFile:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            opened = _open_file(folder / name, which)
            opened.format, opened.label, opened.path = "peft adapter", folder.name, folder
            opened.metadata["adapter_config"] = json.loads((folder / "adapter_config.json").read_text())
            return opened
    raise UnreadableCheckpoint(f"{folder}: adapter_config.json without adapter_model.safetensors or adapter_model.bin.")
