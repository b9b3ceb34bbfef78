"""Whether probabilities mean what they say: log-likelihood with and without temperature, Brier, calibration error.

N samples, C classes; logarithms are natural, so that log-likelihoods are in nats.

Source: the measures of Wright and Augenstein, Aggregating Soft Labels from Crowd Annotations Improves Uncertainty
Estimation Under Distribution Shift, PLOS ONE 20(6), 2025. Temperature scaling: Guo et al., On Calibration of Modern
Neural Networks, ICML 2017; the calibrated log-likelihood: Ashukha et al., Pitfalls of In-Domain Uncertainty Estimation,
ICLR 2020.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_f1_score

from lightning_soup.errors import LightningSoupError

__all__ = [
    "Calibration",
    "LabelQuality",
    "brier_score",
    "calibrated_nll",
    "fit_temperature",
    "label_quality",
    "measure_calibration",
    "nll_weights",
]

LOWEST, HIGHEST = 1e-3, 1e3  # of a temperature: where all answers are right the best one would be 0


@dataclass(frozen=True)
class Calibration:
    """How good a classifier's probabilities are on one test set.

    Attributes:
        accuracy: Share of right answers, 0 to 1.
        macro_f1: Mean over classes of the F1 score, 0 to 1; classes that neither occur nor are predicted are left out.
        nll: Mean negative log-likelihood of the targets.
        cll: The same after temperature scaling, see :func:`calibrated_nll`. Lower is better, although the paper calls
            it calibrated log-likelihood.
        temperature: The temperature that is best for all of the samples. Above 1: the classifier is overconfident.
        brier: Σ_c (q(c) − 1[c = y])², mean over samples, 0 to 2.
        ece: Expected calibration error, 15 bins of equal width, 0 to 1.
    """

    accuracy: float
    macro_f1: float
    nll: float
    cll: float
    temperature: float
    brier: float
    ece: float


def measure_calibration(logits: Tensor, targets: Tensor, splits: int = 5, seed: int = 0, bins: int = 15) -> Calibration:
    """All measures of a classifier on a test set, for example of an :class:`.Outcome`'s ``logits`` and ``targets``.

    Args:
        logits: ``[N, C]``.
        targets: Class numbers, ``[N]``.
        splits: Of :func:`calibrated_nll`.
        seed: Of :func:`calibrated_nll`.
        bins: Of the calibration error.

    Raises:
        LightningSoupError: Shapes that do not fit, logits that are not finite, targets that are no classes, fewer than
            two samples, or a number out of range.
    """
    logits, targets = _checked(logits, targets)
    if bins < 1:
        raise LightningSoupError(f"bins={bins}: expected 1 or more.")
    classes = logits.shape[1]
    q = logits.softmax(dim=1)
    return Calibration(
        accuracy=(logits.argmax(dim=1) == targets).double().mean().item(),
        macro_f1=multiclass_f1_score(logits, targets, classes, average="macro").item(),
        nll=F.cross_entropy(logits, targets).item(),
        cll=calibrated_nll(logits, targets, splits, seed),
        temperature=fit_temperature(logits, targets),
        brier=brier_score(q, targets),
        ece=multiclass_calibration_error(q, targets, classes, n_bins=bins, norm="l1").item(),
    )


def calibrated_nll(logits: Tensor, targets: Tensor, splits: int = 5, seed: int = 0) -> float:
    """Negative log-likelihood after temperature scaling: fitted on a random half, scored on the other, mean of splits.

    Models that differ in confidence alone are alike then. The temperature is fitted on test samples, as in the paper:
    it is a measure of a model, not a score that a user would have without labels.

    Args:
        logits: ``[N, C]``.
        targets: Class numbers, ``[N]``.
        splits: How many times the samples are halved.
        seed: Decides the halves: with N, and nothing else.

    Raises:
        LightningSoupError: As :func:`measure_calibration`.
    """
    logits, targets = _checked(logits, targets)
    if splits < 1:
        raise LightningSoupError(f"splits={splits}: expected 1 or more.")
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(splits):
        order = torch.randperm(len(targets), generator=generator)
        fitted, scored = order[: len(order) // 2], order[len(order) // 2 :]
        T = fit_temperature(logits[fitted], targets[fitted])
        scores.append(F.cross_entropy(logits[scored] / T, targets[scored]).item())
    return sum(scores) / splits


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature T with the least negative log-likelihood of softmax(logits / T), within 0.001 and 1000.

    In 1/T the log-likelihood is concave, and its slope, mean(z_y − E_q z), falls: the zero is found by bisection, in
    the logarithm, so that there are neither steps to choose nor starts.

    Args:
        logits: ``[N, C]``.
        targets: Class numbers, ``[N]``.

    Raises:
        LightningSoupError: As :func:`measure_calibration`.
    """
    logits, targets = _checked(logits, targets, least=1)
    logits = logits - logits.gather(1, targets[:, None])
    low, high = np.log(LOWEST), np.log(HIGHEST)  # of T
    while high - low > 1e-12:
        middle = (low + high) / 2
        q = (logits / np.exp(middle)).softmax(dim=1)
        too_sharp = (q * logits).sum(1).mean().item() > 0
        low, high = (middle, high) if too_sharp else (low, middle)
    return float(np.exp((low + high) / 2))


