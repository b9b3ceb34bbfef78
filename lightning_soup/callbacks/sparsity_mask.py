"""SparsityMask: prune once or gradually while training, with masks that hold."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_soup.callbacks.live_average import LiveAverage
from lightning_soup.callbacks.model_soup import ModelSoup
from lightning_soup.callbacks.pruning_callback import PruningCallback, is_lightnings_average
from lightning_soup.callbacks.schedule import Schedule, When, planned_time
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.pruning import check_selection, cubic_sparsity, cycle_amounts


class SparsityMask(PruningCallback):
    """Prune a network, once or gradually, and keep what is pruned at exactly zero while it trains on.

    Add it to any training. With ``start`` alone the network is pruned once, at the beginning or later. With ``stop`` it
    is pruned gradually from start to stop, by ``S·(1 − (1 − t)³)`` (Zhu and Gupta, arXiv 1710.01878): a little each
    ``every``, and for the last time at ``stop``.

    After every optimizer step what is pruned is exactly zero: the weights, and what the optimizer remembers of them
    (momentum, moments). Gradients are masked before they are clipped, except where manual optimization clips them
    before the step. Masks are no part of the module: names, order and sharing of its parameters stay, and so do its
    files. They are in the callback's own state in checkpoints, one bit a weight, so that a resumed training goes on
    with them. Averages of the weights (:class:`.LiveAverage`) are pruned together with the weights.

    Works on one device and under DDP, in mixed precision, with gradient accumulation and with several optimizers;
    strategies that shard parameters are refused.

    Args:
        sparsity: S, the share of the prunable weights to prune in all: those of two dimensions or more. ``None``:
            nothing beyond ``masks_from``.
        selection: What goes first. ``global``: the smallest magnitudes of all layers together. ``uniform``: the same
            share of each layer. ``lamp``, ``erk``: other shares by layer. ``random``. ``rows``: whole rows or filters.
            ``N:M``, such as ``2:4``: all but N in each M neighbours, once. See :func:`.prune_`.
        start: When to prune, or to begin to: optimizer steps, a fraction, or text (``"2 epochs"``).
        stop: When the last gradual step is taken; None: prune once.
        every: How often, if gradually.
        exclude: Patterns of parameters that are not pruned; None: embeddings, tokens and temperatures.
        skip_first: Leave out the input layer: the first by order of registration; refused where that does not tell.
        skip_head: Leave out the last layer, likewise.
        seed: Of the selection ``random``.
        masks_from: A file of masks to begin with, such as the ``masks.pt`` that :class:`.SparseModelSoup` leaves: a
            pruned network is fine-tuned, and keeps its zeros.

    Attributes:
        masks: The :class:`.Masks`, once the fit has begun.
        sparsity_reached: The share that is pruned.

    Raises:
        UnsupportedSetup: Before training: an option has no meaning, nothing is prunable, training ends before ``stop``,
            the checkpoint holds masks of another model or is of a fit with other options, or a callback or strategy
            cannot go with masks.
        NonFiniteWeights: In training, when pruning: a weight is NaN.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        selection: str = "global",
        start: When = 0,
        stop: When | None = None,
        every: When = "1 epochs",
        exclude: Sequence[str] | None = None,
        skip_first: bool = False,
        skip_head: bool = False,
        seed: int = 0,
        masks_from: str | None = None,
    ) -> None:
        if sparsity is not None:
            cycle_amounts(sparsity, 1)
        elif masks_from is None or stop is not None:
            raise UnsupportedSetup(
                "SparsityMask: give sparsity, the share to prune; without it only masks_from is kept."
            )
        super().__init__(sparsity, selection, exclude, skip_first, skip_head, seed)
        if check_selection(selection) and stop is not None:
            raise UnsupportedSetup(f"selection={selection!r} prunes at once. Leave stop={stop!r} out.")
        self.masks_from = masks_from
        self._schedule = Schedule(start, stop, every, owner=type(self).__name__)
        self._steps_done = 0
        self._ticks = 0
        self._done = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, if it is to be done at the beginning."""
        if self._resumed is None:
            self._steps_done, self._ticks, self._done = 0, 0, False
        resumed = self._resumed is not None
        super().on_fit_start(trainer, pl_module)
        if self.masks_from is not None and not resumed and self._pruned.masks.pruned == 0:
            self._pruned.read(self.masks_from)
        self._done = self._done or self.sparsity is None
        if not self._done and self._schedule.stop is None and not self._schedule.start.value:
            self._done = True
            self._prune(trainer, self.sparsity)

    def _options(self) -> dict[str, Any]:
        schedule = self._schedule
        gradual = {"every": str(schedule.every)} if schedule.stop else {}
        when = {"start": str(schedule.start), "stop": schedule.stop and str(schedule.stop), **gradual}
        return {**super()._options(), "sparsity": self.sparsity, **when}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The length of training is known now."""
        self._check(trainer)
        super().on_train_start(trainer, pl_module)

    def _check(self, trainer: Trainer) -> None:
        schedule = self._schedule
        schedule.check(trainer, "nothing would ever be pruned")
        if schedule.stop is None and not schedule.start.value:
            return
        planned = planned_time(trainer, schedule.stop.unit) if schedule.stop else None
        if planned is not None and schedule.stop.value > planned:
            raise UnsupportedSetup(
                f"SparsityMask(stop={schedule.stop}): training ends before that, after {planned:g}, and would leave "
                f"the network less sparse than {self.sparsity:g}. Stop earlier, or train longer."
            )
        for callback in trainer.callbacks:
            if isinstance(callback, ModelSoup):
                rank_zero_warn(
                    f"{type(callback).__name__} stands beside a SparsityMask that prunes until "
                    f"{schedule.stop or schedule.start}: checkpoints from before are zero at other places, and a soup "
                    "of them is refused when the fit ends. Let it take later ones (last=…), or prune at the beginning."
                )
            if is_lightnings_average(callback) and self.sparsity is not None:
                raise UnsupportedSetup(
                    f"{type(callback).__name__} of Lightning averages weights from before and after they are pruned, "
                    "so its average would be dense. Prune at the beginning (no start, no stop), or use an average "
                    "of this package."
                )

    def _after_step(self, trainer: Trainer, optimizer: int) -> None:
        super()._after_step(trainer, optimizer)
        if optimizer == 0:
            self._steps_done += 1
            self._advance(trainer, at_step=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune where it is due after so many epochs, or at a share of the training."""
        self._advance(trainer, at_step=False)

    def _advance(self, trainer: Trainer, at_step: bool) -> None:
        """Prune if it is time."""
        schedule, step = self._schedule, self._steps_done
        by_steps = schedule.by_steps if schedule.stop else schedule.start.unit == "steps"
        if self._done or at_step != by_steps or not schedule.begun(trainer, step):
            return
        due, progress = False, 1.0
        if schedule.stop is not None:
            progress = schedule.progress(trainer, step)
            ticks = step if by_steps else schedule.ticks(trainer, step)
            due = schedule.due_at_step(step) if by_steps else ticks > self._ticks
            self._ticks = ticks
        if not due and progress < 1:
            return
        self._done = progress >= 1
        self._prune(trainer, self.sparsity if self._done else cubic_sparsity(self.sparsity, progress))

    def _prune(self, trainer: Trainer, sparsity: float) -> None:
        if not self._done and sparsity <= self.sparsity_reached:
            return  # of an earlier fit, whose masks stay
        self._pruned.prune(trainer, sparsity, self.selection, seed=self.seed)
        self._pruned.mask_gradients()
        for optimizer in trainer.optimizers:
            self._pruned.mask_optimizer(optimizer)
        for callback in trainer.callbacks:
            if isinstance(callback, LiveAverage):
                callback.prune(self._pruned.masks, self._pruned.tensors)
        if self._done:
            masks = self._pruned.masks
            rank_zero_info(f"SparsityMask: {masks.pruned:,} of {masks.size:,} weights are pruned.")

    def state_dict(self) -> dict[str, Any]:
        """The masks, and how far pruning has come."""
        progress = {"steps": self._steps_done, "ticks": self._ticks, "done": self._done}
        return {**super().state_dict(), **progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._check_state(state_dict, ("steps", "ticks", "done"))
        super().load_state_dict(state_dict)
        self._steps_done, self._ticks, self._done = (state_dict[key] for key in ("steps", "ticks", "done"))
