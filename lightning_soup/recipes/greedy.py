"""The greedy soup: ingredients are added, best first, as long as the average does not get worse."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.landscape.inspection import inspect_weights
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import CommonStart, check_ingredients
from lightning_soup.recipes.ingredient import Ingredient, as_ingredients
from lightning_soup.recipes.recipe import Recipe, Soup, Trial, require_evaluator
from lightning_soup.weights.combine import combine
from lightning_soup.weights.geometry import relative_distance
from lightning_soup.weights.weights_file import Source, WeightsFile


@dataclass(frozen=True)
class GreedySoup(Recipe):
    """Add ingredients in order of their score, keeping each that does not make the average worse.

    Recipe 1 of the paper: sort θ₁..θ_k by held-out accuracy, best first; keep θᵢ if
    ValAcc(average(S ∪ {θᵢ})) ≥ ValAcc(average(S)). On the selection data the result is never below the best single
    ingredient. Costs 2k − 1 evaluations. A candidate touches one file only, since the sum of those kept is held in
    float64: it is read for the average, then from the system's cache for the distance, and for the sum if it is kept.

    Args:
        strict: Keep a candidate only if it is better (``>``), as the released code does, instead of at least as good
            (``≥``), as the paper says. They differ when scores tie, which is common on small validation sets.
        common_start: ``"require"`` refuses networks from different random starts before anything is evaluated.
        screen: Leave out, before anything is evaluated, what the weights alone show to be hopeless
            (:func:`.inspect_weights`): other tensors, NaN, another start than most, far away from the others. Each of
            them saves two evaluations; the notes of the soup name them.

    Equal scores keep the order in which the ingredients were given (the released code reverses it).

    Source: Wortsman et al., Model soups, ICML 2022 (arXiv 2203.05482), Recipe 1.
    """

    strict: bool = False
    common_start: CommonStart = "require"
    screen: bool = False

    needs_evaluator: ClassVar[bool] = True

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Choose the subset to average; see :meth:`.Recipe.cook`."""
        evaluator = require_evaluator(self, evaluator)
        ingredients, left_out = screened(ingredients, evaluator, progress) if self.screen else (ingredients, ())
        found, notes = check_ingredients(ingredients, self.common_start, evaluator, not self._masks_known)
        scores = [evaluator.score(item.weights) for item in progress(found, "scoring ingredients", len(found))]
        order = sorted(range(len(found)), key=lambda i: -scores[i])
        first = order[0]
        kept, best = [first], scores[first]
        history = [Trial(found[first].name, best, True, "the best single ingredient")]
        total = {
            name: value.to(torch.float64) if value.is_floating_point() else value
            for name, value in combine([found[first].weights], [1.0]).items()
        }
        slot = evaluator.slot() or combine([found[first].weights], [1.0])
        for i in progress(order[1:], "greedy soup", len(order) - 1):
            share = 1.0 / (len(kept) + 1)
            pair = [total, found[i].weights]
            candidate = combine(pair, [share, share], slot)
            score = evaluator.score(candidate)
            better = score > best if self.strict else score >= best
            distance = relative_distance(found[i].weights, total, scale=1.0 / len(kept))
            values = {"alone": scores[i], "before": best, "after": score, "distance": distance}
            history.append(Trial(found[i].name, score, better, _reason(values, better, evaluator), values))
            if better:
                combine(pair, [1.0, 1.0], total)
                kept.append(i)
                best = score
        coefficients = tuple(1.0 / len(kept) if i in kept else 0.0 for i in range(len(found)))
        return Soup(
            str(self),
            found,
            coefficients,
            score=best,
            metric=evaluator.metric,
            mode=evaluator.mode,
            history=tuple(history),
            notes=(*left_out, *notes),
            accumulate="float64",
        )


def screened(
    ingredients: Sequence[Ingredient | Source | WeightsFile], evaluator: Evaluator, progress: Progress = silent
) -> tuple[list[Ingredient], tuple[str, ...]]:
    """Ingredients without those that weights alone show to be hopeless, and a note on each that is left out."""
    found = [item.without(evaluator.ignored()) for item in as_ingredients(ingredients)]
    if len(found) < 2:
        return found, ()
    seen = inspect_weights([item.weights for item in found], labels=[item.name for item in found], progress=progress)
    notes = tuple(f"left out unevaluated: {told}" for told in seen.verdict()[:-1]) if seen.hopeless else ()
    return [item for i, item in enumerate(found) if i not in seen.hopeless], notes


def _reason(values: dict[str, float], kept: bool, evaluator: Evaluator) -> str:
    before, after = evaluator.natural(values["before"]), evaluator.natural(values["after"])
    if kept:
        verdict = "better" if values["after"] > values["before"] else "as good as before"
    else:
        verdict = "worse" if values["after"] < values["before"] else "no better (strict)"
    distance = f"{values['distance']:.1%} away from the soup so far"
    return f"{verdict}: {evaluator.metric} {before:.4f} → {after:.4f}, {distance}"
