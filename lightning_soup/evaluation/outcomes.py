"""What a model answered on a test set, image by image: the raw material of every comparison in a report."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation.robustness import Classes, check_classes, project, project_targets

__all__ = ["Outcome", "ensemble"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The logits of one model on one test set, beside the right answers.

    Args:
        logits: Raw outputs f(x; θ), ``[N, C]``.
        targets: Class indices, ``[N]``.
        groups: Which rows stem from one original image, ``[N]``, where a test set shows the same image more
            than once (six corruptions of each test image, say). Such rows are not independent, so intervals
            resample them together. Default: every row is an image of its own.
        classes: Which classes compete on this test set; see :mod:`.robustness`. Default: all of them.

    Raises:
        LightningSoupError: Shapes that do not fit together, an empty test set, or a target that is no class.
    """

    logits: Tensor
    targets: Tensor
    groups: Tensor | None = None
    classes: Classes | None = None

    def __post_init__(self) -> None:
        if self.logits.dim() != 2 or self.targets.shape != self.logits.shape[:1] or not len(self.targets):
            raise LightningSoupError(
                f"An outcome needs logits [N, C] and targets [N] with N > 0; got logits "
                f"{list(self.logits.shape)} and targets {list(self.targets.shape)}."
            )
        if self.groups is not None and self.groups.shape != self.targets.shape:
            raise LightningSoupError(
                f"The groups of an outcome must be [N] like its targets: expected "
                f"{list(self.targets.shape)}, got {list(self.groups.shape)}."
            )
        low, high = int(self.targets.min()), int(self.targets.max())
        if low < 0 or high >= self.logits.shape[1]:
            raise LightningSoupError(
                f"Targets run from {low} to {high}, but the logits have {self.logits.shape[1]} classes. "
                f"Was the model built with the num_classes of this test set?"
            )
        if self.classes is not None:
            check_classes(self.classes, self.logits.shape[1])

    @cached_property
    def competing(self) -> tuple[Tensor, Tensor]:
        """Logits ``[N, G]`` and targets ``[N]`` among the classes that compete."""
        if self.classes is None:
            return self.logits, self.targets
        return project(self.logits, self.classes), project_targets(self.targets, self.classes)

    @cached_property
    def correct(self) -> Tensor:
        """Whether the largest logit is the target's, bool ``[N]``. A row that holds a NaN counts as wrong."""
        logits, targets = self.competing
        return (logits.argmax(dim=1) == targets) & ~self.logits.isnan().any(dim=1)

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct.double().mean().item()

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of the targets: wrong answers given with confidence cost most."""
        logits, targets = self.competing
        return functional.cross_entropy(_widened(logits), targets).item()


def ensemble(outcomes: Iterable[Outcome]) -> Outcome:
    """The logit ensemble (1/k) Σ f(x; θ_i): raw logits are averaged, not probabilities (Model Soups).

    All logits are averaged before classes that compete are looked at. It is what a soup is compared with: the same
    ingredients at k times the cost per image. The outcomes are consumed one at a time, so a generator keeps two sets of
    logits in memory however many models there are.

    Raises:
        LightningSoupError: No outcome, or outcomes that are not of the same test set in the same order.
    """
    total: Tensor | None = None
    count = 0
    for outcome in outcomes:
        if total is None:
            first, total = outcome, _widened(outcome.logits).clone()
        elif outcome.logits.shape != total.shape or not torch.equal(outcome.targets, first.targets):
            raise LightningSoupError(
                f"Outcome {count} is not of the same test set as outcome 0: its logits are "
                f"{list(outcome.logits.shape)} against {list(total.shape)}, or its targets differ. Predict "
                f"with shuffle=False and without random sampling, on the same test set for every model."
            )
        else:
            total += outcome.logits
        count += 1
    if total is None:
        raise LightningSoupError("An ensemble needs the outcome of at least one model; got none.")
    return Outcome(total / count, first.targets, first.groups, first.classes)


def _widened(logits: Tensor) -> Tensor:
    """Half precision as float32: sums of 16-bit logits lose digits, and 16-bit losses are coarse."""
    return logits if logits.dtype == torch.float64 else logits.float()
