"""Robustness: which classes compete on a shifted test set, and the mean over several such sets.

Sets like ImageNet-R and -A have images of some of the training classes only: the logits are restricted to those classes
before the argmax. ObjectNet's classes each cover several of ImageNet's: the largest of their logits stands for them.

Source: the evaluation of Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022 (arXiv 2109.01903).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_soup.errors import LightningSoupError

if TYPE_CHECKING:
    from lightning_soup.evaluation.outcomes import Outcome

__all__ = ["Classes", "Robustness", "check_classes", "project", "project_targets"]

Classes = Sequence[Sequence[int]]
"""The classes that compete on a set, each as the training classes that it covers: one for a subset, or several."""


def check_classes(classes: Classes, count: int) -> None:
    """Make sure that competing classes cover training classes, each at most once.

    Args:
        classes: The competing classes.
        count: Number of training classes.

    Raises:
        LightningSoupError: Fewer than two, an empty one, an unknown training class, or one that is covered twice.
    """
    covered = [index for members in classes for index in members]
    if len(classes) < 2 or not all(len(members) for members in classes):
        raise LightningSoupError(
            f"Competing classes: expected two or more, each with at least one training class; got {list(classes)}."
        )
    wrong = sorted({index for index in covered if not 0 <= index < count})
    if wrong:
        raise LightningSoupError(
            f"Competing classes name the training classes {wrong[:10]}, but the model has {count} (0 to {count - 1})."
        )
    twice = sorted({index for index in covered if covered.count(index) > 1}) if len(set(covered)) < len(covered) else []
    if twice:
        raise LightningSoupError(
            f"The training classes {twice[:10]} belong to two competing classes, so a target cannot be told. Each may "
            "belong to one."
        )


def project(logits: Tensor, classes: Classes) -> Tensor:
    """Logits of the competing classes: each the largest of its training classes'.

    Average the logits of an ensemble first: the mean of maxima is not the maximum of means.

    Args:
        logits: Of the training classes, ``[N, C]``.
        classes: The G competing classes.

    Returns:
        ``[N, G]``.
    """
    if all(len(members) == 1 for members in classes):
        return logits[:, [index for (index,) in classes]]
    return torch.stack([logits[:, list(members)].amax(dim=1) for members in classes], dim=1)


def project_targets(targets: Tensor, classes: Classes) -> Tensor:
    """The competing class of each target.

    Args:
        targets: Training classes, ``[N]``; of a competing class with several, any of them.
        classes: The competing classes.

    Raises:
        LightningSoupError: A target whose class does not compete.
    """
    size = 1 + max(int(targets.max()), max(index for members in classes for index in members))
    place = torch.full((size,), -1, dtype=targets.dtype)
    for number, members in enumerate(classes):
        place[list(members)] = number
    found = place.to(targets.device)[targets]
    if (found < 0).any():
        outside = sorted(set(targets[found < 0].tolist()))
        raise LightningSoupError(
            f"The set has images of the training classes {outside[:10]}, which are not among the competing classes. "
            "Add them, or leave the images out."
        )
    return found


@dataclass(frozen=True)
class Robustness:
    """Accuracy on the main test set and under shift, 0 to 1.

    Attributes:
        main: On the main set.
        shifted: On each shifted set.
    """

    main: float
    shifted: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean over the shifted sets, equal weight for each whatever its size; NaN without any."""
        return sum(self.shifted.values()) / len(self.shifted) if self.shifted else float("nan")

    @classmethod
    def of(cls, outcomes: Mapping[str, "Outcome"]) -> "Robustness":
        """Accuracies of one model, among the classes that compete on each set.

        Args:
            outcomes: Its outcomes by test set, as :meth:`.ModuleEvaluator.outcomes` gives them; the first is the main
                set, the others are shifted.

        Raises:
            LightningSoupError: No outcomes.
        """
        if not outcomes:
            raise LightningSoupError("Robustness needs the outcome of at least the main test set; got none.")
        main, *shifted = outcomes
        return cls(outcomes[main].accuracy, {name: outcomes[name].accuracy for name in shifted})
