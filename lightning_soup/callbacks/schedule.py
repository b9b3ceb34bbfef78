"""When something happens during training: from, to and how often, in steps, epochs or fractions."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_soup.errors import UnsupportedSetup

Unit = Literal["steps", "epochs", "fraction"]
When = int | float | str
_EPSILON = 1e-9  # of an epoch or of the training: less than any step


@dataclass(frozen=True)
class Time:
    """A point in the training, or a length of it: optimizer steps, epochs, or a fraction of the whole."""

    value: float
    unit: Unit

    def __str__(self) -> str:
        return f"{self.value:g} of the training" if self.unit == "fraction" else f"{self.value:g} {self.unit}"


def parse_time(when: When, option: str) -> Time:
    """Read ``100`` (optimizer steps), ``0.75`` (of the training), ``"2 epochs"``, ``"100 steps"`` or ``"75%"``.

    Args:
        when: What the user gave.
        option: Name for the message, such as ``ExponentialAverage(start)``.

    Raises:
        UnsupportedSetup: It is none of these, negative, or a fraction above 1.
    """
    expected = (
        f"{option}={when!r}: expected a whole number of optimizer steps (100), a fraction of the training between "
        "0 and 1 (0.75), or text such as '2 epochs', '100 steps', '75%'."
    )
    if isinstance(when, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[a-z]*)\s*", when.lower())
        number, word = (float(match[1]), match[2]) if match else (math.nan, "")
        if match and word in ("epoch", "epochs", "ep"):
            return Time(number, "epochs")
        if match and word in ("step", "steps", "") and number == int(number):
            return Time(number, "steps")
        if match and word == "%" and number <= 100:
            return Time(number / 100, "fraction")
        raise UnsupportedSetup(expected)
    if isinstance(when, bool) or not isinstance(when, (int, float)) or not 0 <= when < math.inf:
        raise UnsupportedSetup(expected)
    if isinstance(when, int):
        return Time(float(when), "steps")
    if when > 1:
        raise UnsupportedSetup(f"{expected} Write {when:g} as '{when:g} epochs' or, for steps, as a whole number.")
    return Time(when, "fraction")


class Schedule:
    """From ``start`` (not included) to ``stop`` (included), one moment in each ``every``.

    Args:
        start: Nothing is due before this much has been trained.
        stop: Nothing is due after it; None: to the end.
        every: Steps count from ``start``. Epochs and fractions count from the beginning of training, and are due at the
            end of the batch that completes them: ``"1 epochs"`` is the end of each epoch, before its validation.
        first: The first step is due and then every ``every``-th, instead of each ``every``-th.
        owner: Name for messages.

    Raises:
        UnsupportedSetup: A value cannot be read, ``every`` is 0, or ``stop`` does not come after ``start``.
    """

    def __init__(self, start: When, stop: When | None, every: When, first: bool = False, owner: str = "") -> None:
        self.start = parse_time(start, f"{owner}(start)")
        self.stop = None if stop is None else parse_time(stop, f"{owner}(stop)")
        self.every = parse_time(every, f"{owner}(every)")
        self.first, self.owner = first, owner
        if self.every.value == 0:
            raise UnsupportedSetup(f"{owner}(every={every!r}): expected more than 0. 1 is every optimizer step.")
        if self.stop and self.stop.unit == self.start.unit and self.stop.value <= self.start.value:
            raise UnsupportedSetup(f"{owner}(start={start!r}, stop={stop!r}): stop must come after start.")

    @property
    def by_steps(self) -> bool:
        """Whether moments are counted in optimizer steps, and so fall on them; else they fall on ends of batches."""
        return self.every.unit == "steps"

    def open(self, trainer: Trainer, step: int) -> bool:
        """Whether the time after optimizer step number ``step`` (from 1) lies between start and stop."""
        if _passed(trainer, self.start.unit, step) <= self.start.value + _EPSILON and self.start.value:
            return False
        return self.stop is None or _passed(trainer, self.stop.unit, step) <= self.stop.value + _EPSILON

    def begun(self, trainer: Trainer, step: int) -> bool:
        """Whether ``start`` has been reached with optimizer step number ``step``."""
        return _passed(trainer, self.start.unit, step) >= self.start.value - _EPSILON

    def progress(self, trainer: Trainer, step: int) -> float:
        """How far it is from start to stop: 0 … 1."""
        unit, begin = self.stop.unit, self.start.value
        if begin and self.start.unit != unit:
            begin *= planned_time(trainer, unit) / planned_time(trainer, self.start.unit)
        done = (_passed(trainer, unit, step) - begin) / (self.stop.value - begin)
        return 1.0 if done >= 1 - _EPSILON else max(done, 0.0)

    def due_at_step(self, since_start: int) -> bool:
        """Whether the ``since_start``-th step (from 1) after start is one that counts."""
        return (since_start - 1 if self.first else since_start) % int(self.every.value) == 0

    def ticks(self, trainer: Trainer, step: int) -> int:
        """How many times ``every`` has passed since training began; for epochs and fractions."""
        return math.floor(_passed(trainer, self.every.unit, step) / self.every.value + _EPSILON)

    def check(self, trainer: Trainer, consequence: str = "nothing would ever be averaged") -> None:
        """Refuse what can never be due.

        Args:
            trainer: The Trainer, in ``on_train_start`` or later.
            consequence: What comes of a start after the end, for the message.

        Raises:
            UnsupportedSetup: ``start`` lies at or after the end of training, or a fraction of an endless one is asked.
        """
        for time in (self.start, self.stop, self.every):
            if time and time.unit == "fraction" and time.value and _fraction(trainer, 1) is None:
                raise UnsupportedSetup(
                    f"{self.owner}: {time} needs an end of training, but it is endless. Set max_steps or max_epochs, "
                    "or count in steps or epochs."
                )
        planned = planned_time(trainer, self.start.unit)
        if planned is not None and self.start.value >= planned:
            raise UnsupportedSetup(
                f"{self.owner}(start={self.start}): training ends before that, after "
                f"{Time(planned, self.start.unit)}, so {consequence}. Start earlier or train longer."
            )
        until = self.stop and planned_time(trainer, self.stop.unit)
        if planned and until and self.stop.value / until <= self.start.value / planned + _EPSILON:
            raise UnsupportedSetup(f"{self.owner}(start={self.start}, stop={self.stop}): stop must come after start.")

    def check_period(self, trainer: Trainer) -> None:
        """Refuse a period that does not fit into what is left of the training after ``start``.

        Raises:
            UnsupportedSetup: ``every`` surely never passes.
        """
        unit, every = self.every.unit, self.every.value
        planned, whole = planned_time(trainer, unit), planned_time(trainer, self.start.unit)
        if self.first or planned is None:
            return
        end = min(planned, self.stop.value) if self.stop and self.stop.unit == unit else planned
        exact = self.start.unit == unit or not self.start.value
        begin = self.start.value if exact else self.start.value / whole * planned if whole else 0.0
        if self.by_steps:  # counted from start; in other units it may fall between two steps
            passes = math.ceil(end - begin - _EPSILON) + (not exact) >= every
        else:
            before = begin / every if exact else 0.0
            passes = math.floor(end / every + _EPSILON) > math.floor(before + _EPSILON)
        if not passes:
            raise UnsupportedSetup(
                f"{self.owner}(start={self.start}, every={self.every}): training ends before that has passed once, "
                f"after {Time(planned, unit)}, so nothing would ever be averaged. Take samples more often, or train "
                "longer."
            )


def planned_time(trainer: Trainer, unit: Unit = "steps") -> float | None:
    """How long training will be at most in this unit; None where that is not known.

    Steps are known in automatic optimization only: by hand, any number of them may be taken in a batch.
    """
    if trainer.fast_dev_run:
        return None
    if unit == "fraction":
        return 1.0
    if not trainer.lightning_module.automatic_optimization:
        planned = math.inf if unit == "steps" else _limit(trainer.max_epochs)
    else:
        planned = _length(trainer)[unit == "epochs"]
    return planned if planned < math.inf else None


def _length(trainer: Trainer) -> tuple[float, float]:
    """Steps and epochs of the training in automatic optimization, as Lightning's limits end it."""
    most_steps, most_epochs, batches = (
        _limit(trainer.max_steps),
        _limit(trainer.max_epochs),
        trainer.num_training_batches,
    )
    if batches == math.inf:
        return most_steps, most_epochs
    # Lightning's own estimate takes the present window of accumulation for all epochs.
    changing = [c.scheduling for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
    windows = changing[0] if changing else {0: trainer.accumulate_grad_batches}
    steps = epochs = 0.0
    for begin, end in pairwise([*sorted(windows), math.inf]):
        per_epoch = max(math.ceil(batches / windows[begin]), 1)
        span = max(min(end, most_epochs) - begin, 0)
        if steps + span * per_epoch >= most_steps:
            return most_steps, epochs + (most_steps - steps) / per_epoch
        steps, epochs = steps + span * per_epoch, epochs + span
    return steps, epochs


def _limit(most: int | None) -> float:
    return math.inf if most in (None, -1) else float(most)


def _passed(trainer: Trainer, unit: Unit, step: int) -> float:
    """How much has been trained after this step and batch."""
    if unit == "steps":
        return step
    if unit == "epochs":
        return _epochs(trainer)
    return _fraction(trainer, step) or 0.0


def _epochs(trainer: Trainer) -> float:
    """Epochs trained, the current batch included; whole ones only where their length is unknown."""
    batches: Any = trainer.num_training_batches
    if not batches or batches == math.inf:
        return trainer.current_epoch + float(trainer.is_last_batch)
    progress = trainer.fit_loop.epoch_progress.current
    begun = progress.started >= progress.ready  # else the index of the batch is still that of the epoch before
    done = trainer.fit_loop.epoch_loop.batch_idx + 1 if begun else 0
    return trainer.current_epoch + min(done / batches, 1.0)


def _fraction(trainer: Trainer, step: int) -> float | None:
    """The share of the training that is over; None where it has no end."""
    shares = []
    if _limit(trainer.max_epochs) < math.inf:
        shares.append(_epochs(trainer) / trainer.max_epochs)
    if _limit(trainer.max_steps) < math.inf:
        shares.append(max(step, _steps_of_all(trainer)) / trainer.max_steps)
    return max(shares) if shares else None


def _steps_of_all(trainer: Trainer) -> int:
    """What ``max_steps`` limits: the steps of all optimizers, with the one under way, which is counted after it."""
    loop: Any = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        progress = loop.automatic_optimization.optim_progress.optimizer.step.current
    else:
        progress = loop.manual_optimization.optim_step_progress.current
    return trainer.global_step + progress.ready - progress.completed
