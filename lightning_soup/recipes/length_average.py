"""The average of checkpoints that were trained at different image sizes or sequence lengths (MindVL)."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient, as_ingredients
from lightning_soup.recipes.recipe import Recipe, Soup
from lightning_soup.weights.positions import Grid, plan_resampling, resampled
from lightning_soup.weights.weights_file import Source, WeightsFile

Size = int | tuple[int, int]

_KNOWN_AS = ("train_sizes", "max_length", "max_seq_length", "sequence_length", "seq_len", "image_size", "img_size")


@dataclass(frozen=True)
class LengthAverage(Recipe):
    """θ = Σ_r c_r θ_r over checkpoints that were fine-tuned from one start at different sizes or lengths r.

    The average works at all of these sizes, and between them; search the size to use it at afterwards
    (:class:`.ResolutionSearch`), as the best one belongs to the weights. Position embeddings of images that lie on
    different grids are resampled to one grid first (bicubic, antialiased); tables of relative positions are not. The
    average is accumulated in float64. Estimate BatchNorm statistics anew at the size that is used
    (:meth:`.Soup.recalibrated`).

    Args:
        group: ``flat``: every checkpoint counts the same. ``by_length``: the mean of each length first, then over the
            lengths, so that a length with more checkpoints does not count more.
        lengths: Of each ingredient: a sequence length, or an image size in pixels, a number or [height, width]. By
            default what its hyperparameters say (train_sizes, max_length, img_size and the like). Grids that are not
            square are known from img_size in the file, or need [height, width] here.
        length_key: The name of the hyperparameter that holds it, where it has another name.
        target_size: Image size in pixels that the average is for: a number or [height, width]. By default that of the
            first ingredient.
        common_start: ``require`` refuses networks from different random starts.

    Raises:
        RecipeError: ``by_length`` without lengths, another number of lengths than ingredients, lengths below 1, or a
            target size that is not a multiple of the patch.

    Source: Chen et al., MindVL (arXiv 2509.11662), averaging of checkpoints of different sequence lengths. The paper
    gives no weights and no code; both groupings are ours, with c_r = 1/k or 1/(number of lengths · checkpoints of r).
    """

    group: Literal["flat", "by_length"] = "flat"
    lengths: list[int | tuple[int, int]] | None = None
    length_key: str | None = None
    target_size: int | tuple[int, int] | None = None
    common_start: CommonStart = "require"

    def __post_init__(self) -> None:
        if self.group not in ("flat", "by_length"):
            raise RecipeError(f"LengthAverage: group={self.group!r}: expected flat or by_length.")
        for name, sizes in (("lengths", self.lengths or ()), ("target_size", (self.target_size,))):
            for size in sizes:
                if size is not None and min(_pair(size)) < 1:
                    raise RecipeError(f"LengthAverage: {name} holds {size}: expected numbers of 1 or more.")

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Average the ingredients; see :meth:`.Recipe.cook`. With an evaluator, the soup is scored once."""
        ignored = () if evaluator is None else evaluator.ignored()
        found = [item.without(ignored) for item in as_ingredients(ingredients)]
        if self.lengths is not None and len(self.lengths) != len(found):
            raise RecipeError(
                f"LengthAverage: {len(self.lengths)} lengths given for {len(found)} ingredients. Give one for each, in "
                "their order."
            )
        coefficients = self._coefficients(found)
        target = None if self.target_size is None else _pair(self.target_size)
        sizes = [None] * len(found) if self.lengths is None else [_as_tuple(size) for size in self.lengths]
        plans = plan_resampling([item.weights for item in found], sizes, target) if found else {}
        alike = [_replaced(item, resampled(item.weights, i, plans)) for i, item in enumerate(found)]
        _, notes = check_ingredients(alike, self.common_start, None, not self._masks_known)
        notes += tuple(
            f"{name!r} was resampled to a grid of {plan.new[0]}×{plan.new[1]} before averaging (from "
            f"{', '.join(dict.fromkeys(f'{h}×{w}' for h, w in plan.old))})."
            for name, plan in plans.items()
        )
        soup = Soup(str(self), tuple(found), coefficients, notes=notes, accumulate="float64", resampled=plans)
        return soup.rated(evaluator)

    def _coefficients(self, ingredients: Sequence[Ingredient]) -> tuple[float, ...]:
        if self.group == "flat":
            return (1.0 / max(len(ingredients), 1),) * len(ingredients)
        given = self.lengths or [None] * len(ingredients)
        keys = [
            json.dumps(_plain(self._stored(item) if length is None else length))
            for item, length in zip(ingredients, given, strict=True)
        ]
        counts = Counter(keys)
        return tuple(1.0 / (len(counts) * counts[key]) for key in keys)

    def _stored(self, ingredient: Ingredient) -> Any:
        """The length among the hyperparameters of the run or of the file, whatever section of a config it stands in."""
        names = _KNOWN_AS if self.length_key is None else (self.length_key,)
        for hparams in (ingredient.hparams, ingredient.weights.mapping_beside("hyper_parameters")):
            last = {str(name).rpartition(".")[2]: value for name, value in hparams.items()} | dict(hparams)
            for name in names:
                if last.get(name) is not None:
                    return last[name]
        raise RecipeError(
            f"LengthAverage(group=by_length): the length of {ingredient.name} is not known: its hyperparameters hold "
            f"none of {', '.join(names)}. Give lengths, one for each ingredient, or the name of the hyperparameter as "
            "length_key."
        )


def _as_tuple(size: Any) -> Any:
    return tuple(size) if isinstance(size, (list, tuple)) else size


def _plain(length: Any) -> Any:
    """A length, or the only side of a square: 24 and (24, 24) are one."""
    sides = set(length) if isinstance(length, (list, tuple)) else ()
    return sides.pop() if len(sides) == 1 else length


def _pair(size: Size) -> Grid:
    if isinstance(size, int):
        return size, size
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise RecipeError(f"LengthAverage: {size}: expected a number, or height and width.")
    return size[0], size[1]


def _replaced(ingredient: Ingredient, weights: WeightsFile) -> Ingredient:
    """The ingredient with other weights, for checks only: its digest would be another."""
    if weights is ingredient.weights:
        return ingredient
    return Ingredient(weights, ingredient.metrics, ingredient.step, ingredient.hparams, ingredient.name)
