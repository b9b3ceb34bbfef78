"""The learning rates of retrainings: what they follow from, how far they are, and what a checkpoint holds of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from lightning_soup.callbacks.fresh_optimizers import first_rates, set_rate
from lightning_soup.callbacks.retraining import Phase, RetrainingSchedule, adaptive_rate, retraining_rate


@dataclass
class RetrainingRates:
    """Sets the rate of an optimizer at the beginning of each retraining and after each of its steps.

    Attributes:
        schedule: See :func:`.retraining_rate`.
        lr_max: The largest rate, or None: that of the dense training, or of the optimizer.
        lr_min: Where ``clr`` ends.
        trained_epochs: Of the dense training, or of the weights that were given, for ``allr``.
        varied: The largest rate of each copy, where they differ.
        step: In this retraining.
        highest: The largest rate of this cycle.
        drop: Of the norm of the weights, by the pruning of this cycle.
        share: Of the survivors that it pruned.
        ratios: Of the rates of the optimizer's groups to their largest.
        history: The rates of the dense training.
    """

    schedule: RetrainingSchedule
    lr_max: float | None
    lr_min: float
    trained_epochs: int | None
    varied: list[float] | None = None
    step: int = 0
    highest: float = 0.0
    drop: float = 0.0
    share: float = 0.0
    ratios: list[float] = field(default_factory=list)
    history: list[float] = field(default_factory=list)

    def pruned(self, optimizer: Optimizer, drop: float, share: float) -> None:
        """A cycle begins: so much of the norm and of the survivors was pruned."""
        self.drop, self.share = drop, share
        self.highest = self.lr_max or max(self.history or first_rates(optimizer))

    def begin(self, optimizer: Optimizer, phase: Phase, steps_per_epoch: int) -> None:
        """A copy begins, with a new optimizer."""
        rates = first_rates(optimizer)
        self.ratios = [rate / max(rates) for rate in rates]
        self._set(optimizer, phase, steps_per_epoch)

    def stepped(self, optimizer: Optimizer, phase: Phase, steps_per_epoch: int) -> None:
        """After a step: in a retraining set the next rate, in the dense training note the present one."""
        if phase.cycle:
            self.step += 1
            self._set(optimizer, phase, steps_per_epoch)
        else:
            self.history.append(max(float(group["lr"]) for group in optimizer.param_groups))

    def _set(self, optimizer: Optimizer, phase: Phase, steps_per_epoch: int) -> None:
        highest = self.highest if self.varied is None else self.varied[phase.copy]
        if self.schedule == "allr" and self.share:
            highest = adaptive_rate(highest, phase.epochs, self.trained_epochs, self.drop, self.share)
        steps = phase.epochs * steps_per_epoch
        rate = retraining_rate(self.schedule, self.step, steps, highest, self.lr_min, self.history)
        set_rate(optimizer, rate, self.ratios)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {key: getattr(self, name) for key, name in RATES_STATE.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        for key, name in RATES_STATE.items():
            setattr(self, name, state[key])


RATES_STATE = {  # what a checkpoint calls it, and the attribute
    "step": "step",
    "highest_rate": "highest",
    "norm_drop": "drop",
    "pruned_share": "share",
    "group_ratios": "ratios",
    "dense_rates": "history",
}
