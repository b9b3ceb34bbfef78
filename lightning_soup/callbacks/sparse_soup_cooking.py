"""The soup of one cycle: its copies scored, combined, and put into the module."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from lightning_soup.callbacks.pruned_weights import PrunedWeights
from lightning_soup.evaluation.evaluator import Evaluator
from lightning_soup.evaluation.fit_evaluator import FitEvaluator
from lightning_soup.evaluation.own_loops import normed
from lightning_soup.evaluation.recalibrated import RecalibratedEvaluator
from lightning_soup.progress import rich_progress, silent
from lightning_soup.recipes import Ingredient, Recipe, Soup


@dataclass(frozen=True)
class Cooking:
    """How the copies of a cycle become a soup.

    Attributes:
        recipe: How they are combined.
        monitor: The metric they are scored by, if they are.
        mode: Whether larger is better.
    """

    recipe: Recipe
    monitor: str | None
    mode: Literal["min", "max"]

    def soup_of(
        self, trainer: Trainer, module: LightningModule, copies: Sequence[Ingredient], pruned: PrunedWeights
    ) -> tuple[Soup, list[float]]:
        """Cook, and leave the soup in the module. Runs on every rank.

        BatchNorm statistics are estimated anew before every evaluation and for the soup, but in layers that are in
        evaluation mode while the copies train: what was trained relies on the statistics there.

        Args:
            trainer: The Trainer, in ``fit``.
            module: Its module.
            copies: The copies, which have one mask.
            pruned: The weights it lies over.

        Returns:
            The soup with its score, and the scores of the copies as the metric gives them.
        """
        inner = FitEvaluator(trainer, module, self.monitor or "", self.mode)
        renewed = any(layer.training for layer in normed(module).values())
        judge: Evaluator = RecalibratedEvaluator(inner) if renewed else inner
        evaluator = judge if self.monitor else None
        scores = [evaluator.score(copy.weights) for copy in copies] if evaluator else []
        if len(copies) > 1:
            shown = rich_progress if trainer.is_global_zero and trainer.progress_bar_callback is not None else silent
            # Copies may differ in what is zero beside the mask: weights that happen to be, in half precision often.
            soup = self.recipe.without_start_check(one_mask=True).cook(copies, evaluator, shown)
        else:
            soup = Soup("one copy", tuple(copies), (1.0,))
        soup = replace(soup, coefficients=trainer.strategy.broadcast(soup.coefficients))
        if renewed:
            soup = replace(soup, statistics={k: v.cpu() for k, v in inner.recalibrate(soup.weights()).items()})
        soup.apply_to(module)
        pruned.mask_weights()
        score = inner.score(inner.slot()) if evaluator else None
        soup = replace(soup, score=score, metric=self.monitor if evaluator else None, mode=self.mode)
        return soup, [judge.natural(value) for value in scores]
