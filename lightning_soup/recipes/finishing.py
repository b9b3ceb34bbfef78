"""What is done to a soup's weights after they are combined, and its record: pruning again, correcting the variance."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_soup.errors import RecipeError
from lightning_soup.layers.pruning import prune_
from lightning_soup.weights.variance import Correction, rescale_
from lightning_soup.weights.weights_file import WeightsFile

__all__ = ["Repruning", "describe_finish", "finish_", "recorded_finish"]

Repruning = tuple[float, tuple[str, ...], str]  # which share of which tensors, and by which selection of prune_


def finish_(weights: Mapping[str, Tensor], repruned: Repruning | None, corrected: Mapping[str, Correction]) -> None:
    """Do to combined weights what is done after combining, in place: prune by magnitude, correct the variance."""
    if repruned is not None:
        share, names, selection = repruned
        prune_({name: weights[name] for name in names}, share, selection=selection)
    rescale_(weights, corrected)


def describe_finish(repruned: Repruning | None, corrected: Mapping[str, Correction]) -> dict[str, Any]:
    """Entries of a soup's record, as plain values."""
    found: dict[str, Any] = {}
    if repruned is not None:
        share, names, selection = repruned
        found["repruned"] = [share, list(names), selection]
    if corrected:
        found["corrected"] = {name: [list(one.factors), list(one.means)] for name, one in corrected.items()}
    return found


def recorded_finish(original: WeightsFile, record: Mapping[str, Any]) -> tuple[Repruning | None, dict[str, Correction]]:
    """What :func:`describe_finish` wrote.

    Raises:
        RecipeError: It is damaged.
    """
    told = record.get("corrected", {})
    if not isinstance(told, Mapping):
        raise _damaged(original, "corrected after averaging", "factors and means by tensor", told)
    return _recorded_pruning(original, record), {n: _correction(original, n, v) for n, v in told.items()}


def _recorded_pruning(original: WeightsFile, record: Mapping[str, Any]) -> Repruning | None:
    if "repruned" not in record:
        return None
    match record["repruned"]:
        case [float(share), [*names], str(selection)] if 0 <= share <= 1 and names and {*names} <= {*original.specs}:
            return share, tuple(names), selection
    expected = "a share, the names of its tensors and a selection"
    raise _damaged(original, "pruned after averaging", expected, record["repruned"])


def _correction(original: WeightsFile, name: str, values: Any) -> Correction:
    match values:
        case [[*factors], [*means]] if factors and len(factors) == len(means) and name in original.specs:
            if all(isinstance(value, float) and math.isfinite(value) for value in (*factors, *means)):
                return Correction(tuple(factors), tuple(means))
    raise _damaged(original, "corrected after averaging", "factors and means by tensor", {name: values})


def _damaged(original: WeightsFile, what: str, expected: str, found: Any) -> RecipeError:
    return RecipeError(
        f"{original.path}: cannot be recooked. Its record of what was {what} is damaged: expected {expected}, found "
        f"{str(found)[:100]}. Cook the soup anew from its ingredients."
    )
