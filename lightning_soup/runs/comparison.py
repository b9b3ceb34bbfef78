"""Models against the best single ingredient: accuracy, gain, and the verdict in words."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_soup.evaluation.significance import (
    Interval,
    accuracy_interval,
    paired_bootstrap,
    sum_groups,
)

__all__ = ["Comparison", "Row", "compare", "signed"]

# With five images or fewer that differ, even a unanimous result has a two-sided sign test above 5 %
# (2 · 0.5⁵ = 0.0625), although the percentile bootstrap may already exclude zero.
FEW = 5


@dataclass(frozen=True)
class Comparison:
    """How one model did on one test set, alone and beside the best single ingredient.

    Args:
        images: Size of the test set.
        accuracy: In percent, with Wilson's interval.
        gain: Accuracy minus the best single ingredient's, in percentage points, with the paired bootstrap's
            interval; None for the best single ingredient itself.
        won: Images (or groups of images) on which this model does better than the best single ingredient.
        lost: Images (or groups of images) on which it does worse.
    """

    images: int
    accuracy: Interval
    gain: Interval | None = None
    won: int = 0
    lost: int = 0

    @property
    def distinguishable(self) -> bool:
        """Whether the gain is surely not zero: the interval excludes it and more than a few images differ."""
        return self.gain is not None and not self.gain.contains_zero and self.won + self.lost > FEW

    @property
    def verdict(self) -> str:
        """The comparison in words."""
        if self.gain is None:
            return ""
        if self.distinguishable:
            side = "better" if self.gain.mean > 0 else "worse"
            return f"{side} than the best single"
        level = f"not distinguishable from the best single at {self.gain.confidence * 100:g} %"
        differ = self.won + self.lost
        few = {0: ": no image differs", 1: ": only 1 image differs"}.get(differ, f": only {differ} images differ")
        return level if differ > FEW else level + few

    @property
    def digits(self) -> int:
        """Decimals worth printing: the interval of a small set is wider than a tenth of a point."""
        return 2 if self.images >= 10_000 else 1

    @property
    def accuracy_text(self) -> str:
        """For example ``95.7 [93.8, 97.0]``."""
        mean, low, high = (f"{x:.{self.digits}f}" for x in _numbers(self.accuracy))
        return f"{mean} [{low}, {high}]"

    @property
    def gain_texts(self) -> tuple[str, str, str]:
        """Gain, low and high with signs, and with the digits that tell on which side of zero they lie."""
        ends, digits = _numbers(self.gain), self.digits
        while digits < 4 and not self.gain.contains_zero and any(round(x, digits) == 0 for x in ends):
            digits += 1
        mean, low, high = (signed(x, digits) for x in ends)
        return mean, low, high

    @property
    def gain_text(self) -> str:
        """For example ``+0.8 [−0.2, +1.9]``; empty for the best single ingredient itself."""
        if self.gain is None:
            return ""
        mean, low, high = self.gain_texts
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Row:
    """One line of the report's table.

    Args:
        label: Name of the model.
        kind: ``"mean"`` (of the ingredients), ``"best"`` (single ingredient), ``"soup"``, ``"ensemble"`` or
            ``"init"``.
        forward_passes: Cost of one image.
        selection_score: Score on the selection split as the metric gives it, if known.
        tests: Test set to comparison; the first is the main one, the others are shifted.
        nll: Test set to mean negative log-likelihood.
    """

    label: str
    kind: str
    forward_passes: int
    selection_score: float | None
    tests: Mapping[str, Comparison]
    nll: Mapping[str, float]

    @property
    def shifted(self) -> float | None:
        """Mean accuracy over the shifted sets, equal weight per set, in percent; None without any."""
        shifted = [comparison.accuracy.mean for comparison in self.tests.values()][1:]
        return sum(shifted) / len(shifted) if shifted else None

    def plain(self) -> dict:
        """All numbers as plain values: accuracies in percent, gains in percentage points."""
        tests = {}
        for name, c in self.tests.items():
            tests[name] = {"accuracy": c.accuracy.mean, "low": c.accuracy.low, "high": c.accuracy.high}
            tests[name]["nll"] = self.nll[name]
            if c.gain is not None:
                tests[name] |= {"gain": c.gain.mean, "gain_low": c.gain.low, "gain_high": c.gain.high}
                tests[name] |= {"won": c.won, "lost": c.lost}
                tests[name] |= {"distinguishable": c.distinguishable, "verdict": c.verdict}
        return {
            "label": self.label,
            "kind": self.kind,
            "forward_passes": self.forward_passes,
            "selection_score": self.selection_score,
            "mean_shifted_accuracy": self.shifted,
            "tests": tests,
        }


def compare(outcome: Tensor, best: Tensor | None, groups: Tensor | None = None, *, samples: int = 2000) -> Comparison:
    """Compare outcomes per image with those of the best single ingredient.

    Args:
        outcome: Right, wrong, or a share between (the mean of several models), ``[N]``.
        best: The best single ingredient's outcomes on the same images, ``[N]``; None for itself.
        groups: Which images stem from one original, ``[N]``.
        samples: Resamples of the bootstrap.
    """
    accuracy = accuracy_interval(outcome, groups=groups).scaled(100)
    if best is None:
        return Comparison(len(outcome), accuracy)
    gain = paired_bootstrap(outcome, best, groups=groups, samples=samples).scaled(100)
    sums, _ = sum_groups(outcome.double() - best.double(), groups)
    return Comparison(len(outcome), accuracy, gain, won=int((sums > 0).sum()), lost=int((sums < 0).sum()))


def signed(number: float, digits: int = 1) -> str:
    """A number with its sign, and a real minus; nothing that prints as zero gets a sign."""
    text = f"{number:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _numbers(interval: Interval) -> tuple[float, float, float]:
    return interval.mean, interval.low, interval.high
