"""Cooking several recipes from the same ingredients, and measuring everything that a report compares."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lightning_soup.evaluation.module_evaluator import ModuleEvaluator
from lightning_soup.evaluation.outcomes import Outcome, ensemble
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes import Ingredient, Recipe, Soup
from lightning_soup.recipes.interpolated import InterpolatedSoup, for_recipe, interpolate
from lightning_soup.recipes.recipe import with_statistics
from lightning_soup.runs.report import Entry, SoupReport
from lightning_soup.weights.combine import combine
from lightning_soup.weights.positions import plan_resampling, resampled
from lightning_soup.weights.weights_file import WeightsFile

ALPHAS = tuple(InterpolatedSoup().alphas)


def cook_all(
    recipes: Sequence[Recipe],
    ingredients: Sequence[Ingredient],
    evaluator: ModuleEvaluator,
    init: Ingredient | None = None,
    progress: Progress = silent,
    *,
    recalibrate: bool = False,
) -> dict[str, Soup]:
    """Cook each recipe from the same ingredients.

    Args:
        recipes: The recipes.
        ingredients: The ingredients.
        evaluator: Judges on the selection split; each ingredient is scored once for all recipes.
        init: The weights that all ingredients started from: the first ingredient of :class:`.InterpolatedSoup`.
        progress: Shows how far it is.
        recalibrate: Estimate the BatchNorm statistics of each soup anew; see :meth:`.Soup.recalibrated`.

    Returns:
        The soups by the recipe as it was called.

    Raises:
        RecipeError: An interpolation without ``init``, or nothing to recalibrate on.
    """
    soups = {str(recipe): recipe.cook(for_recipe(recipe, ingredients, init), evaluator, progress) for recipe in recipes}
    return {label: soup.recalibrated(evaluator) for label, soup in soups.items()} if recalibrate else soups


def measure(
    soups: Mapping[str, Soup],
    ingredients: Sequence[Ingredient],
    evaluator: ModuleEvaluator,
    init: Ingredient | None = None,
    *,
    saved: Mapping[str, Path] | None = None,
    title: str = "Model soup",
    commands: Sequence[str] = (),
    progress: Progress = silent,
) -> SoupReport:
    """Measure ingredients, soups, the logit ensemble and the WiSE-FT curve on the test sets.

    The selection scores come from validation data; the test sets are used here only, and choose nothing.

    Args:
        soups: The soups by label.
        ingredients: Their ingredients.
        evaluator: Judges them.
        init: The weights that all ingredients started from; with it, the curve to the first soup is measured.
        saved: Files of the soups that were saved, by label.
        title: Heading of the report.
        commands: How to make the report again.
        progress: Shows how far it is.
    """
    single: list[Outcome | Mapping[str, Outcome]] = []
    entries: list[Entry] = []
    fitting, start = _on_one_grid(ingredients, soups, init)
    pairs = list(zip(ingredients, fitting, strict=True))
    for item, weights in progress(pairs, "testing ingredients", len(pairs)):
        outcomes = evaluator.outcomes(weights)
        single.append(outcomes)
        score = evaluator.score(weights)
        digest = item.weights.digest()
        entries.append(Entry(item.name, "ingredient", outcomes, score, hparams=item.hparams, digest=digest))
    if init is not None:
        outcomes = evaluator.outcomes(start)
        entries.append(Entry(init.name, "init", outcomes, evaluator.score(start), digest=init.weights.digest()))
    for label, soup in progress(soups.items(), "testing soups", len(soups)):
        outcomes = evaluator.outcomes(soup.weights(evaluator.slot()))
        entries.append(Entry(label, "soup", outcomes, soup.score, soup=soup, path=(saved or {}).get(label)))
    names = list(single[0])
    together = {name: ensemble(outcomes[name] for outcomes in single) for name in names}
    entries.append(Entry("logit ensemble", "ensemble", together))
    if init is not None:
        entries += progress(_curve(soups, init, start, evaluator), "testing the WiSE-FT curve", len(ALPHAS))
    notes = list(dict.fromkeys(note for soup in soups.values() for note in soup.notes))
    return SoupReport(title, entries, evaluator.metric, evaluator.mode, notes=notes, commands=commands)


def _on_one_grid(
    ingredients: Sequence[Ingredient], soups: Mapping[str, Soup], init: Ingredient | None
) -> tuple[list[WeightsFile], WeightsFile | None]:
    """What is measured of the ingredients and their start: on the grid of the soups, as the module has one size."""
    found = next((soup.sources for soup in soups.values() if soup.resampled), [item.weights for item in ingredients])
    if init is None:
        return found, None
    return found, resampled(init.weights, 1, plan_resampling([found[0], init.weights], [None, None]))


def _curve(
    soups: Mapping[str, Soup], init: Ingredient, start: WeightsFile, evaluator: ModuleEvaluator
) -> Iterator[Entry]:
    """Points on the line from the start to the first soup that is not itself an interpolation, or to the end of one."""
    plain = [(label, soup) for label, soup in soups.items() if soup.ingredients[0] is not init]
    for label, soup in (plain or list(soups.items()))[:1]:
        sources = soup.sources
        if plain:
            sources, fine_tuned = with_statistics(sources, soup.coefficients, soup.statistics)
        else:
            sources, (first, *rest) = sources[1:], soup.shares()
            if first == 1.0:
                return  # the start itself was chosen: where the line would go is not known
            fine_tuned = tuple(share / (1.0 - first) for share in rest)
        sources = [start, *sources]
        for alpha in ALPHAS:
            mixed = interpolate(fine_tuned, alpha)
            weights = combine(sources, mixed, evaluator.slot(), accumulate=soup.accumulate)
            yield Entry(f"WiSE-FT to {label}", "interpolation", evaluator.outcomes(weights), alpha=alpha)
