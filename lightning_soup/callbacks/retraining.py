"""Training anew from pruned weights: which epochs belong to what, and the learning rates of each retraining."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_soup.errors import UnsupportedSetup

RetrainingSchedule = Literal["llr", "allr", "clr", "slr", "lrw", "ft"]
SCHEDULES = ("llr", "allr", "clr", "slr", "lrw", "ft")
NEED_HISTORY = ("slr", "lrw", "ft")


@dataclass(frozen=True)
class Phase:
    """Some epochs of a fit.

    Attributes:
        cycle: c, from 1; 0 is the dense training before the first pruning.
        copy: j, from 0.
        first_epoch: Of the fit.
        epochs: How many.
        last: Whether it is the last copy of its cycle.
    """

    cycle: int
    copy: int
    first_epoch: int
    epochs: int
    last: bool

    def __str__(self) -> str:
        return f"copy {self.copy + 1} of cycle {self.cycle}" if self.cycle else "the dense training"


class Plan(tuple[Phase, ...]):
    """The phases of a fit, in order: dense training, then the copies of each cycle one after another."""

    @classmethod
    def of(cls, dense_epochs: int, cycles: int, retrain_epochs: Sequence[int]) -> "Plan":
        """Lay them out.

        Args:
            dense_epochs: Of the dense training; may be 0.
            cycles: n.
            retrain_epochs: Of each copy.
        """
        phases = [Phase(0, 0, 0, dense_epochs, True)] if dense_epochs else []
        begin, copies = dense_epochs, len(retrain_epochs)
        for cycle in range(1, cycles + 1):
            for copy, epochs in enumerate(retrain_epochs):
                phases.append(Phase(cycle, copy, begin, epochs, copy == copies - 1))
                begin += epochs
        return cls(phases)

    def side_by_side(self, copies: int) -> bool:
        """Whether the copies of a cycle are trained at once, by several processes."""
        cycles = {phase.cycle for phase in self if phase.cycle}
        return copies > 1 and len(cycles) == sum(phase.cycle > 0 for phase in self)

    @property
    def epochs(self) -> int:
        """Of the whole fit."""
        return self[-1].first_epoch + self[-1].epochs

    def index_at(self, epoch: int) -> int:
        """The place of the phase that an epoch belongs to."""
        return next(i for i, phase in enumerate(self) if epoch < phase.first_epoch + phase.epochs)


def adaptive_rate(highest: float, retrain_epochs: int, dense_epochs: int, drop: float, share: float) -> float:
    """The largest rate of ALLR: ``η·clip(d₂, d₁, 1)``, less where pruning or retraining is little.

    Args:
        highest: η, the largest rate of the dense training.
        retrain_epochs: T_rt.
        dense_epochs: T₀; ``d₁ = min(T_rt/T₀, 1)``.
        drop: ``‖W − W_pruned‖/‖W‖`` over the prunable weights.
        share: s, the share of the survivors that this cycle pruned; ``d₂ = drop/√s``.

    Source: Zimmer et al., How I Learned to Stop Worrying and Love Retraining (arXiv 2111.00843). The released code
    takes the norms over all parameters, biases and norms included.
    """
    least = retrain_epochs / dense_epochs
    return highest * min(max(drop / math.sqrt(share), least), 1.0)


def retraining_rate(
    schedule: RetrainingSchedule,
    step: int,
    steps: int,
    highest: float,
    lowest: float = 0.0,
    history: Sequence[float] = (),
    warmup: float = 0.1,
) -> float:
    """The learning rate η(t) of a retraining.

    ``llr`` and ``allr``: linear from ``highest`` to 0. ``clr``: half a cosine from ``highest`` to ``lowest``. ``slr``:
    the whole history, compressed. These three begin with a warm-up from 0 along half a cosine, over
    ``W = int(warmup·T)`` steps. ``lrw``: the last T rates of the history. ``ft``: its smallest rate above 0.

    Args:
        schedule: Which.
        step: t, from 0; after T the rate stays as it is there.
        steps: T.
        highest: η, of ``slr`` that of the warm-up only.
        lowest: Of ``clr``.
        history: The rates of the dense training, step by step.
        warmup: Share of the steps.

    Source: Zimmer et al., How I Learned to Stop Worrying and Love Retraining (arXiv 2111.00843).
    """
    if schedule == "ft":
        return min(rate for rate in history if rate > 0)
    if schedule == "lrw":
        return history[max(len(history) - steps + min(step, steps - 1), 0)]
    warm = int(warmup * steps)
    if step < warm:
        return highest * (1 - math.cos(math.pi * step / warm)) / 2
    progress = min((step - warm) / max(steps - warm, 1), 1.0)
    if schedule == "slr":
        return history[min(int(progress * len(history)), len(history) - 1)]
    if schedule == "clr":
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * progress)) / 2
    return highest * (1 - progress)


def check_retraining(schedule: str, dense_epochs: int, pretraining_epochs: int | None) -> None:
    """Refuse a schedule that lacks what it is made of.

    Raises:
        UnsupportedSetup: It is unknown, or needs a dense training.
    """
    if schedule not in SCHEDULES:
        raise UnsupportedSetup(f"schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}.")
    if schedule in NEED_HISTORY and not dense_epochs:
        raise UnsupportedSetup(
            f"schedule={schedule!r} repeats learning rates of the dense training, but dense_epochs=0. Train densely in "
            "this fit, or choose llr or clr."
        )
    if schedule == "allr" and not (dense_epochs or pretraining_epochs):
        raise UnsupportedSetup(
            "schedule='allr' compares the length of retraining with that of the dense training, but dense_epochs=0. "
            "Say how long that was with pretraining_epochs, or choose llr."
        )