def brier_score(probabilities: Tensor, targets: Tensor) -> float:
    """Σ_c (q(c) − 1[c = y])², mean over samples: 0 for certain and right, 2 for certain and wrong.

    Args:
        probabilities: q, ``[N, C]``.
        targets: Class numbers, ``[N]``.
    """
    return (probabilities - F.one_hot(targets, probabilities.shape[1])).square().sum(1).mean().item()


# ----------------------------------------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class LabelQuality:
    """How good soft labels are, by experts' labels.

    Attributes:
        accuracy: Share of items whose likeliest class is the expert's, 0 to 1; of equal ones the first counts.
        nll: Mean negative log-likelihood of the experts' labels, after smoothing.
        entropy: Mean entropy of the labels themselves.
    """

    accuracy: float
    nll: float
    entropy: float


def label_quality(labels: np.ndarray, experts: Sequence[int] | np.ndarray, smoothing: float = 0.01) -> LabelQuality:
    """Compare soft labels with experts' labels.

    Args:
        labels: p, rows with sum 1, [N, C].
        experts: Class numbers, [N].
        smoothing: ε of p ← (1 − ε)·p + ε/C, before the log-likelihood: labels have zeros.

    Raises:
        LightningSoupError: Shapes that do not fit, rows that are no distributions, experts' labels that are no classes,
            or smoothing outside (0, 1].
    """
    p, y = np.asarray(labels, float), np.asarray(experts)
    if p.ndim != 2 or y.shape != p.shape[:1] or not len(y):
        raise LightningSoupError(
            f"Labels {list(p.shape)} and experts' labels {list(y.shape)}: expected [N, C] and [N], with N > 0, of the "
            "same items in the same order."
        )
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= p.shape[1]:
        raise LightningSoupError(f"Experts' labels are not all class numbers: expected 0 to {p.shape[1] - 1}.")
    if not 0 < smoothing <= 1:
        raise LightningSoupError(f"smoothing={smoothing}: expected a number in (0, 1]; the paper has 0.01.")
    if not ((p >= 0).all() and np.allclose(p.sum(1), 1, atol=1e-6)):
        raise LightningSoupError("Labels are not all distributions: expected rows of 0 or more with sum 1.")
    of_expert = p[np.arange(len(y)), y]
    nll = -np.log((1 - smoothing) * of_expert + smoothing / p.shape[1]).mean()
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(1).mean()
    return LabelQuality(float((p.argmax(1) == y).mean()), float(nll), float(entropy))


def nll_weights(
    labels: Mapping[str, np.ndarray], experts: Sequence[int] | np.ndarray, smoothing: float = 0.01
) -> dict[str, float]:
    """Weights of methods from the labels of experts: w_m ∝ min_k NLL_k / NLL_m, with sum 1.

    Args:
        labels: Soft labels by method, [N, C] each: of those items, in the same order, that experts labelled.
        experts: Class numbers, [N].
        smoothing: As for :func:`label_quality`.

    Returns:
        Weights by method, in the order of ``labels``; ``soft_labels(weights=…)`` takes ``list(found.values())``.

    Raises:
        LightningSoupError: No methods, or as :func:`label_quality`.
    """
    if not labels:
        raise LightningSoupError("nll_weights needs the labels of one method or more.")
    nll = {name: label_quality(p, experts, smoothing).nll for name, p in labels.items()}
    best = min(nll.values())
    raw = {name: best / value if value > 0 else 1.0 for name, value in nll.items()}
    return {name: value / sum(raw.values()) for name, value in raw.items()}


def _checked(logits: Tensor, targets: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    logits, targets = torch.as_tensor(logits).detach().cpu().double(), torch.as_tensor(targets).detach().cpu()
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or len(targets) < least:
        raise LightningSoupError(
            f"Got logits {list(logits.shape)} and targets {list(targets.shape)}; expected [N, C] and [N], N ≥ {least}."
        )
    if targets.is_floating_point() or targets.min() < 0 or targets.max() >= logits.shape[1]:
        raise LightningSoupError(f"Targets are not all class numbers: expected 0 to {logits.shape[1] - 1}.")
    if not logits.isfinite().all():
        row = int((~logits.isfinite()).any(1).nonzero()[0])
        raise LightningSoupError(f"The logits of sample {row} are not finite. Look at the model's weights.")
    return logits, targets.long()
