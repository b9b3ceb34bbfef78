"""Writing weights: safetensors, or the format of the files they came from."""

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_soup.errors import UnwritableOutput
from lightning_soup.weights.atomic import atomic_path
from lightning_soup.weights.combine import combine
from lightning_soup.weights.weights_file import PROVENANCE_KEY, Source, WeightsFile, open_checkpoint

_LIGHTNING_ENTRIES = (
    "pytorch-lightning_version",
    "epoch",
    "global_step",
    "hparams_name",
    "hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
)


def save_weights(
    weights: Source | WeightsFile,
    path: str | os.PathLike,
    *,
    like: Source | WeightsFile | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights to a file, atomically.

    Args:
        weights: What :func:`.open_checkpoint` opens.
        path: ``.safetensors``, or ``.ckpt``, ``.pt``, ``.pth``, ``.bin`` for torch's format.
        like: For torch's format: a checkpoint whose shape is kept (the key under which the weights stand, their
            original names). A Lightning checkpoint stays loadable by ``load_from_checkpoint``: hyperparameters that
            are plain values are kept, others are left out and named in a warning; optimizer state is not copied.
        provenance: How the weights were made, as plain values; it travels in the file.

    Returns:
        The path.

    Raises:
        UnwritableOutput: The file cannot be written, or its suffix is unknown.
    """
    path = Path(path)
    opened = open_checkpoint(weights)
    stamp = {} if provenance is None else {PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)}
    if path.suffix == ".safetensors":
        combine([opened], [1.0], path, metadata=stamp)
        return path
    if path.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise UnwritableOutput(
            f"{path}: unknown suffix {path.suffix!r}. Expected .safetensors, .ckpt, .pt, .pth or .bin."
        )
    model = None if like is None else open_checkpoint(like)
    content = _content(opened, model, stamp)
    size = sum(spec.nbytes for spec in opened.specs.values())
    # Given a path, torch would write its name into the file; given a stream, equal content gives equal bytes.
    with atomic_path(path, size=size) as temporary, open(temporary, "wb") as stream:
        torch.save(content, stream)
    return path


def _content(opened: WeightsFile, like: WeightsFile | None, stamp: dict[str, str]) -> Mapping[str, Any]:
    original = like.original_names if like is not None else {}
    tensors = {name: opened[name] for name in opened}
    for names in opened.ties:  # one tensor object, so that torch writes one storage
        tensors |= {name: tensors[names[0]] for name in names}
    state = OrderedDict((original.get(name, name), tensor) for name, tensor in tensors.items())
    if like is None or like.key is None:
        if stamp:  # a bare state dict keeps its provenance where torch keeps the versions of modules
            state._metadata = OrderedDict({PROVENANCE_KEY: stamp})
        return state
    if like.format != "lightning":
        return {like.key: state, **stamp}
    foreign = [name for name in like.dropped if name.startswith("hyper_parameters")]
    if foreign:
        warnings.warn(
            f"{like.label}: left out of the new checkpoint, since they are not plain values: {', '.join(foreign)}. "
            "Pass them to load_from_checkpoint.",
            stacklevel=3,
        )
    entries = {name: like.metadata[name] for name in _LIGHTNING_ENTRIES if name in like.metadata}
    return {**entries, "state_dict": state, **stamp}
