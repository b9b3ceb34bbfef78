"""The greedy soup: ingredients are added, best first, as long as the average does not get worse."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from lightning_soup.errors import RecipeError
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
        screen: What the weights alone show to be hopeless (:func:`.inspect_weights`) is not evaluated. True: other
            tensors, NaN, another start than most, far away from the others are left out, which saves two evaluations
            for each; one of another start may have been the best single one, though. ``"trials"``: each is judged by
            itself, and tried only in soups of its own start, which saves fewer evaluations, or more where the best
            is a stranger; the soup is that of no screen, unless an average across starts would have been better. The
            notes of the soup name them.

    Equal scores keep the order in which the ingredients were given (the released code reverses it).

    Source: Wortsman et al., Model soups, ICML 2022 (arXiv 2203.05482), Recipe 1.
    """

    strict: bool = False
    common_start: CommonStart = "require"
    screen: bool | Literal["trials"] = False

    def __post_init__(self) -> None:
        if self.screen not in (False, True, "trials"):
            raise RecipeError(f"GreedySoup(screen={self.screen!r}): expected true, false or 'trials'.")

    needs_evaluator: ClassVar[bool] = True

    def cook(
        self,
        ingredients: Sequence[Ingredient | Source | WeightsFile],
        evaluator: Evaluator | None = None,
        progress: Progress = silent,
    ) -> Soup:
        """Choose the subset to average; see :meth:`.Recipe.cook`."""
        evaluator = require_evaluator(self, evaluator)
        ingredients, left_out, kin = screened(self.screen, ingredients, evaluator, progress)
        across = "ignore" if self.screen == "trials" else self.common_start
        found, notes = check_ingredients(ingredients, across, evaluator, not self._masks_known)
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
        tried = [i for i in order[1:] if kin[i] == kin[first]]
        for i in progress(tried, "greedy soup", len(tried)):
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
    screen: bool | Literal["trials"],
    ingredients: Sequence[Ingredient | Source | WeightsFile],
    evaluator: Evaluator,
    progress: Progress = silent,
) -> tuple[Sequence[Any], tuple[str, ...], Sequence[int]]:
    """Ingredients that are worth an evaluation.

    Returns:
        Those; notes on what is left out, or tried only among its like; and for each a number, the same for those that
        can be in one soup.
    """
    if not screen or len(ingredients) < 2:
        return ingredients, (), [0] * len(ingredients)
    found = [item.without(evaluator.ignored()) for item in as_ingredients(ingredients)]
    seen = inspect_weights([item.weights for item in found], labels=[item.name for item in found], progress=progress)
    told = seen.verdict()[:-1] if seen.hopeless else ()
    if screen is True:
        whole = [item for i, item in enumerate(found) if i not in seen.hopeless]
        return whole, tuple(f"left out unevaluated: {why}" for why in told), [0] * len(whole)
    kept = [i for i in range(len(found)) if i not in seen.incompatible and i not in seen.broken]
    kin = {i: number for number, group in enumerate(seen.groups) for i in group}
    kin |= {i: -1 - i for i in seen.far}  # alone
    notes = tuple(f"tried only among its like, or left out: {why}" for why in told)
    return [found[i] for i in kept], notes, [kin.get(i, 0) for i in kept]


def _reason(values: dict[str, float], kept: bool, evaluator: Evaluator) -> str:
    before, after = evaluator.natural(values["before"]), evaluator.natural(values["after"])
    if kept:
        verdict = "better" if values["after"] > values["before"] else "as good as before"
    else:
        verdict = "worse" if values["after"] < values["before"] else "no better (strict)"
    distance = f"{values['distance']:.1%} away from the soup so far"
    return f"{verdict}: {evaluator.metric} {before:.4f} → {after:.4f}, {distance}"
