"""Where a soup goes: a file of weights, or a folder of PEFT adapters, or of a model of transformers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_soup.progress import Progress
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.weights.adapter_merging import FOLDER_FILES, save_adapter
from lightning_soup.weights.adapters import holds_adapter, is_adapter
from lightning_soup.weights.formats import WEIGHT_SUFFIXES
from lightning_soup.weights.model_folder import is_model_folder, replaceable_files, save_model_folder
from lightning_soup.weights.save import check_output, save_combination
from lightning_soup.weights.weights_file import Source, WeightsFile


def check_soup_output(path: str | os.PathLike, ingredients: Sequence[Ingredient]) -> None:
    """Say before cooking that a soup of these ingredients could not be written to ``path``.

    Raises:
        UnwritableOutput: It could not: an unknown suffix (adapters, and models of transformers, may go to a folder),
            or a place that is not writable.
    """
    if any(is_adapter(item.weights) or holds_adapter(item.weights) for item in ingredients):
        check_output(path, folder=FOLDER_FILES)
    elif is_model_folder(ingredients[0].weights):
        check_output(path, folder=replaceable_files(ingredients[0].weights))
    else:
        check_output(path)


def folder_of_output(path: Path, like: Source | WeightsFile | None) -> Path:
    """The folder that the file with the weights will lie in, which the paths of its provenance start from.

    Args:
        path: Where the soup is written.
        like: Its first source.
    """
    inside = isinstance(like, WeightsFile) and not is_adapter(like) and is_model_folder(like)
    return path if inside and path.suffix not in WEIGHT_SUFFIXES else path.parent


def save_terms(
    sources: Sequence[WeightsFile],
    coefficients: tuple[float, ...] | dict[str, tuple[float, ...]],
    path: Path,
    *,
    like: Source | WeightsFile | None,
    provenance: Mapping[str, Any],
    accumulate: Literal["float32", "float64"],
    progress: Progress,
) -> Path:
    """Combine into a file, or where the path is not that of a file of weights, into a folder like the first source's.

    ``like`` has the configuration of a model's folder, where the first source is not one.
    """
    kept: dict[str, Any] = {"provenance": provenance, "accumulate": accumulate, "progress": progress}
    if is_adapter(sources[0]) and path.suffix not in WEIGHT_SUFFIXES:
        return save_adapter(sources, coefficients, path, **kept)
    folder = next(
        (found for found in (sources[0], like) if isinstance(found, WeightsFile) and is_model_folder(found)), None
    )
    if folder is not None and path.suffix not in WEIGHT_SUFFIXES:
        return save_model_folder(sources, coefficients, path, model=folder, **kept)
    return save_combination(sources, coefficients, path, like=like, **kept)
