"""Folders of transformers: weights with the configuration and the tokenizer that belong to them."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_soup.weights.atomic import atomic_folder
from lightning_soup.weights.coefficients import Coefficients
from lightning_soup.weights.save import save_combination
from lightning_soup.weights.weights_file import WeightsFile

__all__ = ["is_model_folder", "replaceable_files", "save_model_folder"]

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_WEIGHTS_FILES = (_WEIGHTS, "pytorch_model.bin")
# Of configurations, tokenizers, and models' own code.
_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".bpe", ".jinja", ".py")
_OF_TRAINING = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "run.json")


def is_model_folder(weights: WeightsFile) -> bool:
    """Whether weights lie in a folder with a configuration, as ``save_pretrained`` writes it."""
    return _folder(weights) is not None


def _folder(weights: WeightsFile) -> Path | None:
    path = weights.path
    if path is None or not (path.is_dir() or path.name in _WEIGHTS_FILES):
        return None
    folder = path if path.is_dir() else path.parent
    return folder if (folder / _CONFIG).is_file() else None


def replaceable_files(model: WeightsFile) -> list[str]:
    """The names of the files that :func:`save_model_folder` writes."""
    return [_WEIGHTS, *_beside(model)]


def save_model_folder(
    checkpoints: Sequence[WeightsFile],
    coefficients: Coefficients,
    folder: str | os.PathLike,
    *,
    model: WeightsFile,
    **options: Any,
) -> Path:
    """Combine into a folder that ``from_pretrained`` loads, atomically.

    Args:
        checkpoints: As in :func:`.combine`.
        coefficients: As in :func:`.combine`.
        folder: A new folder, or that of an earlier soup, which is replaced.
        model: A folder of transformers, whose configurations and tokenizer are copied.
        options: Of :func:`.save_combination`.

    Returns:
        The folder.

    Raises:
        UnwritableOutput: The folder cannot be written, or holds other files.
        LightningSoupError: As in :func:`.combine`.
    """
    with atomic_folder(folder, files=replaceable_files(model)) as temporary:
        save_combination(checkpoints, coefficients, temporary / _WEIGHTS, **options)
        for name in _beside(model):
            shutil.copyfile(_folder(model) / name, temporary / name)
    return Path(folder)


def _beside(model: WeightsFile) -> list[str]:
    files = (path for path in sorted(_folder(model).iterdir()) if path.is_file() and path.suffix in _SUFFIXES)
    return [path.name for path in files if not path.name.endswith(".index.json") and path.name not in _OF_TRAINING]
