"""What detectors are judged by: the area under the ROC curve, F1, precision and recall, with one definition for all.

Fed with probabilities ``[N, C]``. All of them are torchmetrics, so that ranks judge all samples together: the mean of
the AUCs of ranks is not the AUC.

Source: the measures of Salman et al., AWARE-NET (arXiv 2505.00312): P(positive) > 0.5, strictly, is a detection.
"""

import warnings

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities.data import dim_zero_cat

__all__ = ["AUC", "Detection", "detection_metrics"]


class AUC(Metric):
    """Area under the ROC curve, ties counted half; of several classes the mean of each against all others.

    Of several classes only those count that are there. With samples of one class only, or a score that is NaN, the area
    is not defined: NaN, and a warning.

    Args:
        positive: The class whose probability is judged, of two.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, positive: int = 1):
        super().__init__()
        self.positive = positive
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Take in probabilities ``[N, C]`` and classes ``[N]``."""
        self.scores.append(probabilities.detach())
        self.targets.append(targets)

    def compute(self) -> Tensor:
        """The area, 0 to 1, or NaN."""
        scores, targets = dim_zero_cat(self.scores), dim_zero_cat(self.targets)
        present = targets.unique().tolist()
        if len(present) < 2:
            warnings.warn(
                f"AUC: all {len(targets)} samples are of the class {present[0]}, so the area under the ROC curve is "
                "not defined (NaN). Evaluate on samples of two classes or more.",
                stacklevel=2,
            )
            return scores.new_tensor(float("nan"))
        if broken := int(scores.isnan().any(dim=1).sum()):
            warnings.warn(
                f"AUC: probabilities of {broken} of {len(targets)} samples are NaN, so the area under the ROC curve is "
                "not defined (NaN). Look for a member whose training diverged.",
                stacklevel=2,
            )
            return scores.new_tensor(float("nan"))
        judged = [self.positive] if scores.shape[1] == 2 else present
        return torch.stack([_area(scores[:, label], targets == label) for label in judged]).mean()


def _area(scores: Tensor, positive: Tensor) -> Tensor:
    """The area of ranks: torchmetrics takes scores for logits where one is above 1, if only by rounding."""
    ranks = scores.unique(return_inverse=True)[1]
    return binary_auroc(ranks / len(scores), positive.long())


class Detection(Metric):
    """F1, precision or recall: of the positive class, of two; of several classes the mean over those that are there.

    Args:
        measure: ``f1``, ``precision`` or ``recall``. Without any detection precision is 0, and so is F1.
        classes: Number of classes. Of two, more than half is a detection; of several, the largest probability is.
        positive: The positive class, of two.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, measure: str, classes: int, positive: int = 1):
        super().__init__()
        self.measure, self.classes, self.positive = measure, classes, positive
        self.add_state("counts", default=torch.zeros(3, classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Take in probabilities ``[N, C]`` and classes ``[N]``."""
        if self.classes == 2:
            detected = (probabilities[:, self.positive] > 0.5).long()
            predicted = detected if self.positive == 1 else 1 - detected
        else:
            predicted = probabilities.argmax(dim=1)
        whole = ~probabilities.isnan().any(dim=1)  # NaN is an answer for no class
        hit = (predicted == targets) & whole
        for row, labels in enumerate((targets[hit], predicted[whole], targets)):
            self.counts[row] += torch.bincount(labels, minlength=self.classes)

    def compute(self) -> Tensor:
        """The measure, 0 to 1."""
        right, predicted, there = self.counts.double()
        over = {"f1": (predicted + there) / 2, "precision": predicted, "recall": there}[self.measure]
        values = (right / over.clamp(min=0.5)).float()
        return values[self.positive] if self.classes == 2 else values[there > 0].mean()


def detection_metrics(classes: int, positive: int = 1) -> MetricCollection:
    """AUC, F1, precision and recall by these names in lower case."""
    measures = {name: Detection(name, classes, positive) for name in ("f1", "precision", "recall")}
    return MetricCollection({"auc": AUC(positive), **measures}, compute_groups=False)
