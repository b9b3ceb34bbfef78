"""Inspecting checkpoints: by their weights, and where there is data, by what lies between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation.module_evaluator import ModuleEvaluator
from lightning_soup.landscape.basins import Basins, find_basins
from lightning_soup.landscape.inspection import Inspection, inspect_weights
from lightning_soup.landscape.similarity import cka
from lightning_soup.progress import Progress, silent
from lightning_soup.recipes.checks import statistics_of
from lightning_soup.recipes.ingredient import Ingredient

__all__ = ["Inspected", "inspect_checkpoints"]


@dataclass(frozen=True)
class Inspected:
    """What was found.

    Attributes:
        seen: By the weights alone.
        basins: By validation, of those that were compared and are not broken; None without data or with fewer than two.
        alike: CKA between the outputs of these, ``[K, K]``; None without data, or where the module gives no logits.
    """

    seen: Inspection
    basins: Basins | None = None
    alike: Tensor | None = None


def inspect_checkpoints(
    checkpoints: Sequence[Ingredient],
    start: Ingredient | None = None,
    evaluator: ModuleEvaluator | None = None,
    *,
    budget: int | None = None,
    tolerance: float | None = None,
    progress: Progress = silent,
) -> Inspected:
    """Look at checkpoints; BatchNorm's statistics are estimated anew in every middle where training estimated them.

    Args:
        checkpoints: Two or more.
        start: What they started from, if it is there still.
        evaluator: Judges weights; None: there is no data.
        budget: As of :func:`.find_basins`.
        tolerance: As of :func:`.find_basins`.
        progress: Shows how far it is.

    Raises:
        LightningSoupError: As of :func:`.inspect_weights` and :func:`.find_basins`.
    """
    ignored = () if evaluator is None else evaluator.ignored()
    found = [item.without(ignored) for item in checkpoints]
    origin = None if start is None else start.without(ignored).weights
    weights = [item.weights for item in found]
    seen = inspect_weights(weights, origin, labels=[item.name for item in found], progress=progress)
    whole = [weights[i] for i in seen.compared if i not in seen.broken]
    if evaluator is None or len(whole) < 2:
        return Inspected(seen)
    recalibrate = bool(statistics_of(whole).differing)
    options = {"budget": budget, "tolerance": tolerance, "recalibrate": recalibrate, "progress": progress}
    return Inspected(seen, find_basins(whole, evaluator, **options), _alike(whole, evaluator, progress))


def _alike(whole: Sequence, evaluator: ModuleEvaluator, progress: Progress) -> Tensor | None:
    try:
        outputs = []
        for weights in progress(whole, "outputs", len(whole)):
            sets = evaluator.outcomes(weights, "select")
            outputs.append(torch.cat([outcome.logits for outcome in sets.values()]))
        rows = [[cka(x, y) for y in outputs] for x in outputs]
    except LightningSoupError:  # no classifier, or outputs that are not finite: the barriers say enough
        return None
    return torch.tensor(rows, dtype=torch.float64)
