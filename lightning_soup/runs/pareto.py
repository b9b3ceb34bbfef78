"""New skill against old skill: what averaging the model before and after buys, over the mean ratio."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes import AdaptiveSoup, Ingredient, Soup
from lightning_soup.runs.figures import BLUE, COLOURS, GREY, MARKERS, Picture, new_figure
from lightning_soup.weights.atomic import atomic_path
from lightning_soup.weights.combine import combine
from lightning_soup.weights.weights_file import Source, WeightsFile

__all__ = ["Front", "front_picture", "pareto_front"]


@dataclass(frozen=True)
class Front:
    """Scores of the new and of the old skill, for equal and for adaptive ratios of the same mean.

    Attributes:
        means: α, the mean weights on the model after.
        equal: ``(new, old)`` for each of them with equal ratios.
        adaptive: ``(new, old)`` for each of them with adaptive ratios.
        soups: The adaptive soups.
    """

    means: tuple[float, ...]
    equal: tuple[tuple[float, float], ...]
    adaptive: tuple[tuple[float, float], ...]
    soups: tuple[Soup, ...]

    @property
    def curves(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """Both, by name, for :func:`front_picture`."""
        return {"equal ratios": self.equal, "adaptive ratios": self.adaptive}


def pareto_front(
    recipe: AdaptiveSoup,
    ingredients: Sequence[Ingredient | Source | WeightsFile],
    chooser: Evaluator,
    new: Evaluator,
    old: Evaluator,
    means: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    progress: Progress = silent,
) -> Front:
    """Cook a recipe for several means, and score each soup, and the plain average of the same mean, twice.

    A higher new skill at the same mean is no gain by itself: ratios may buy it with the old skill. What lies above the
    curve of equal ratios is.

    Args:
        recipe: The recipe; its mean is replaced.
        ingredients: The model before, and the one after (or several).
        chooser: What ratios are chosen on.
        new: Scores the new skill, on data that nothing is chosen on; higher is better.
        old: Scores the old skill, likewise.
        means: α.
        progress: Shows how far it is.

    Raises:
        RecipeError: See :meth:`.AdaptiveSoup.cook`.
    """
    equal, adaptive, soups = [], [], []
    for mean in progress(means, "cooking for each mean", len(means)):
        soup = replace(recipe, mean=mean).cook(ingredients, chooser)
        sources = [item.weights for item in soup.ingredients]
        shares = [1.0, *([1.0] if len(sources) == 2 else _after(soup))]
        plain = combine(sources, [1 - mean, *(mean * share for share in shares[1:])])
        equal.append((new.natural(new.score(plain)), old.natural(old.score(plain))))
        weights = soup.weights()
        adaptive.append((new.natural(new.score(weights)), old.natural(old.score(weights))))
        soups.append(soup)
    return Front(tuple(means), tuple(equal), tuple(adaptive), tuple(soups))


def _after(soup: Soup) -> list[float]:
    """How the models after were averaged among themselves."""
    row = next((row for row in soup.coefficients.values() if row[0] < 1), None)
    if row is None:  # of none of them anything is left
        return [0.0] * (len(soup.ingredients) - 1)
    return [share / (1 - row[0]) for share in row[1:]]


def front_picture(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    new: str = "new skill",
    old: str = "old skill",
    labels: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Draw curves of the old skill over the new one; up and to the right is better.

    Args:
        curves: Points ``(new, old)`` by name.
        path: A PNG.
        new: Name of the first axis.
        old: Name of the second.
        labels: A text for each point of some curves.
    """
    path, pictures = Path(path), list[Picture]()
    with new_figure(5.2, 3.8, pictures, path.stem, f"{old} over {new}") as figure:
        axes = figure.subplots()
        looks = zip(curves.items(), (BLUE, *COLOURS), ("o", *MARKERS), strict=False)
        for (name, points), colour, marker in looks:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, marker=marker, color=colour, label=name, markersize=4.5)
            for place, text in zip(points, (labels or {}).get(name, ()), strict=False):
                axes.annotate(text, place, (4, 4), textcoords="offset points", fontsize=6, color=GREY)
        axes.set(xlabel=new, ylabel=old)
        axes.legend(loc="lower left")
    with atomic_path(path) as temporary:
        temporary.write_bytes(pictures[0].png)
    return path
