"""WiSE-FT: on the line between the model before and after fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.recipes.recipe import Recipe, Soup, Trial
from lightning_soup.recipes.uniform import UniformSoup
from lightning_soup.weights.weights_file import Source, WeightsFile

Coefficients = tuple[float, ...] | dict[str, tuple[float, ...]]


def _tenths() -> list[float]:
    return [i / 10 for i in range(11)]


@dataclass(frozen=True)
class InterpolatedSoup(Recipe):
    """θ_α = (1 − α)·θ_zs + α·θ_ft, with α chosen on held-out data.

    The **first** ingredient is θ_zs, the weights before fine-tuning (pre-trained or zero-shot). With two ingredients
    the second is θ_ft. With more, the others are cooked with ``soup`` first, and θ_ft is that soup.

    Without an evaluator α = 0.5, the paper's advice when nothing is known about the shift. Note that data like that of
    the fine-tuning favours α near 1: choose on shifted data, or look at the curve in the report.

    Args:
        alphas: The sweep; the released code's 0, 0.1, …, 1. Values outside [0, 1] extrapolate.
        alpha: Use this α instead of choosing one; the sweep is scored all the same where there is an evaluator.
        soup: How the ingredients after the first become θ_ft.
        common_start: ``"require"`` refuses networks from different random starts before anything is evaluated.

    Source: Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022 (arXiv 2109.01903), section 3.
    """

    alphas: list[float] = field(default_factory=_tenths)
    alpha: float | None = None
    soup: Recipe = field(default_factory=UniformSoup)
    common_start: CommonStart = "require"

    from_init: ClassVar[bool] = True

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Choose α; see :meth:`.Recipe.cook`. The history is the curve: one trial per α, with ``values["alpha"]``.

        At equal scores the smaller α is taken: it stays closer to the start.
        """
        if not self.alphas and self.alpha is None:
            raise RecipeError(
                "InterpolatedSoup: alphas is empty and alpha is not given; there is nothing to choose from."
            )
        found, notes = check_ingredients(ingredients, self.common_start, evaluator, not self._masks_known)
        fine_tuned: Coefficients = (1.0,)
        accumulate: Literal["float32", "float64"] = "float32"
        if len(found) > 2:
            inner = self.soup.without_start_check(self._masks_known).cook(
                found[1:], evaluator, progress
            )  # checked above, all of them
            fine_tuned, accumulate = inner.coefficients, inner.accumulate

        def at(alpha: float) -> Soup:
            mixed = interpolate(fine_tuned, alpha)
            return Soup(str(self), found, mixed, notes=notes, accumulate=accumulate).rated(evaluator)

        if evaluator is None:
            return at(0.5 if self.alpha is None else self.alpha)
        alphas = sorted({*self.alphas, *([] if self.alpha is None else [self.alpha])})
        curve = [(alpha, at(alpha)) for alpha in progress(alphas, "interpolating", len(alphas))]
        if self.alpha is None:
            chosen, best = max(curve, key=lambda point: (point[1].score, -point[0]))
        else:
            chosen, best = self.alpha, dict(curve)[self.alpha]
        history = tuple(
            Trial(f"α = {alpha:g}", soup.score, alpha == chosen, "chosen" if alpha == chosen else "", {"alpha": alpha})
            for alpha, soup in curve
        )
        return replace(best, history=history)


def interpolate(fine_tuned: Coefficients, alpha: float) -> Coefficients:
    """Coefficients of (1 − α)·θ_zs + α·θ_ft for the ingredients [θ_zs, *those of θ_ft].

    Args:
        fine_tuned: Coefficients of θ_ft over its own ingredients.
        alpha: α.
    """
    if isinstance(fine_tuned, dict):
        return {name: (1.0 - alpha, *(alpha * c for c in row)) for name, row in fine_tuned.items()}
    return (1.0 - alpha, *(alpha * c for c in fine_tuned))


def for_recipe(recipe: Recipe, ingredients: Sequence[Ingredient], init: Ingredient | None) -> list[Ingredient]:
    """The ingredients as a recipe wants them: some go from ``init`` to the others.

    Raises:
        RecipeError: Such a recipe without ``init``.
    """
    if not recipe.from_init:
        return list(ingredients)
    if init is None:
        raise RecipeError(
            f"{type(recipe).__name__} goes from the weights before fine-tuning to those after; give the former as init."
        )
    return [init, *ingredients]
