"""The loss of soft targets: the divergence of a classifier's distribution from that of a label.

B samples, C classes.

Source: Wright and Augenstein, Aggregating Soft Labels from Crowd Annotations Improves Uncertainty Estimation Under
Distribution Shift, PLOS ONE 20(6), 2025.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup

__all__ = ["agreed_weights", "are_soft", "check_targets", "soft_target_kl"]


def are_soft(targets: Tensor) -> bool:
    """Whether targets are rows of probabilities ``[B, C]``, not class numbers ``[B]``."""
    return targets.ndim == 2 and targets.is_floating_point()


def soft_target_kl(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None
) -> Tensor:
    """KL(p ‖ q), summed over the classes, mean over the samples, with q = softmax(logits).

    It is the cross entropy of p and q minus the entropy of p, so both have the same gradient, and its least value is 0.
    Zeros in p are taken as they are: 0·log 0 = 0.

    Args:
        logits: ``[B, C]``.
        targets: p, rows of probabilities, ``[B, C]``.
        label_smoothing: ε of p ← (1 − ε)·p + ε/C.
        class_weights: Weight of each sample by the likeliest class of its p, ``[C]``. The sum is divided by B all the
            same, as in the paper's code, so that weights with mean 1 leave the learning rate what it is.

    Raises:
        UnsupportedSetup: Targets that are not rows of probabilities, or not as many weights as classes.
    """
    if not are_soft(targets) or targets.shape != logits.shape:
        raise UnsupportedSetup(
            f"targets=soft: the batch has targets {list(targets.shape)} of {targets.dtype} for logits "
            f"{list(logits.shape)}; expected rows of probabilities of the same shape, as CrowdDataModule gives them. "
            "For class numbers set targets: hard."
        )
    wide = torch.promote_types(logits.dtype, torch.float32)  # sums lose too much in 16 bits
    p = targets.to(wide)
    if label_smoothing:
        p = torch.lerp(p, torch.full_like(p, 1 / p.shape[1]), label_smoothing)
    divergence = F.kl_div(logits.to(wide).log_softmax(dim=1), p, reduction="none").sum(dim=1)
    if class_weights is None:
        return divergence.mean()
    if len(class_weights) != p.shape[1]:
        raise UnsupportedSetup(
            f"class_weights has {len(class_weights)} numbers for {p.shape[1]} classes: give one for each class."
        )
    return (divergence * p.new_tensor(class_weights)[targets.argmax(dim=1)]).mean()


def check_targets(targets: str, class_weights: Sequence[float] | str | None, classes: int) -> None:
    """Refuse options of a classifier for soft targets that cannot work.

    Raises:
        UnsupportedSetup: An unknown kind, or weights that do not fit.
    """
    if targets not in ("hard", "soft"):
        raise UnsupportedSetup(f"targets={targets!r}: expected hard (class numbers) or soft (rows of probabilities).")
    if class_weights is not None and targets == "hard":
        raise UnsupportedSetup("class_weights are for soft targets: set targets: soft, or leave them out.")
    if class_weights is None or class_weights == "balanced":
        return
    valid = not isinstance(class_weights, str) and all(0 <= weight < math.inf for weight in class_weights)
    if not valid or len(class_weights) != classes:
        raise UnsupportedSetup(
            f"class_weights={class_weights}: expected {classes} numbers of 0 or more, one per class, or balanced."
        )


def agreed_weights(
    targets: str, class_weights: Sequence[float] | str | None, datamodule: Any
) -> Sequence[float] | None:
    """The weights of the classes for a training, and a check that data and classifier speak of the same targets.

    Args:
        targets: What the classifier is to be trained on.
        class_weights: Its option.
        datamodule: The data; one that gives soft targets says so by ``soft_targets = True``.

    Raises:
        UnsupportedSetup: Soft targets for a classifier of hard ones, or ``balanced`` without a data module that knows.
    """
    if targets == "hard" and getattr(datamodule, "soft_targets", False):
        raise UnsupportedSetup(
            f"{type(datamodule).__name__} trains on rows of probabilities, the classifier on class numbers. Set "
            "targets: soft for the model."
        )
    if class_weights != "balanced":
        return class_weights
    found = getattr(datamodule, "class_weights", None)
    if found is None:
        name = "no data module" if datamodule is None else type(datamodule).__name__
        raise UnsupportedSetup(
            f"class_weights=balanced: there is {name}, which knows none. Give a number per class, or a data module "
            "with class_weights, such as CrowdDataModule."
        )
    return [float(weight) for weight in found]
