"""Which format a file has, and where in it the weights stand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.data_file import DataFile
from lightning_soup.weights.inert_pickle import Placeholder
from lightning_soup.weights.plain_values import plain_values
from lightning_soup.weights.safetensors_format import looks_like_safetensors, read_safetensors
from lightning_soup.weights.stored_tensor import StoredTensor
from lightning_soup.weights.torch_format import LEGACY_HEAD, ZIP_HEAD, read_legacy, read_zip
from lightning_soup.weights.torch_records import StoredRecord
from lightning_soup.weights.weights_file import PROVENANCE_KEY, WeightsFile, clean_names

LIGHTNING_VERSION = "pytorch-lightning_version"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_AVERAGE_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_RAW_KEYS = ("state_dict", "model_state_dict", "model", "module", "params", "net")
WEIGHT_KEYS = _RAW_KEYS + _AVERAGE_KEYS
LIVE_KEY = "current_model_state"
"""Where a checkpoint holds what is being trained, if under ``state_dict`` it holds something else: an average of it, or
the plain model of one with experts. It is where Lightning's averaging callbacks put it."""
CLASS_NAMES_KEY = "class_names"
"""Where a checkpoint names the classes in the order of the model's outputs."""
EXPERTS_KEY = "lightning_soup_experts"
"""Where a checkpoint says which layers have experts in training, and how many."""
ADAPTER_KEY = "lightning_soup_adapter"
"""Where a checkpoint of a whole model says how the PEFT adapter in it is configured (``adapter_config.json``)."""


def open_file(path: Path, which: str) -> WeightsFile:
    """Open a file by what it holds, whatever its suffix says."""
    if not path.exists():
        hint = " One file is opened here, not a pattern." if "*" in path.name else ""
        hint += " It is a symbolic link that leads nowhere." if path.is_symlink() else ""
        raise UnreadableCheckpoint(f"{path}: no such file or folder. Check the path of the checkpoint.{hint}")
    if not path.is_file():
        raise UnreadableCheckpoint(f"{path}: neither a file nor a folder (a pipe or device). Save it to a file first.")
    file = DataFile(path)
    with file.held():
        head = bytes(file.read(0, min(64, file.size)))
        if head.startswith(ZIP_HEAD):
            content, scripted = read_zip(file)
            if scripted:
                return weights_of(_script_tensors(content), path, "torchscript")
            return find_weights(content, path, which)
        if head.startswith(LEGACY_HEAD):
            return find_weights(read_legacy(file), path, which)
        if looks_like_safetensors(head):
            tensors, metadata = read_safetensors(file)
            for dropped, kept in metadata.items():  # the format's convention for tied tensors, written once
                if dropped not in tensors and kept in tensors and (dropped, kept) != ("format", "pt"):
                    tensors[dropped] = tensors[kept]
            return weights_of(tensors, path, "safetensors", metadata=metadata)
    raise UnreadableCheckpoint(f"{path}: {_describe(head, file.size)}")


def _describe(head: bytes, size: int) -> str:
    """What a file is that holds no weights, in words that help."""
    text = head.lstrip().lower()
    if size == 0:
        return "the file is empty (0 bytes). Writing or downloading it was interrupted; get it again."
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "this is a web page, not weights: an error or login page answered the download. Get it again."
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


def find_weights(content: Any, path: Path, which: str) -> WeightsFile:
    """Find the weights in what a torch.save file or a distributed checkpoint holds."""
    if not isinstance(content, dict) or (isinstance(content, Placeholder) and not content):
        raise UnreadableCheckpoint(
            f"{path}: holds one object ({_kind(content)}), expected a state dict or a checkpoint with one. "
            "Save module.state_dict() instead."
        )
    if _is_weights(content) and not any(_is_weights(content.get(key)) for key in WEIGHT_KEYS):
        stamp = getattr(content, "state", {}).get("_metadata")
        return weights_of(content, path, "torch", beside=_stamp(stamp))
    lightning = LIGHTNING_VERSION in content
    if which not in ("average", "raw"):
        return _named_average(content, path, which)
    keys = (_RAW_KEYS + _AVERAGE_KEYS) if which == "raw" or lightning else (_AVERAGE_KEYS + _RAW_KEYS)
    if lightning and which == "raw":
        keys = (LIVE_KEY, *keys)
    for key in keys:
        if _is_weights(content.get(key)):
            beside = {name: value for name, value in content.items() if name != key}
            return weights_of(content[key], path, "lightning" if lightning else "torch", key=key, beside=beside)
    for key in keys:
        if isinstance(content.get(key), Placeholder):
            raise UnreadableCheckpoint(
                f"{path}: {key!r} is a whole object ({content[key].name}), which would have to be unpickled. "
                "Save its state_dict() instead."
            )
    shown = ", ".join(f"{name!r} ({_kind(value)})" for name, value in list(content.items())[:8])
    raise UnreadableCheckpoint(
        f"{path}: no weights found. It holds {shown or 'nothing'}; expected tensors at the top or under one "
        f"of {', '.join(WEIGHT_KEYS)}."
    )


