"""What a recipe asks of the outside world: how good are these weights?"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_soup.errors import RecipeError

Weights = Mapping[str, Tensor]
Split = Literal["select", "third", "report"]


_SMALLER_IS_BETTER = {"loss", "error", "err", "nll", "ppl", "perplexity", "mse", "rmse", "mae", "wer", "cer", "ece"}


def direction(metric: str) -> Literal["min", "max"]:
    """Whether a metric is minimised, by its name: losses and errors are (``val_loss``, ``val/mse``), others are not."""
    return "min" if _SMALLER_IS_BETTER & set(re.split(r"[^a-z]+", metric.lower())) else "max"


def not_logged(metric: str, logged: Iterable[str]) -> str:
    """What to say of a metric that validation does not log."""
    names = ", ".join(sorted(logged))
    if names:
        return f"the metric {metric!r} is not logged in validation. Logged: {names}."
    return (
        f"the metric {metric!r} is not logged in validation. Logged: nothing. Call self.log in validation_step; with "
        "on_epoch=False it gives no value for the whole of the validation."
    )


class Evaluator(ABC):
    """Judges weights on held-out data that is neither training nor test data.

    Subclasses implement :meth:`score`; recipes that choose coefficients by gradient also need :meth:`batches` and
    :meth:`loss_and_grad`.

    Attributes:
        metric: Name of the metric that is maximised or minimised.
        mode: ``"max"`` where a larger metric is better, ``"min"`` where a smaller one is.
    """

    metric: str = "score"
    mode: Literal["min", "max"] = "max"

    @abstractmethod
    def score(self, weights: Weights) -> float:
        """Judge weights: **higher is always better**; a ``mode="min"`` metric is negated here and nowhere else."""

    def splits(self) -> tuple[Split, ...]:
        """The splits that :meth:`score_on` can judge on."""
        return ("select",)

    def score_on(self, weights: Weights, split: Split) -> float:
        """Judge on a named split: ``"select"`` as :meth:`score` does, or ``"third"``, which chose nothing so far.

        Raises:
            RecipeError: There is no such split.
        """
        if split == "select":
            return self.score(weights)
        raise RecipeError(f"{type(self).__name__} has no {split} split to judge on.")

    def slot(self) -> Weights | None:
        """Tensors into which a recipe may write a candidate before it asks for its score.

        This saves a copy of the model: :meth:`score` of these very tensors has nothing to load. ``None`` when there
        are none.
        """
        return None

    def ignored(self) -> tuple[str, ...]:
        """How names begin that are no weights, such as states of metrics: recipes leave those tensors out."""
        return ()

    def head(self) -> tuple[str, ...]:
        """Names of the tensors in which the outputs are linear: weight and bias of the last layer."""
        return ()

    def batches(self, epoch: int, batch_size: int) -> Iterable[Any]:
        """The held-out data in batches, in an order that depends on ``epoch`` only."""
        raise RecipeError(
            f"{type(self).__name__} gives no batches, so coefficients cannot be learned by gradient with it."
        )

    def loss_and_grad(self, weights: Weights, batch: Any) -> tuple[float, dict[str, Tensor]]:
        """The mean loss of ``batch`` and its gradient for every floating tensor that takes part."""
        raise RecipeError(f"{type(self).__name__} gives no gradients, so coefficients cannot be learned with it.")

    def recalibrate(self, weights: Weights, frozen: Collection[str] = ()) -> dict[str, Tensor]:
        """The BatchNorm statistics of these weights, estimated anew on training data; empty without BatchNorm.

        Args:
            weights: What they are estimated for.
            frozen: Names of statistics that were frozen in training: layers that have them keep and use them.
        """
        raise RecipeError(f"{type(self).__name__} cannot recalibrate BatchNorm statistics.")

    def natural(self, score: float) -> float:
        """The metric's own value of a score: undoes the negation of ``mode="min"``."""
        return -score if self.mode == "min" else score
