"""How a soup was made, as plain values that travel in its file, and cooking the same bytes again from them."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_soup import __version__
from lightning_soup.errors import RecipeError
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.finishing import describe_finish, finish_, recorded_finish
from lightning_soup.recipes.ingredient import refuse_overwriting
from lightning_soup.recipes.recipe import Soup, with_statistics
from lightning_soup.recipes.soup_output import folder_of_output, save_terms
from lightning_soup.weights.adapter_merging import AdapterMerging
from lightning_soup.weights.adapters import adapter_in, is_adapter
from lightning_soup.weights.combine import combine
from lightning_soup.weights.positions import Resampling, resampled
from lightning_soup.weights.save import save_weights
from lightning_soup.weights.weights_file import WeightsFile, open_checkpoint

if TYPE_CHECKING:
    from lightning_soup.recipes.ingredient import Ingredient


def provenance_of(soup: Soup, folder: Path) -> dict[str, Any]:
    """What is written into a soup's file. It holds no date, so the same soup gives the same bytes.

    Args:
        soup: The soup.
        folder: Folder of the file; ingredients are named relative to it, so that the whole tree may be moved.
    """
    return {
        "recipe": soup.recipe,
        "coefficients": soup.coefficients if isinstance(soup.coefficients, dict) else list(soup.coefficients),
        "shares": list(soup.shares()),
        "accumulate": soup.accumulate,
        "ingredients": [_describe(ingredient, folder) for ingredient in soup.ingredients],
        "metric": soup.metric,
        "mode": soup.mode,
        "score": soup.score,
        **({} if soup.third_score is None else {"third_score": soup.third_score}),
        "history": [
            {
                "label": trial.label,
                "score": trial.score,
                "kept": trial.kept,
                "reason": trial.reason,
                "values": dict(trial.values),
            }
            for trial in soup.history
        ],
        "notes": list(soup.notes),
        **describe_finish(soup.repruned, soup.corrected),
        **({"resampled": {n: plan.plain() for n, plan in soup.resampled.items()}} if soup.resampled else {}),
        **({"merging": _describe_merging(soup.merging, folder)} if soup.merging else {}),
        **({"statistics": _describe_statistics(soup.statistics)} if soup.statistics else {}),
        "versions": {"lightning_soup": __version__, "torch": str(torch.__version__)},
    }


def _describe_merging(merging: AdapterMerging, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"mode": merging.mode, "rank": merging.rank, "base": None}
    if merging.base is not None:
        base = open_checkpoint(merging.base)
        found["base"] = {"label": base.label, "source": _relative(base, folder), "digest": base.digest()}
    return found


def _relative(opened: WeightsFile, folder: Path) -> str | None:
    return None if opened.path is None else os.path.relpath(opened.path.resolve(), folder.resolve())


def _describe_statistics(statistics: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"tensors": sorted(statistics), "digest": open_checkpoint(statistics).digest()}


def _describe(ingredient: "Ingredient", folder: Path) -> dict[str, Any]:
    opened = ingredient.weights
    source = str(ingredient.source)
    found: dict[str, Any] = {
        "label": ingredient.name,
        "source": _relative(opened, folder),
        "digest": opened.digest(),
        "step": ingredient.step,
        "metrics": {name: float(value) for name, value in ingredient.metrics.items()},
        "hparams": {name: value for name, value in ingredient.hparams.items() if _is_plain(value)},
    }
    if opened.left_out:
        found["left_out"] = list(opened.left_out)
    if is_adapter(opened) and opened.path is not None and opened.path.is_file():
        found["adapter"] = True  # taken out of a checkpoint of a whole model
    if source.startswith("wandb:"):
        found["artifact"] = source
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def recook(path: str | os.PathLike, output: str | os.PathLike | None = None, progress: Progress = silent) -> Path:
    """Cook a soup again from its provenance, and check that it is the same.

    BatchNorm statistics that were estimated on training data cannot be cooked from the ingredients: they are copied
    from the soup, if they are still those of its record, and a warning says so.

    Args:
        path: A soup that lightning_soup saved.
        output: Where to write it; beside the original, as ``<name>.recooked<suffix>``, by default.
        progress: Shows how far it is.

    Returns:
        The path of the new file.

    Raises:
        RecipeError: The file has no provenance or a damaged one, or ingredients are missing or have changed, which are
            all named.
        UnwritableOutput: The output is the soup itself or one of its ingredients.
    """
    original = open_checkpoint(path)
    record = original.provenance
    if original.path is None or record is None or "ingredients" not in record:
        raise RecipeError(
            f"{path}: was not cooked by lightning_soup (it holds no provenance), so it cannot be recooked."
        )
    folder = original.path.resolve().parent
    opened, problems = [], []
    for item in record["ingredients"]:
        try:
            opened.append(_unchanged(item, folder))
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError(f"{path}: cannot be recooked.\n  " + "\n  ".join(problems))
    repruned, corrected = recorded_finish(original, record)
    plans = _recorded_resampling(original, record)
    merging = _recorded_merging(original, record, folder)
    target = Path(output) if output is not None else original.path.with_suffix(f".recooked{original.path.suffix}")
    for file in (*opened, original):
        if file.path is not None:
            refuse_overwriting(file.path, target)
    like = original if target.suffix != ".safetensors" else None
    place = folder_of_output(target, original)
    if place.resolve() != folder.resolve():  # sources are named relative to the file
        for item, file in zip(record["ingredients"], opened, strict=True):
            item["source"] = _relative(file, place)
        if merging is not None and merging.base is not None:
            record["merging"]["base"]["source"] = _relative(open_checkpoint(merging.base), place)
    alike = [resampled(file, i, plans) for i, file in enumerate(opened)]
    sources, coefficients = with_statistics(alike, record["coefficients"], _recorded_statistics(original, record))
    if merging is not None:
        sources, coefficients = merging.terms(sources, coefficients, progress)
    kept = {"like": like, "provenance": record}
    if repruned is not None or corrected:
        weights = combine(sources, coefficients, accumulate=record["accumulate"], progress=progress)
        finish_(weights, repruned, corrected)
        save_weights(weights, target, **kept)
    else:
        save_terms(sources, coefficients, target, accumulate=record["accumulate"], progress=progress, **kept)
    if open_checkpoint(target).digest() != original.digest():
        warnings.warn(
            f"{target}: the weights differ from those in {path}. The ingredients are the same, so {path} was changed "
            f"after it was cooked, or written with other versions ({record.get('versions')}).",
            stacklevel=2,
        )
    return target


def _recorded_resampling(original: WeightsFile, record: Mapping[str, Any]) -> dict[str, Resampling]:
    """The position embeddings that were brought to one grid, if any were."""
    told = record.get("resampled", {})
    try:
        if not isinstance(told, Mapping) or any(name not in original.specs for name in told):
            raise ValueError(f"expected names of its tensors, found {str(told)[:100]}")
        return {name: Resampling.from_plain(plan, len(record["ingredients"])) for name, plan in told.items()}
    except ValueError as error:
        raise RecipeError(
            f"{original.path}: cannot be recooked. Its record of the position embeddings that were resampled before "
            f"averaging is damaged: {error}. Cook the soup anew from its ingredients."
        ) from error


def _recorded_merging(original: WeightsFile, record: Mapping[str, Any], folder: Path) -> AdapterMerging | None:
    """How adapters were merged, with the base that they were added to, if it has not changed."""
    told = record.get("merging")
    if not told:
        return None
    match told:
        case {"mode": str(mode), "rank": int() | None as rank, "base": None}:
            return AdapterMerging(mode, rank)  # type: ignore[arg-type]  # checked by itself
        case {"mode": "dense", "rank": None, "base": {"label": str(), "source": str(source), "digest": str()} as base}:
            _unchanged(base, folder)
            return AdapterMerging("dense", None, str(folder / source))
    raise RecipeError(
        f"{original.path}: cannot be recooked. Its record of how adapters were merged is damaged: {str(told)[:100]}. "
        "Cook the soup anew from its ingredients."
    )


def _recorded_statistics(original: WeightsFile, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The BatchNorm statistics that the soup holds and its ingredients cannot give."""
    told = record.get("statistics")
    if not told:
        return {}
    missing = [name for name in told["tensors"] if name not in original]
    found = {name: original[name].clone() for name in told["tensors"] if name in original}
    if missing or open_checkpoint(found).digest() != told["digest"]:
        raise RecipeError(
            f"{original.path}: cannot be recooked. Its BatchNorm statistics were estimated on training data after "
            "cooking, and they have been changed since, so they cannot be had from this file or from the ingredients. "
            "Cook the soup anew with its recipe and the training data."
        )
    warnings.warn(
        f"{original.path}: its BatchNorm statistics ({len(found)} tensors) were estimated on training data after "
        "cooking. They are copied from it, not cooked again; all other tensors are.",
        stacklevel=3,
    )
    return found


def _unchanged(item: Mapping[str, Any], folder: Path) -> WeightsFile:
    source = item.get("artifact") or (item["source"] and folder / item["source"])
    if not source:
        raise RecipeError(f"{item['label']}: was in memory only, so it cannot be opened again.")
    if isinstance(source, Path) and not source.exists():
        raise RecipeError(f"{item['label']}: {source} does not exist any more.")
    opened = open_checkpoint(source)
    opened = adapter_in(opened) if item.get("adapter") else opened
    left_out = set(item.get("left_out", ()))
    opened = opened.without(tuple(left_out & set(opened)))
    opened.label = item["label"]
    if opened.digest() != item["digest"]:
        raise RecipeError(
            f"{item['label']}: {source} has changed since (digest {opened.digest()}, was {item['digest']})."
        )
    return opened