def _named_average(content: Mapping[str, Any], path: Path, which: str) -> WeightsFile:
    """One of the live averages that a Lightning checkpoint holds; what it left out is as in the live weights.

    Where those have experts, the average is that of the plain model, as is ``state_dict``.
    """
    callbacks = content.get("callbacks")
    states = [state for state in callbacks.values() if isinstance(state, dict)] if isinstance(callbacks, dict) else []
    averages = {s["name"]: s["average"] for s in states if _is_weights(s.get("average")) and "name" in s}
    if which not in averages:
        held = ", ".join(map(repr, averages)) or "none"
        raise UnreadableCheckpoint(
            f"{path}: holds no live average {which!r} (of those it holds {held}). Expected which='average', 'raw' or "
            "the name of one of them."
        )
    key = LIVE_KEY if _is_weights(content.get(LIVE_KEY)) else "state_dict"
    live, plain = content.get(key), content.get("state_dict")
    if not _is_weights(live) or not _is_weights(plain):
        raise UnreadableCheckpoint(f"{path}: holds the average {which!r} but not the weights around it.")
    names = clean_names([name for name in plain if isinstance(name, str)], str(path))
    merged = {name: averages[which].get(names.get(name), live.get(name, value)) for name, value in plain.items()}
    beside = {name: value for name, value in content.items() if name != key}
    return weights_of(merged, path, "lightning", key=key, beside=beside)


def _kind(value: Any) -> str:
    if isinstance(value, Placeholder):
        return value.name
    return "Tensor" if isinstance(value, StoredRecord) else type(value).__name__.removeprefix("Stateful").lower()


def _stamp(state_metadata: Any) -> dict[str, Any]:
    """The provenance of a bare state dict, which stands where torch keeps the versions of modules."""
    stamp = state_metadata.get(PROVENANCE_KEY) if isinstance(state_metadata, dict) else None
    return stamp if isinstance(stamp, dict) else {}


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, StoredRecord | StoredTensor) for item in value.values())


def weights_of(
    found: Mapping[str, Any],
    path: Path,
    format: str,
    *,
    key: str | None = None,
    beside: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> WeightsFile:
    """Resolve the tensors among what was found, clean their names, and keep what is plain beside them.

    Args:
        found: The entries of a state dict, tensors as :class:`.StoredRecord` or stored tensors.
        path: The file or folder.
        format: As in :class:`.WeightsFile`.
        key: The entry of the file that held the weights.
        beside: What stood beside that entry.
        metadata: What is plain already, instead of ``beside``.
    """
    tensors: dict[str, StoredTensor] = {}
    dropped = []
    for name, value in found.items():
        if not isinstance(name, str):
            raise UnreadableCheckpoint(f"{path}: a tensor is named {name!r}; expected names that are strings.")
        if isinstance(value, StoredRecord):
            tensors[name] = value.resolve(name)
        elif isinstance(value, StoredTensor):
            tensors[name] = value
        elif isinstance(value, Placeholder) and not name.endswith("_extra_state"):
            raise UnreadableCheckpoint(
                f"{path}: {name!r} is a {value.name} and not a plain tensor. Only dense, unquantised "
                "tensors can be averaged; convert it and save again."
            )
        else:
            dropped.append(name)
    if "n_averaged" in tensors and all(name.startswith("module.") for name in tensors if name != "n_averaged"):
        del tensors["n_averaged"]  # the counter of torch's AveragedModel is not part of the model
    if not tensors:
        raise UnreadableCheckpoint(f"{path}: holds no tensors.")
    names = clean_names(tensors, str(path))
    plain, foreign = plain_values(beside or {})
    return WeightsFile(
        {names[name]: tensor for name, tensor in tensors.items()},
        label=path.name,
        path=path,
        format=format,
        key=key,
        original_names={short: name for name, short in names.items()},
        metadata=plain if metadata is None else metadata,
        dropped=[*dropped, *foreign],
    )


def _script_tensors(content: Any) -> dict[str, StoredRecord]:
    """The tensors of a TorchScript archive, named by the path of attributes that leads to them."""
    found: dict[str, StoredRecord] = {}
    seen = 0

    def walk(value: Any, prefix: str, depth: int) -> None:
        nonlocal seen
        seen += 1
        if isinstance(value, StoredRecord):
            found[prefix] = value
        elif isinstance(value, Placeholder) and depth < _MAX_DEPTH and seen < _MAX_ATTRIBUTES:
            for name, item in value.state.items():
                walk(item, f"{prefix}.{name}" if prefix else str(name), depth + 1)

    walk(content, "", 0)
    return found


_MAX_ATTRIBUTES, _MAX_DEPTH = 100_000, 100  # of a module tree; a damaged one may hold itself
