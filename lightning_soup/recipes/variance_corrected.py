"""The average of unrelated models, with the variance that each of their layers had."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.layers.prunable_weights import NOT_PRUNABLE
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.recipes.recipe import Recipe, Soup
from lightning_soup.weights.combine import combine
from lightning_soup.weights.variance import Correction, correctable, corrections
from lightning_soup.weights.weights_file import Source, WeightsFile

__all__ = ["NOTHING", "VarianceCorrectedSoup", "told_factors"]

NOTHING = 0.01  # factors within this of 1 do nothing


@dataclass(frozen=True)
class VarianceCorrectedSoup(Recipe):
    """M_l ← (M_l − μ)·√(T_l / Var(M_l)) + μ for each layer l of the average M; its mean μ stays.

    The average of N models with pairwise correlation ρ has the variance σ²·(1 + (N − 1)ρ)/N. For models from unrelated
    starts, as gossiping nodes are in their first rounds, that is σ²/N, and signals fade from layer to layer. The
    variance is brought back to T_l, the mean of the models' own. A restored variance is no low loss: train on.

    **It is no better soup of fine-tunes**: those of one start have ρ near 1, a factor of 1.00, and a note says that
    nothing was done.

    Corrected are matrices: tensors of two dimensions or more, but embeddings of positions, classes and tokens. Biases,
    norms and scalars are averaged, tied tensors corrected once. BatchNorm statistics are stale after any such average:
    estimate them anew (``recalibrate``). Averaging two by two is not averaging all.

    Args:
        beta: β: the first ingredient is a node's own model, M = β·W_self + (1 − β)·mean of the others. None: the plain
            mean of all.
        target: With ``beta``, whose variance T_l is: the mean of the ``"others"``' (as in the authors' simulator), that
            of ``"self"``, or ``"mix"``, β·Var(W_self) + (1 − β)·the others'.
        exclude: Patterns of names of matrices that are averaged only; by default those of embeddings.
        chunks: By pattern of names, into how many equal parts of rows a fused matrix falls, each with a variance of its
            own: ``{"*.qkv.weight": 3}``.
        common_start: ``"ignore"``, as networks of different starts are what this is for.

    Raises:
        RecipeError: An option is out of range, a pattern of ``chunks`` fits nothing, or there is no matrix to correct.

    Source: Tian, Al-Ars, Kitsak, Hofstee, Vanishing Variance Problem in Fully Decentralized Neural-Network Systems,
    2024 (arXiv 2404.04616). The authors' later code also rescales biases and norms, and adds 10⁻⁴ to both variances,
    which corrects wide layers too weakly; their simulator's default target is the average's own variance, which does
    nothing. Not so here.
    """

    beta: float | None = None
    target: Literal["others", "self", "mix"] = "others"
    exclude: list[str] = field(default_factory=lambda: list(NOT_PRUNABLE))
    chunks: dict[str, int] = field(default_factory=dict)
    common_start: CommonStart = "ignore"

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Average and correct; see :meth:`.Recipe.cook`. ``Soup.corrected`` holds the factors."""
        self.check()
        found, notes = check_ingredients(ingredients, self.common_start, evaluator, not self._masks_known)
        files = [item.weights for item in found]
        coefficients, shares = self.coefficients(len(files))
        names = correctable(files[0], self.exclude)
        if not names:
            raise RecipeError("VarianceCorrectedSoup: there is no matrix to correct. Look at exclude.")
        matrices = [file.only(names) for file in files]
        corrected = corrections(matrices, combine(matrices, coefficients), shares, names, self.chunks)
        notes = (*notes, told_factors(corrected))
        return Soup(str(self), found, coefficients, notes=notes, corrected=corrected).rated(evaluator)

    def check(self) -> None:
        """Refuse options that are out of range.

        Raises:
            RecipeError: One is.
        """
        if self.target not in ("others", "self", "mix"):
            raise RecipeError(f"VarianceCorrectedSoup(target={self.target!r}): expected 'others', 'self' or 'mix'.")
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise RecipeError(f"VarianceCorrectedSoup(beta={self.beta}): expected a number from 0 to 1, or None.")

    def coefficients(self, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The coefficients of the average, and those of the variances in T."""
        alike = (1.0 / count,) * count
        if self.beta is None:
            return alike, alike
        others = (1.0 / (count - 1),) * (count - 1)
        mixed = (self.beta, *((1 - self.beta) * share for share in others))
        return mixed, {"others": (0.0, *others), "self": (1.0, *(0.0 for _ in others)), "mix": mixed}[self.target]


def told_factors(corrected: Mapping[str, Correction]) -> str:
    """A note on how much was corrected."""
    factors = [factor for correction in corrected.values() for factor in correction.factors]
    low, high = min(factors), max(factors)
    if max(abs(low - 1), abs(high - 1)) <= NOTHING:
        return (
            f"VarianceCorrectedSoup: all {len(factors)} factors are within {NOTHING:.0%} of 1, so the correction does "
            "nothing: the models are related (fine-tunes of one start). Take UniformSoup."
        )
    mean = statistics.fmean(factors)
    return f"VarianceCorrectedSoup: {len(factors)} factors, {mean:.3f} on average ({low:.3f} to {high:.3f})."
