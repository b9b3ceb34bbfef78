"""How far probabilities can be trusted: of soft labels against experts, and of classifiers on test data."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup

__all__ = [
    "brier_score",
    "calibrated_nll",
    "calibration",
    "expected_calibration_error",
    "fit_temperature",
    "label_accuracy",
    "label_nll",
    "macro_f1",
]


def label_accuracy(p: Tensor, experts: Tensor) -> float:
    """Share of soft labels ``[I, C]`` whose largest class is the experts', ``[I]``."""
    return float((p.argmax(1) == experts).double().mean())


def label_nll(p: Tensor, experts: Tensor, smoothing: float = 0.01) -> float:
    """Mean −log p_i(expert), after p ← (1 − s)·p + s/C: some methods give exact zeros.

    Args:
        p: Soft labels, ``[I, C]``.
        experts: True classes, ``[I]``.
        smoothing: s.
    """
    smooth = (1 - smoothing) * p.double() + smoothing / p.shape[1]
    return float(-smooth.gather(1, experts[:, None]).log().mean())


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """T with the least mean cross entropy of logits/T. It is convex in 1/T, so bisection finds it.

    Args:
        logits: ``[N, C]``.
        targets: ``[N]``.

    Raises:
        UnsupportedSetup: Shapes that do not fit, or nothing.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599).
    """
    logits = _checked(logits, targets)
    logits = logits - logits.max(1, keepdim=True).values
    right = logits.gather(1, targets[:, None]).mean()

    def slope(beta: float) -> float:
        return float(((beta * logits).softmax(1) * logits).sum(1).mean() - right)

    low, high = 1e-6, 1e6
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def calibrated_nll(logits: Tensor, targets: Tensor, splits: int = 5, seed: int = 0) -> float:
    """CLL: cross entropy after temperature scaling; lower is better.

    T is fitted on a random half of the test set and scored on the other; the mean over several halves.

    Args:
        logits: ``[N, C]``.
        targets: ``[N]``.
        splits: How many halves.
        seed: Of the halves.

    Raises:
        UnsupportedSetup: As of :func:`fit_temperature`, or fewer than two rows.
    """
    logits = _checked(logits, targets)
    if len(targets) < 2 or splits < 1:
        raise UnsupportedSetup(
            f"calibrated_nll: got {len(targets)} rows and {splits} splits; expected two rows or more."
        )
    found = []
    for split in range(splits):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed + split)).to(targets.device)
        fitted, scored = order[: len(order) // 2], order[len(order) // 2 :]
        temperature = fit_temperature(logits[fitted], targets[fitted])
        found.append(float(torch.nn.functional.cross_entropy(logits[scored] / temperature, targets[scored])))
    return sum(found) / splits


def brier_score(logits: Tensor, targets: Tensor) -> float:
    """Mean Σ_c (q(c) − 1_y(c))², q = softmax(logits)."""
    q = _checked(logits, targets).softmax(1)
    return float((q - torch.nn.functional.one_hot(targets, q.shape[1])).square().sum(1).mean())


def expected_calibration_error(logits: Tensor, targets: Tensor, bins: int = 15) -> float:
    """ECE: mean distance between confidence and accuracy over bins of equal width, weighted by how many are in each."""
    confidence, chosen = _checked(logits, targets).softmax(1).max(1)
    right = (chosen == targets).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(2, bins, dtype=torch.float64)
    sums[0].index_add_(0, place.cpu(), confidence.double().cpu())
    sums[1].index_add_(0, place.cpu(), right.cpu())
    return float((sums[0] - sums[1]).abs().sum() / len(targets))


def macro_f1(logits: Tensor, targets: Tensor) -> float:
    """Mean F1 over the classes that occur in targets or predictions."""
    chosen, classes = _checked(logits, targets).argmax(1), logits.shape[1]
    scores = []
    for c in range(classes):
        hit = int(((chosen == c) & (targets == c)).sum())
        either = int((chosen == c).sum() + (targets == c).sum())
        if either:
            scores.append(2 * hit / either)
    return sum(scores) / len(scores)


def calibration(logits: Tensor, targets: Tensor) -> Mapping[str, float]:
    """All of them by name: ``cll``, ``nll``, ``temperature``, ``brier``, ``ece``, ``macro_f1``, ``accuracy``."""
    wide = _checked(logits, targets)
    return {
        "cll": calibrated_nll(wide, targets),
        "nll": float(torch.nn.functional.cross_entropy(wide, targets)),
        "temperature": fit_temperature(wide, targets),
        "brier": brier_score(wide, targets),
        "ece": expected_calibration_error(wide, targets),
        "macro_f1": macro_f1(wide, targets),
        "accuracy": label_accuracy(wide, targets),
    }


def _checked(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not len(targets) or not logits.isfinite().all():
        raise UnsupportedSetup(
            f"got logits {list(logits.shape)} and targets {list(targets.shape)}; expected finite logits [N, C] and "
            "classes [N], one or more."
        )
    return logits.detach().double()
