"""How sure a difference is: the paired bootstrap for gains, Wilson's interval for accuracies."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from lightning_soup.errors import LightningSoupError

__all__ = ["Interval", "accuracy_interval", "paired_bootstrap", "sum_groups"]

# Resampled counts are drawn in pieces of this many numbers (8 MiB), however large the test set is.
CHUNK = 2**20


@dataclass(frozen=True)
class Interval:
    """An estimate and the confidence interval around it."""

    mean: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def contains_zero(self) -> bool:
        """Whether no difference at all is among the plausible ones."""
        return self.low <= 0 <= self.high

    def scaled(self, factor: float) -> "Interval":
        """The same interval in another unit, for example ``scaled(100)`` for percent."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor, self.confidence)


def paired_bootstrap(
    a: Tensor,
    b: Tensor,
    *,
    groups: Tensor | None = None,
    samples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The percentile interval of the mean of a − b over images, by resampling images with replacement.

    *Paired*: both models answer the same resampled images, so what is hard for both cancels. That is why a
    gain can be sure although the two models' own intervals overlap (Efron and Tibshirani, An Introduction to
    the Bootstrap, 1993).

    A resampled mean depends only on how often each *distinct* difference was drawn, and those counts are
    multinomial. For right/wrong outcomes there are three distinct differences (−1, 0, +1), so 2,000 resamples
    of 50,000 images cost milliseconds; real-valued outcomes (losses) take seconds, in some 20 MiB of memory.

    The interval covers the choice of test images, not the randomness of training. It is optimistic when only
    a handful of images differ: four against none already excludes zero, where an exact sign test would not.

    Args:
        a: Outcome of the first model per image: right or wrong, or any number such as a loss; ``[N]``.
        b: Outcome of the second model on the same images in the same order; ``[N]``.
        groups: Which images must be resampled together, ``[N]``; see `Outcome`.
        samples: Number of resamples. 2,000 place the ends of a 95 % interval within about 3 % of its width.
        confidence: Coverage aimed at.
        seed: Seed of the resampling; the same input and seed give the same interval.

    Raises:
        LightningSoupError: Unequal lengths, nothing to compare, a value that is not finite, or a setting out
            of range.
    """
    a, b = _vector(a, "a"), _vector(b, "b")
    if a.shape != b.shape:
        raise LightningSoupError(
            f"A paired comparison needs one outcome of each model per image: got {len(a)} and {len(b)}. "
            f"Were both models run on the same test set?"
        )
    if samples < 1:
        raise LightningSoupError(f"samples={samples}: expected at least 1 resample (2000 is usual).")
    _check_confidence(confidence)

    sums, sizes = sum_groups(a - b, groups)
    distinct, counts = torch.unique(torch.stack([sums, sizes], dim=1), dim=0, return_counts=True)
    values, probabilities = distinct.numpy(), counts.double().numpy() / len(sums)
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // len(values))
    means = []
    for start in range(0, samples, rows):
        drawn = generator.multinomial(len(sums), probabilities, size=min(rows, samples - start))
        total, images = (drawn @ values).T
        means.append(total / images)
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval((a - b).mean().item(), float(low), float(high), confidence)


def accuracy_interval(correct: Tensor, *, groups: Tensor | None = None, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for an accuracy: close to its promise for small sets and near 0 or 100 % too.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), Wilson 1927, with n the *effective* number of images:
    for plain right/wrong outcomes their number; where images form groups, as many independent images as would
    give the same variance of the mean (Korn and Graubard 1998), at most the real number.

    Args:
        correct: Right or wrong per image, or a share between 0 and 1 (a mean over models); ``[N]``.
        groups: Which images stem from one original, ``[N]``; see `Outcome`.
        confidence: Coverage aimed at.

    Raises:
        LightningSoupError: Nothing to count, or a value outside 0 to 1.
    """
    correct = _vector(correct, "correct")
    if correct.min() < 0 or correct.max() > 1:
        raise LightningSoupError("An accuracy needs outcomes between 0 (wrong) and 1 (right).")
    _check_confidence(confidence)
    p = correct.mean().item()
    sums, sizes = sum_groups(correct, groups)
    spread = (sums - p * sizes).square().sum().item() / len(correct) ** 2  # variance of the mean over groups
    n = min(len(correct), p * (1 - p) / spread) if spread > 0 else len(sums)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = p + z * z / (2 * n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    return Interval(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), confidence)


def sum_groups(values: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of the values of each group and the group's size; without groups every value is its own group.

    Raises:
        LightningSoupError: Not one group number per value.
    """
    values = values.double()
    if groups is None:
        return values, torch.ones_like(values)
    if groups.shape != values.shape:
        raise LightningSoupError(
            f"Groups must name one group per image: got {list(groups.shape)} for {list(values.shape)} images."
        )
    _, index = torch.unique(groups.cpu(), return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
    return sums.index_add(0, index, values), torch.bincount(index).double()


def _vector(values: Tensor, name: str) -> Tensor:
    values = torch.as_tensor(values).detach().cpu().double()
    if values.dim() != 1 or not len(values):
        raise LightningSoupError(
            f"{name}: expected one outcome per image, a vector that is not empty; got shape {list(values.shape)}."
        )
    if not values.isfinite().all():
        raise LightningSoupError(
            f"{name}: outcome of image {int((~values.isfinite()).nonzero()[0])} is not a finite number."
        )
    return values


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise LightningSoupError(f"confidence={confidence}: expected a number between 0 and 1, such as 0.95.")
