"""The average of one module during one fit: its groups of tensors, its samples, and its way into the module."""

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_soup.callbacks.averaged_tensors import Group, is_captured, reshard
from lightning_soup.callbacks.recalibration import Statistics
from lightning_soup.callbacks.selected_tensors import by_optimizer, select, trainable, without_infinite
from lightning_soup.callbacks.steps import OptimizerSteps
from lightning_soup.callbacks.strategies import have_one_model
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.masks import Masks

if TYPE_CHECKING:
    from lightning_soup.callbacks.live_average import LiveAverage


class AverageOfModule:
    """What a :class:`.LiveAverage` keeps while one module is trained, and afterwards for tests and files.

    Args:
        rule: The callback: its options, and the share of each sample.
        trainer: The Trainer, whose optimizers exist.
        module: The module, on its device and in its type.

    Attributes:
        groups: The averaged tensors of each optimizer.
        placed: Whether the module holds the average.
        left: Whether it was left there for good.
        finished: Whether the fit has ended, so that nothing but the user changes the module.
        restored: Whether it came from a checkpoint.
    """

    def __init__(self, rule: "LiveAverage", trainer: Trainer, module: LightningModule) -> None:
        self.rule, self.trainer, self.module = rule, weakref.ref(trainer), weakref.ref(module)
        self.placed = self.left = self.restored = False
        self._reported: set[tuple[str, str]] = set()
        self._infinite: set[str] = set()
        self._statistics = Statistics()
        self._exchange = not is_captured(module, trainer.strategy.root_device)
        owner = type(rule).__name__
        slots = select(module, rule.include, rule.exclude, rule.buffers == "average", owner)
        slots, infinite = without_infinite(slots, owner)
        self._leave_live(infinite)
        parts = by_optimizer(slots, trainer.optimizers)
        self.groups = [Group(index, part, rule.new_shadow()) for index, part in parts.items()]
        self._counted = _count(trainer)
        self._versions: list[tuple[int, int]] = []
        self.finished = False
        size = sum(slot.local.numel() * 4 for slot in slots) / 2**20
        rank_zero_info(f"{owner} {rule.name!r}: averages {len(slots)} tensors ({size:,.0f} MiB in float32).")
        self._steps = OptimizerSteps.of(trainer)
        self._steps.listen(self, self._after_step, phase="observe")

    def close(self) -> None:
        """Follow the optimizers no more."""
        self._steps.stop(self)

    # -------------------------------------------------------------------------------------------------------- samples

    @property
    def samples(self) -> int:
        """Samples taken, the start not counted; with several optimizers, of the one that has most."""
        return max(max((group.absorbed for group in self.groups), default=0) - self.rule.needs_start, 0)

    @property
    def ready(self) -> list[Group]:
        """The groups that have an average: others stay live."""
        return [group for group in self.groups if group.absorbed > self.rule.needs_start]

    def absorb_start(self) -> None:
        """Take the weights before the first step as the first term of the mean, unless a file gave it."""
        reshard(self.module())
        for group in self.groups:
            if not group.absorbed:
                group.absorb(1.0)

    def prune(self, masks: Masks, tensors: Mapping[str, Tensor]) -> None:
        """Make what is pruned zero in the average, as it is in the weights."""
        for group in self.groups:
            group.prune(masks, tensors)

    def count_from(self, trainer: Trainer) -> None:
        """Training that goes on without a file's average counts on, as its epochs do."""
        if len(self.groups) == len(trainer.optimizers) == 1 and not self.groups[0].steps:
            self.groups[0].steps = trainer.global_step

    def _after_step(self, optimizer: int) -> None:
        trainer, schedule = self.trainer(), self.rule.schedule
        if self.placed:
            raise UnsupportedSetup(
                f"{self.rule.name}: an optimizer took a step in validation, while the module held the average, which "
                "moved instead of the live weights. Step in a training hook, or in on_validation_end of the module."
            )
        if self._counted != _count(trainer):
            self.refresh(trainer)
        for group in self.groups:
            if group.optimizer != optimizer:
                continue
            group.steps += 1
            if not schedule.open(trainer, group.steps):
                continue
            group.since += 1
            group.fresh = True
            if schedule.by_steps and schedule.due_at_step(group.since):
                self._absorb(group)

    def _absorb(self, group: Group) -> None:
        group.follow(self.module())
        group.absorb(float(self.rule.share(group.absorbed)))  # numpy's numbers are no plain ones in files

    def after_batch(self, trainer: Trainer) -> None:
        """Samples that are due at the end of an epoch or of a share of the training."""
        schedule = self.rule.schedule
        if schedule.by_steps:
            return
        for group in self.groups:
            ticks = schedule.ticks(trainer, group.steps)
            if not group.since:  # what passes before start does not count
                group.ticks = ticks
            due = ticks > group.ticks or (schedule.first and group.absorbed == self.rule.needs_start)
            if due and group.fresh and schedule.open(trainer, group.steps):
                self._absorb(group)
                group.ticks = ticks

    def before_batch(self, trainer: Trainer) -> None:
        """Average parameters that were unfrozen since, before they move."""
        if self._counted != _count(trainer):
            self.refresh(trainer)

    def refresh(self, trainer: Trainer) -> None:
        """Follow optimizers that were made anew, and average parameters that were unfrozen."""
        self._steps.attach(trainer)
        self._counted = _count(trainer)
        module, rule = self.module(), self.rule
        reshard(module)
        known = {slot.name for group in self.groups for slot in group.slots} | self._infinite
        found = [slot for slot in trainable(module, rule.include, rule.exclude) if slot.name not in known]
        if not found:
            return
        new, infinite = without_infinite(found, type(rule).__name__)
        self._leave_live(infinite)
        for optimizer, slots in by_optimizer(new, trainer.optimizers).items():
            self._group_of(optimizer).grow(slots)
        self.report("trainable since now, and averaged from here on", [slot.name for slot in new])

    def adopt(self, saved: Mapping[str, int]) -> None:
        """Average frozen parameters that a checkpoint has samples of: they were trained before, and may be again.

        Args:
            saved: By name, the optimizer that moved a tensor.
        """
        rule = self.rule
        known = {slot.name for group in self.groups for slot in group.slots}
        for slot in trainable(self.module(), rule.include, rule.exclude, frozen=True):
            if slot.name in saved and slot.name not in known:
                self._group_of(saved[slot.name]).slots.append(slot)

    def _group_of(self, optimizer: int) -> Group:
        group = next((group for group in self.groups if group.optimizer == optimizer), None)
        if group is None:
            self.groups.append(group := Group(optimizer, [], self.rule.new_shadow()))
        return group

    # ---------------------------------------------------------------------------------------------- into the module

    def is_of(self, module: LightningModule) -> bool:
        """Whether the average was made from this module."""
        return self.module() is module

    def place(
        self,
        trainer: Trainer,
        statistics: bool = False,
        briefly: bool = False,
        check: bool = True,
        again: bool = False,
    ) -> None:
        """Put the average into the module, until :meth:`put_back`; nothing where it stands there already.

        Args:
            trainer: The Trainer.
            statistics: Estimate BatchNorm statistics anew, with ``buffers="recalibrate"``.
            briefly: Nothing is computed before it is put back.
            check: Look for NaN first.
            again: Right after it was put back, as it stood there before.
        """
        if self.placed:
            return
        reshard(self.module())
        placed: list[Group] = []
        try:
            for group in self.ready:
                group.follow(self.module())
                group.place(self._exchange, briefly, check, again)
                placed.append(group)
            if self.rule.buffers == "recalibrate":
                batches = self.rule.recalibrate_batches if statistics else 0
                self._statistics.place(trainer, self.module(), batches)
        except BaseException:  # another tensor's NaN must not leave half an average in the module
            for group in reversed(placed):
                group.put_back()
            self._statistics.put_back()
            raise
        self.placed = True

    def put_back(self) -> None:
        """Give the module its live weights back."""
        if self.placed:
            reshard(self.module())
            for group in reversed(self.groups):
                group.put_back()
            self._statistics.put_back()
            self.placed = self.left = False
            self._remember()

    def leave(self) -> None:
        """The module keeps what it holds now. From here on a change to it is noticed, and a step is no sample."""
        self.close()
        self.left, self.finished = self.placed, True
        self._remember()

    @property
    def changed(self) -> bool:
        """Whether somebody wrote into the module after the fit."""
        return self._versions != self._version()

    @property
    def outdated(self) -> bool:
        """Whether the module was given other weights after the fit, so that the average is not about it any more."""
        return self.finished and (self.left or not self.placed) and self.changed

    def _remember(self) -> None:
        self._versions = self._version()

    def _version(self) -> list[tuple[int, int]]:
        found = [slot.found_in(self.module()) for group in self.groups for slot in group.slots]
        return [(id(tensor), -1 if tensor is None else tensor._version) for tensor in found]

    def statistics_memory(self) -> set[int]:
        """Where BatchNorm statistics lie, live and of the average in turn, if the average has its own."""
        return self._statistics.memory(self.module()) if self.rule.buffers == "recalibrate" else set()

    def restore_statistics(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continue with the BatchNorm statistics that a file holds for the average."""
        if self.rule.buffers == "recalibrate":
            self._statistics.restore(self.module(), state_dict)

    def share_buffers(self, trainer: Trainer) -> None:
        """Average the averaged buffers over ranks, which see different data. Every rank must take part."""
        if self.rule.buffers != "average" or not have_one_model(trainer):
            return
        for group in self.ready:
            for slot, _, average in group.pairs():
                if slot.is_buffer:
                    average.copy_(trainer.strategy.reduce(average.clone(), reduce_op="mean"))

    # ----------------------------------------------------------------------------------------------------- diagnostics

    def effective_window(self) -> float:
        """(Σw)² / Σw² of the samples' weights in the mean: how many equal samples it is worth."""
        group = max(self.ready, key=lambda group: group.absorbed)
        return group.shadow.window or 1 / group.concentration

    @torch.no_grad()
    def relative_distance(self) -> float:
        """‖live − average‖ / ‖live‖ over all averaged parameters; of shards, those of this rank."""
        apart = whole = 0.0
        for group in self.ready:
            for slot, live, average in group.pairs():
                if not slot.is_buffer:
                    live = live.to(average)
                    apart += float(torch.linalg.vector_norm(live - average)) ** 2
                    whole += float(torch.linalg.vector_norm(live)) ** 2
        return math.sqrt(apart / whole) if whole else 0.0

    def report_live(self) -> None:
        """Name the tensors of optimizers that have had no sample, while others have an average."""
        live = [slot.name for group in self.groups if group not in self.ready for slot in group.slots]
        self.report("never sampled, because their optimizer took too few steps, and so live", live)

    def why_none(self) -> str:
        """Which condition never held, where no sample was taken."""
        steps = max((group.steps for group in self.groups), default=0)
        since = max((group.since for group in self.groups), default=0)
        schedule = self.rule.schedule
        if not steps:
            return "no optimizer step was taken, so nothing was averaged."
        if not since:
            return f"training ended after {steps} steps, before start={schedule.start}, so nothing was averaged."
        return f"{since} steps after start were fewer than every={schedule.every}, so nothing was averaged."

    def _leave_live(self, names: Sequence[str]) -> None:
        self._infinite.update(names)
        self.report("left live, because they hold infinities", names)

    def report(self, what: str, names: Sequence[str]) -> None:
        """Say once what is different for some tensors."""
        new = [name for name in names if (what, name) not in self._reported]
        self._reported.update((what, name) for name in new)
        if new:
            shown = ", ".join(new[:5]) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
            rank_zero_warn(f"{type(self.rule).__name__} {self.rule.name!r}: {what}: {shown}.")


def _count(trainer: Trainer) -> int:
    """Tensors that optimizers move: another number means that some were unfrozen."""
    return sum(p.requires_grad for opt in trainer.optimizers for group in opt.param_groups for p in group["params"])
