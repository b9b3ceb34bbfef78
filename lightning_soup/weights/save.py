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
from lightning_soup.weights.atomic import atomic_path, check_writable
from lightning_soup.weights.combine import copy_weights
from lightning_soup.weights.compatibility import check_compatible
from lightning_soup.weights.weights_file import PROVENANCE_KEY, Source, WeightsFile, open_checkpoint

_LIGHTNING_VERSION = "pytorch-lightning_version"
_OLDEST_LIGHTNING = "2.4.0"  # every version that we support reads it without migration or warning
_LIGHTNING_ENTRIES = (
    _LIGHTNING_VERSION,
    "epoch",
    "global_step",
    "hparams_name",
    "hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
)


def check_output(path: str | os.PathLike) -> None:
    """Say before any work that a soup could not be written to ``path``.

    Raises:
        UnwritableOutput: An unknown suffix, a folder, or a place that cannot be written.
    """
    path = Path(path).expanduser()
    _check_suffix(path)
    check_writable(path)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise UnwritableOutput(
            f"{path}: unknown suffix {path.suffix!r}. Expected .safetensors, .ckpt, .pt, .pth or .bin."
        )


def save_weights(
    weights: Source | WeightsFile,
    path: str | os.PathLike,
    *,
    like: Source | WeightsFile | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights to a file, atomically and as they are: NaN is written too.

    Args:
        weights: What :func:`.open_checkpoint` opens.
        path: ``.safetensors``; ``.pt``, ``.pth`` or ``.bin`` for a bare state dict in torch's format;
            ``.ckpt`` for a Lightning checkpoint.
        like: For torch's format: a checkpoint whose shape is kept (the key under which the weights stand,
            their original names). A Lightning checkpoint stays loadable by ``load_from_checkpoint``:
            hyperparameters that are plain values are kept, others are left out and named in a warning;
            optimizer state is not copied.
        provenance: How the weights were made, as plain values; it travels in the file.

    Returns:
        The path.

    Raises:
        IncompatibleIngredients: ``like`` holds other tensors.
        UnwritableOutput: The file cannot be written, or its suffix is unknown.
    """
    path = Path(path)
    opened = open_checkpoint(weights)
    stamp = {} if provenance is None else {PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)}
    if path.suffix == ".safetensors":
        copy_weights(opened, path, stamp)
        return path
    _check_suffix(path)
    model = None if like is None else open_checkpoint(like)
    if model is not None:
        check_compatible([model, opened])
    content = _content(opened, model, stamp, lightning=path.suffix == ".ckpt")
    size = sum(spec.nbytes for spec in opened.specs.values())
    with atomic_path(path, size=size) as temporary:
        _save(content, temporary)
    return path


def _save(content: Mapping[str, Any], path: Path) -> None:
    try:
        with open(path, "wb") as stream:
            torch.save(content, stream)
    except RuntimeError as error:  # torch's writer hides what the file system, or Ctrl-C, said
        cause = error.__cause__ or error.__context__
        if isinstance(cause, (OSError, KeyboardInterrupt)):
            raise cause from error
        raise


def _content(
    opened: WeightsFile, like: WeightsFile | None, stamp: dict[str, str], *, lightning: bool
) -> Mapping[str, Any]:
    original = like.original_names if like is not None else {}
    # New tensors: on the CPU, without what else lay in their storages, tied ones as one object.
    state = OrderedDict((original.get(name, name), tensor) for name, tensor in copy_weights(opened).items())
    if like is not None and like.format == "lightning":
        foreign = [name for name in like.dropped if "hyper_parameters" in name.split(".")[0]]
        if foreign:
            warnings.warn(
                f"{like.label}: left out of the new checkpoint, since they are not plain values: "
                f"{', '.join(foreign)}. Pass them to load_from_checkpoint.",
                stacklevel=3,
            )
        entries = {name: like.metadata[name] for name in _LIGHTNING_ENTRIES if name in like.metadata}
        return {**entries, "state_dict": state, **stamp}
    if like is not None and like.key is not None:
        return {like.key: state, **stamp}
    if lightning:
        return {
            _LIGHTNING_VERSION: _OLDEST_LIGHTNING,
            "epoch": 0,
            "global_step": 0,
            "state_dict": state,
            **stamp,
        }
    if stamp:  # a bare state dict keeps its provenance where torch keeps the versions of modules
        state._metadata = OrderedDict({PROVENANCE_KEY: stamp})
    return state
