"""The rules of averages over training steps: exponential, equal, latest k, and ZSCL's weight ensemble."""

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_soup.callbacks.live_average import LiveAverage
from lightning_soup.callbacks.schedule import When
from lightning_soup.callbacks.shadow import LatestMean, Shadow
from lightning_soup.errors import UnsupportedSetup


class ExponentialAverage(LiveAverage):
    """EMA: ``ω ← d·ω + (1 − d)·θ`` at each sample.

    The first sample is copied. With warm-up, ``d = min(decay, n / (n + 10))`` at the n-th sample from 0, so that the
    average is worth something before ``1 / (1 − decay)`` samples have passed; without it the first sample keeps the
    weight ``decayⁿ``.

    Args:
        decay: d, in [0, 1), per sample (not per step, where ``every`` is more than one).
        warmup: Start with a short memory.
        name: As in :class:`.LiveAverage`.
        **options: The options of :class:`.LiveAverage`.

    Raises:
        UnsupportedSetup: The decay lies outside [0, 1), or an option has no meaning.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True, name: str = "ema", **options: Any) -> None:
        if not 0 <= decay < 1:
            raise UnsupportedSetup(f"ExponentialAverage(decay={decay}): expected 0 ≤ decay < 1, such as 0.999.")
        self.decay, self.warmup = decay, warmup
        super().__init__(name=name, **options)

    def share(self, n: int) -> float:
        """``1 − d``; 1 for the first sample."""
        if n == 0:
            return 1.0
        return 1 - (min(self.decay, n / (n + 10)) if self.warmup else self.decay)

    def check_length(self, updates: float) -> None:
        """Warn where the average would be older than the training is long."""
        if 1 / (1 - self.decay) > max(updates, 1):
            fitting = 1 - 10 / max(updates, 20)
            rank_zero_warn(
                f"ExponentialAverage(decay={self.decay}) looks back over {1 / (1 - self.decay):,.0f} samples, but only "
                f"{updates:,.0f} are planned, so {'warm-up decides' if self.warmup else 'the first weights stay in'}. "
                f"A decay near {fitting:.3g} would suit this training."
            )


class EqualAverage(LiveAverage):
    """The plain mean of all samples: stochastic weight averaging (Izmailov et al. 2018) without its schedule.

    Averaging, learning rate and recalibration are three independent switches: set the scheduler in the module, and
    ``buffers="recalibrate"`` for BatchNorm.

    Args:
        start: When averaging begins; 0.75 of the training by default, as in the paper.
        every: A sample is taken once in this much training; at the end of each epoch by default, as in the paper.
        name: As in :class:`.LiveAverage`.
        **options: The options of :class:`.LiveAverage`.
    """

    def __init__(self, start: When = 0.75, every: When = "1 epochs", name: str = "swa", **options: Any) -> None:
        super().__init__(start=start, every=every, name=name, **options)

    def share(self, n: int) -> float:
        """``1 / (n + 1)``."""
        return 1 / (n + 1)


class LatestAverage(LiveAverage):
    """The plain mean of the latest k samples: LAWA (Kaddour 2022; Sanyal et al. 2023).

    Keeps k copies of the averaged tensors; ``device="cpu"`` keeps them off a GPU.

    Args:
        k: Samples in the mean, at least 2.
        every: A sample is taken once in this much training; at the end of each epoch by default, as in the paper.
        name: As in :class:`.LiveAverage`.
        **options: The options of :class:`.LiveAverage`.
    """

    def __init__(self, k: int = 6, every: When = "1 epochs", name: str = "lawa", **options: Any) -> None:
        if k < 2:
            raise UnsupportedSetup(f"LatestAverage(k={k}): expected 2 or more samples; one is the live weights.")
        self.k = k
        super().__init__(every=every, name=name, **options)

    def share(self, n: int) -> float:
        """``1 / min(n + 1, k)``."""
        return 1 / min(n + 1, self.k)

    def new_shadow(self) -> Shadow:
        """A ring of k samples."""
        return LatestMean(self.k, self.device)


class WeightEnsemble(LiveAverage):
    """ZSCL's weight ensemble (Zheng et al. 2023, arXiv 2303.06628, section 3.3): the mean of the path and its start.

    ω begins as the weights before the first step and ``ω ← (n·ω + θ) / (n + 1)`` at each sample, so the start counts
    once. The first step is sampled and then every ``every``-th, as in the released code (after steps k = 0, I, 2I, …).
    It is neither SWA, which leaves the start out, nor EMA, which forgets it.

    Args:
        every: I, in optimizer steps by default: 100 in the paper for multi-domain tasks, 10 for class-incremental ones.
        name: As in :class:`.LiveAverage`.
        **options: The options of :class:`.LiveAverage`.
    """

    first_step_counts = True
    needs_start = True

    def __init__(self, every: When = 100, name: str = "weight_ensemble", **options: Any) -> None:
        super().__init__(every=every, name=name, **options)

    def share(self, n: int) -> float:
        """``1 / (n + 1)``, where the start was the sample 0."""
        return 1 / (n + 1)
