"""Judging weights with BatchNorm statistics of their own."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor

from lightning_soup.evaluation.evaluator import Evaluator, Weights
from lightning_soup.evaluation.module_evaluator import ModuleEvaluator
from lightning_soup.weights.weights_file import WeightsFile


class RecalibratedEvaluator(Evaluator):
    """Judges weights as another evaluator does, with BatchNorm statistics that are estimated anew for each of them.

    Where candidates are averages or were pruned, the statistics they came with are not theirs; so ingredients and
    averages are compared alike. Costs a pass over the training batches for each candidate.

    Args:
        inner: The evaluator; its module is overwritten, and holds the statistics of the last candidate afterwards.
    """

    def __init__(self, inner: ModuleEvaluator) -> None:
        self.inner, self.metric, self.mode = inner, inner.metric, inner.mode
        self._scores: dict[str, float] = {}

    def score(self, weights: Weights) -> float:
        """Estimate, then score. A file is judged once."""
        key = weights.digest() if isinstance(weights, WeightsFile) else None
        if key is not None and key in self._scores:
            return self._scores[key]
        self.inner.recalibrate(weights)
        score = self.inner.score(self.inner.slot())
        if key is not None:
            self._scores[key] = score
        return score

    def slot(self) -> Weights | None:
        """The inner one's."""
        return self.inner.slot()

    def ignored(self) -> tuple[str, ...]:
        """The inner one's."""
        return self.inner.ignored()

    def head(self) -> tuple[str, ...]:
        """The inner one's."""
        return self.inner.head()

    def batches(self, epoch: int, batch_size: int) -> Iterable[Any]:
        """The inner one's."""
        return self.inner.batches(epoch, batch_size)

    def loss_and_grad(self, weights: Weights, batch: Any) -> tuple[float, dict[str, Tensor]]:
        """The inner one's: with the statistics that the weights came with."""
        return self.inner.loss_and_grad(weights, batch)

    def recalibrate(self, weights: Weights, frozen: Collection[str] = ()) -> dict[str, Tensor]:
        """The inner one's."""
        return self.inner.recalibrate(weights, frozen)
