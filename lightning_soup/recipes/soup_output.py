"""Where a soup goes: a file of weights, or of PEFT adapters a folder."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_soup.progress import Progress
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.weights.adapter_merging import FOLDER_FILES, save_adapter
from lightning_soup.weights.adapters import holds_adapter, is_adapter
from lightning_soup.weights.formats import WEIGHT_SUFFIXES
from lightning_soup.weights.save import check_output, save_combination
from lightning_soup.weights.weights_file import Source, WeightsFile


def check_soup_output(path: str | os.PathLike, ingredients: Sequence[Ingredient]) -> None:
    """Say before cooking that a soup of these ingredients could not be written to ``path``.

    Raises:
        UnwritableOutput: It could not: an unknown suffix (adapters may go to a folder), or a place that is not
            writable.
    """
    adapters = any(is_adapter(item.weights) or holds_adapter(item.weights) for item in ingredients)
    check_output(path, folder=FOLDER_FILES if adapters else ())


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
    """Combine into a file, or adapters into a folder where the path is not that of a file of weights."""
    kept: dict[str, Any] = {"provenance": provenance, "accumulate": accumulate, "progress": progress}
    if is_adapter(sources[0]) and path.suffix not in WEIGHT_SUFFIXES:
        return save_adapter(sources, coefficients, path, **kept)
    return save_combination(sources, coefficients, path, like=like, **kept)
