"""The uniform soup: the plain mean of all ingredients."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient
from lightning_soup.recipes.recipe import Recipe, Soup
from lightning_soup.weights.weights_file import Source, WeightsFile
from lightning_soup.weights.zeros import compare_zeros, pattern_of


@dataclass(frozen=True)
class UniformSoup(Recipe):
    """θ_S = (1/k) Σᵢ θᵢ, or Σᵢ wᵢ θᵢ with given weights.

    Needs no evaluation. The right first choice for fine-tunes of about equal quality; one bad ingredient (a learning
    rate ten times too high) spoils it, which :class:`.GreedySoup` avoids.

    Args:
        weights: One weight per ingredient; equal by default.
        normalize: Divide ``weights`` by their sum. Switch it off to use them as they are.
        common_start: ``"require"`` refuses networks from different random starts before anything is evaluated.
        reprune: Prune the average of pruned networks with different masks again, to the sparsity of the sparsest, by
            magnitude over all weight matrices that are pruned in them; by N:M if all of them have it. Without it such
            ingredients are refused. Estimate BatchNorm statistics anew afterwards (:meth:`.Soup.recalibrated`).

    Raises:
        RecipeError: The weights do not fit the ingredients, or add up to zero; or ``reprune`` is asked for where not
            all are pruned, or where it would lose a pattern: whole rows, or different N:M.

    Source: Wortsman et al., Model soups, ICML 2022 (arXiv 2203.05482), section 2.
    """

    weights: list[float] | None = None
    normalize: bool = True
    common_start: CommonStart = "require"
    reprune: bool = False

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Average the ingredients; see :meth:`.Recipe.cook`. With an evaluator, the soup is scored once."""
        one_mask = not (self.reprune or self._masks_known)
        found, notes = check_ingredients(ingredients, self.common_start, evaluator, one_mask)
        coefficients = self._coefficients(len(found))
        repruned = _repruning([ingredient.weights for ingredient in found]) if self.reprune else None
        return Soup(str(self), found, coefficients, notes=notes, repruned=repruned).rated(evaluator)

    def _coefficients(self, count: int) -> tuple[float, ...]:
        if self.weights is None:
            return (1.0 / count,) * count
        if len(self.weights) != count:
            raise RecipeError(f"UniformSoup: {len(self.weights)} weights given for {count} ingredients.")
        total = sum(self.weights) if self.normalize else 1.0
        if total == 0.0:
            raise RecipeError(
                f"UniformSoup: the weights {self.weights} add up to zero; pass normalize=False to use them."
            )
        return tuple(weight / total for weight in self.weights)


def _repruning(files: Sequence[WeightsFile]) -> tuple[float, tuple[str, ...], str]:
    """How the average of pruned networks is pruned: which share of which tensors, and by which selection."""
    zeros = compare_zeros(files)
    if not (zeros and zeros.matrices):
        raise RecipeError("UniformSoup(reprune=True): not all ingredients are pruned. Leave reprune out.")
    patterns = [pattern_of(file, zeros.matrices) for file in files]
    if not any(patterns):
        return 1 - min(zeros.densities), zeros.matrices, "global"
    pattern = patterns[0]
    if pattern is None or pattern == "rows" or len(set(patterns)) > 1:
        told = ", ".join(pattern or "single weights" for pattern in patterns[:4])
        raise RecipeError(
            f"UniformSoup(reprune=True): the ingredients are pruned in patterns ({told}), of which only N:M that is "
            "the same in all can be kept in pruning the average by magnitude. Soup copies that were retrained from one "
            "pruned network, or prune the average yourself (lightning_soup.layers.prune_)."
        )
    n, m = map(int, pattern.split(":"))
    return 1 - n / m, zeros.matrices, pattern
