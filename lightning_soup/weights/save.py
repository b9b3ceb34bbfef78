"""Writing weights: safetensors, or the format of the files they came from."""

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_soup.errors import UnwritableOutput
from lightning_soup.progress import Progress, silent
from lightning_soup.weights.atomic import check_replaceable, check_writable, user_path
from lightning_soup.weights.chunks import Part
from lightning_soup.weights.coefficients import Coefficients
from lightning_soup.weights.combine import plan_combination, plan_copy, safetensors_layout
from lightning_soup.weights.compatibility import check_compatible
from lightning_soup.weights.file_output import write_parts
from lightning_soup.weights.formats import ADAPTER_KEY, CLASS_NAMES_KEY, LIGHTNING_VERSION, WEIGHT_SUFFIXES
from lightning_soup.weights.torch_output import SavedTensor, torch_layout
from lightning_soup.weights.weights_file import PROVENANCE_KEY, Source, WeightsFile, open_checkpoint

_OLDEST_LIGHTNING = "2.4.0"  # every version that we support reads it without migration or warning
_LIGHTNING_ENTRIES = (
    LIGHTNING_VERSION,
    "epoch",
    "global_step",
    "hparams_name",
    "hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
    CLASS_NAMES_KEY,
    ADAPTER_KEY,
)


def check_output(path: str | os.PathLike, *, folder: Collection[str] = ()) -> None:
    """Say before any work that a soup could not be written to ``path``.

    Args:
        path: Where it will be written.
        folder: Where a soup of adapters may go to a folder: the files that this may hold already.

    Raises:
        UnwritableOutput: An unknown suffix, a folder, or a place that cannot be written.
    """
    path = user_path(path)
    if folder and path.suffix not in WEIGHT_SUFFIXES:
        check_replaceable(Path(os.path.realpath(path)), folder)
        check_writable(path / "file")
        return
    _check_suffix(path)
    check_writable(path)


def _check_suffix(path: Path) -> None:
    if path.suffix not in WEIGHT_SUFFIXES:
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
    opened = open_checkpoint(weights)
    return _save(opened, plan_copy(opened), path, like, provenance, 1, silent)


def save_combination(
    checkpoints: Sequence[Source | WeightsFile],
    coefficients: Coefficients,
    path: str | os.PathLike,
    *,
    like: Source | WeightsFile | None = None,
    provenance: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    progress: Progress = silent,
) -> Path:
    """Combine checkpoints into a file of any format, without holding more than a few chunks in memory.

    Args:
        checkpoints: As in :func:`.combine`.
        coefficients: As in :func:`.combine`.
        path: As in :func:`save_weights`.
        like: As in :func:`save_weights`.
        provenance: As in :func:`save_weights`.
        metadata: More strings for the header of a safetensors file.
        accumulate: As in :func:`.combine`.
        progress: Shows how far it is.

    Returns:
        The path.

    Raises:
        LightningSoupError: As in :func:`.combine` and :func:`save_weights`.
    """
    opened, parts = plan_combination(checkpoints, coefficients, accumulate)
    return _save(opened[0], parts, path, like, provenance, torch.get_num_threads(), progress, metadata)


def _save(
    first: WeightsFile,
    parts: Sequence[Part],
    path: str | os.PathLike,
    like: Source | WeightsFile | None,
    provenance: Mapping[str, Any] | None,
    threads: int,
    progress: Progress,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write planned parts, in the order of the tensors of ``first``."""
    path = Path(path)
    stamp = {} if provenance is None else {PROVENANCE_KEY: json.dumps(provenance, sort_keys=True)}
    if path.suffix == ".safetensors":
        layout = safetensors_layout(parts, {**(metadata or {}), **stamp})
    else:
        _check_suffix(path)
        model = None if like is None else open_checkpoint(like)
        if model is not None:
            check_compatible([model, first])
        tensors = [SavedTensor(part.names[0], str(i), part.spec) for i, part in enumerate(parts)]
        by_name = {name: tensor for part, tensor in zip(parts, tensors, strict=True) for name in part.names}
        state = {name: by_name[name] for name in first}
        layout = torch_layout(_content(state, model, stamp, lightning=path.suffix == ".ckpt"), tensors)
    write_parts(parts, path, layout, threads, progress)
    return path


def _content(
    tensors: Mapping[str, SavedTensor], like: WeightsFile | None, stamp: dict[str, str], *, lightning: bool
) -> Mapping[str, Any]:
    original = like.original_names if like is not None else {}
    state = OrderedDict((original.get(name, name), tensor) for name, tensor in tensors.items())
    if like is not None and like.format == "lightning":
        foreign = [name for name in like.dropped if "hyper_parameters" in name.split(".")[0]]
        if foreign:
            warnings.warn(
                f"{like.label}: left out of the new checkpoint, since they are not plain values: "
                f"{', '.join(foreign)}. Pass them to load_from_checkpoint.",
                stacklevel=4,
            )
        entries = {name: like.metadata[name] for name in _LIGHTNING_ENTRIES if name in like.metadata}
        return {**entries, "state_dict": state, **stamp}
    if like is not None and like.key is not None:
        return {like.key: state, **stamp}
    if lightning:
        return {
            LIGHTNING_VERSION: _OLDEST_LIGHTNING,
            "epoch": 0,
            "global_step": 0,
            "state_dict": state,
            **stamp,
        }
    if stamp:  # a bare state dict keeps its provenance where torch keeps the versions of modules
        state._metadata = OrderedDict({PROVENANCE_KEY: stamp})
    return state
