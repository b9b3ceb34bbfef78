"""LiveAverage: the base of averages that are kept up to date while training, whatever their rule."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_soup.callbacks import average_files
from lightning_soup.callbacks.average_of_module import AverageOfModule
from lightning_soup.callbacks.live_average_checks import STAGES, Stage, check_options, check_surroundings
from lightning_soup.callbacks.recalibration import check_batch_norm
from lightning_soup.callbacks.schedule import Schedule, When, planned_time
from lightning_soup.callbacks.shadow import RunningMean, Shadow
from lightning_soup.callbacks.strategies import check_strategy
from lightning_soup.callbacks.weights_only import take_off
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.fit_evaluator import FitEvaluator
from lightning_soup.layers.masks import Masks


class LiveAverage(Callback):
    """An average of the weights, kept up to date during ``fit``, on which validation scores and which files hold.

    Subclasses say how: :class:`.ExponentialAverage`, :class:`.EqualAverage`, :class:`.LatestAverage`,
    :class:`.WeightEnsemble`. Add one to a Trainer and nothing else changes: neither the optimizer nor its schedule, nor
    the Trainer's own limits. Samples are taken after real optimizer steps only: with gradient accumulation, in manual
    optimization, and where a gradient scaler skips a step. With several optimizers, the tensors of each are averaged
    over that optimizer's own steps.

    Checkpoints hold what validation scored under ``state_dict`` and the live weights under ``current_model_state``,
    also those written at or after the end of training; training resumes from the live weights, bit for bit.
    ``open_checkpoint(path, which="raw")`` gives the live weights and ``which=<name>`` this average. Files written with
    ``save_weights_only=True`` hold the average alone.

    Works on one device, under DDP (each rank keeps the same average without communication), and with
    ``ModelParallelStrategy`` (each rank averages its own shards). FSDP1 and DeepSpeed are refused.

    Args:
        start: Nothing is averaged before this much training: optimizer steps (``100``), a fraction of the training
            (``0.75``), or text (``"2 epochs"``, ``"100 steps"``, ``"75%"``).
        stop: Nothing is averaged after this much; None: to the end.
        every: A sample is taken once in this much training. ``"1 epochs"`` is at the end of each epoch.
        name: Names the average in logs and files, and tells several in one Trainer apart.
        include: Patterns of the parameters to average (``visual.*``), among those with ``requires_grad``; None: all.
        exclude: Patterns of the parameters to leave live.
        buffers: ``"copy"`` leaves buffers as they are live. ``"average"`` averages those that are floating-point and
            finite. ``"recalibrate"`` estimates BatchNorm statistics anew for the average before each validation, in
            passes without gradients over training batches, which go through ``validation_step``.
        recalibrate_batches: Training batches for that, of each rank where there are several.
        evaluate_on: Where the module holds the average: of ``validate``, ``test`` and ``predict``. With several
            averages in one Trainer, at most one may have any. A test of a file (``ckpt_path``) is one of what the file
            holds under ``state_dict``: the average if ``validate`` is among these.
        leave: What the module holds after ``fit``: ``"average"`` or ``"live"``. By default the average if it was
            evaluated, else the live weights.
        device: Where the average is kept, such as ``cpu`` to save memory of a GPU; None: beside the weights.
        score_live: Also run each validation on the live weights, and log ``<name>/live_<metric>``. Costs as much as the
            validation.

    Raises:
        UnsupportedSetup: Before training: an option has no meaning, nothing is left to average, ``start`` lies after
            the end of training, ``every`` is longer than what is left of it then, or the strategy cannot be served.
        NonFiniteWeights: In training: the weights became NaN.
    """

    first_step_counts = False
    needs_start = False

    def __init__(
        self,
        start: When = 0,
        stop: When | None = None,
        every: When = 1,
        name: str = "live_average",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        buffers: Literal["copy", "average", "recalibrate"] = "copy",
        recalibrate_batches: int = 100,
        evaluate_on: Sequence[Stage] = STAGES,
        leave: Literal["average", "live"] | None = None,
        device: str | None = None,
        score_live: bool = False,
    ) -> None:
        owner = type(self).__name__
        self.schedule = Schedule(start, stop, every, self.first_step_counts, owner)
        check_options(owner, name, include, exclude, buffers, recalibrate_batches, evaluate_on, leave)
        self.name, self.buffers, self.recalibrate_batches = name, buffers, recalibrate_batches
        self.include, self.exclude = tuple(include or ()), tuple(exclude or ())
        self.evaluate_on = tuple(evaluate_on)
        self.leave = leave or ("average" if evaluate_on else "live")
        try:
            self.device = None if device is None else torch.device(device)
        except RuntimeError as error:
            raise UnsupportedSetup(f"{owner}(device={device!r}): expected 'cpu', 'cuda' or the like. {error}") from None
        self.score_live = score_live
        self._average: AverageOfModule | None = None
        self._earlier: AverageOfModule | None = None  # of a fit before, until this one trains
        self._trained = False
        self._loaded: average_files.Loaded | None = None

    # ------------------------------------------------------------------------------------------------------ the rule

    @abstractmethod
    def share(self, n: int) -> float:
        """The weight that the n-th sample (from 0) gets in the mean; the earlier ones keep ``1 − share``."""

    def new_shadow(self) -> Shadow:
        """Where the average of one optimizer's tensors is kept."""
        return RunningMean(self.device)

    # ---------------------------------------------------------------------------------------------------- the object

    @property
    def state_key(self) -> str:
        """Depends on the name only. Lightning shows it when a file is resumed without this callback."""
        return (
            f"LiveAverage {self.name!r} (without this callback training would go on from the average: the live weights "
            "are in the file under current_model_state; open_checkpoint(path, which='raw') reads them)"
        )

    @property
    def samples(self) -> int:
        """Samples taken so far, the start not counted; with several optimizers, of the one that has most."""
        return self._average.samples if self._average else 0

    @property
    def evaluated(self) -> bool:
        """Whether validation scores the average, so that it belongs under ``state_dict`` in files."""
        return "validate" in self.evaluate_on

    def __getstate__(self) -> dict[str, Any]:
        """Launchers pickle the Trainer before it runs: what belongs to a run stays here."""
        return {**self.__dict__, "_average": None, "_earlier": None, "_loaded": None}

    # ------------------------------------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, unless nothing is left to train, and refuse what cannot work."""
        if stage != "fit":
            return
        why = "it keeps parameters in flattened or hidden shards"
        check_strategy(trainer, type(self).__name__, why, shards=True, replicas=True)
        if self._average is not None:  # after an exception there was no teardown
            self._average.close()
        take_off(trainer, self)
        self._earlier, self._average, self._loaded = self._average, None, None
        self._trained = False
        averages = [callback for callback in trainer.callbacks if isinstance(callback, LiveAverage)]
        check_surroundings(trainer, self, averages)
        average_files.check_weights_only(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the tensors on their device and in their type, and follow the optimizers."""
        if self.buffers == "recalibrate":
            check_batch_norm(pl_module, type(self).__name__)
        self._average = AverageOfModule(self, trainer, pl_module)
        average_files.follow_weights_only(trainer, self)
        if self._loaded is not None:
            self._resume(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The length of training is known now, and every strategy has loaded what it resumes from."""
        self._trained, self._earlier = True, None
        if self.needs_start:
            self._average.absorb_start()
        self._average.count_from(trainer)
        self.schedule.check(trainer)
        if not self.samples:
            self.schedule.check_period(trainer)
        planned = planned_time(trainer, self.schedule.every.unit)
        if planned is not None:
            whole = planned_time(trainer, self.schedule.start.unit)
            begun = self.schedule.start.value / whole if whole else 0.0
            self.check_length(planned * (1 - begun) / self.schedule.every.value)

    def check_length(self, updates: float) -> None:
        """Warn where the rule does not suit the number of updates that are planned."""

    def _resume(self, module: LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        loaded.restore_live(module)
        loaded.restore(self._average)

    # ------------------------------------------------------------------------------------------------ during training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow optimizers that were made anew and parameters that were unfrozen."""
        self._average.refresh(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The same for those that callbacks after this one, or the module, have unfrozen."""
        self._average.before_batch(trainer)

    def prune(self, masks: Masks, tensors: Mapping[str, Tensor]) -> None:
        """Make zero in the average what another callback has pruned in the weights.

        Args:
            masks: The masks.
            tensors: The parameters of the module that they lie over, by their names.
        """
        if self._average is not None:
            self._average.prune(masks, tensors)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Samples that are due at the end of an epoch or of a share of the training."""
        self._average.after_batch(trainer)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how far the average has come, and put it into the module."""
        average, distance = self._average, math.nan
        if average and average.samples > 0 and trainer.state.fn == "fit" and not trainer.sanity_checking:
            average.share_buffers(trainer)
            distance = average.relative_distance()
            values = {
                "samples": float(average.samples),
                "effective_window": average.effective_window(),
                "relative_distance": distance,
            }
            if not trainer.barebones:  # which logs nothing, and warns of each attempt
                self.log_dict({f"{self.name}/{key}": value for key, value in values.items()}, sync_dist=True)
        self._enter(trainer, pl_module, "validate", check=not math.isfinite(distance))  # NaN would show in it

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its live weights back, before any checkpoint is written."""
        scored = self._average is not None and self._average.placed
        self._exit()
        if scored and self.score_live and trainer.state.fn == "fit" and not trainer.sanity_checking:
            metrics = FitEvaluator(trainer, pl_module, "").metrics()
            named = {f"{self.name}/live_{metric}": float(value) for metric, value in metrics.items()}
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in named.items()})
            for logger in trainer.loggers:
                logger.log_metrics(named, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._enter(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._exit()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._enter(trainer, pl_module, "predict")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As in validation."""
        self._exit()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Checkpoint callbacks may save now: the module gets its live weights back first."""
        self._exit()
        if self._trained and self._average is not None and not self._average.finished:
            self._average.leave()  # interrupted by hand, a notebook goes on with what there is
        self._keep_earlier(pl_module)

    def _enter(self, trainer: Trainer, module: LightningModule, stage: Stage, check: bool = True) -> None:
        average = self._average
        if average is None or stage not in self.evaluate_on or average.samples <= 0 or not average.is_of(module):
            return
        if average.left or (trainer.sanity_checking and not average.restored):
            return
        if trainer.state.fn != "fit" and average.changed:
            if trainer.ckpt_path is None:  # else Lightning did, and the weights of the file are what is asked for
                rank_zero_warn(
                    f"{self.name}: the module was changed after its fit, so the average is not used any more."
                )
            self._average = None
            return
        average.place(trainer, statistics=trainer.state.fn == "fit", check=check)

    def _exit(self) -> None:
        if self._average is not None and not self._average.left:
            self._average.put_back()

    # ------------------------------------------------------------------------------------------------------------ end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module, or say why there is none."""
        average = self._average
        if average.samples <= 0:
            rank_zero_warn(
                f"{type(self).__name__} {self.name!r}: {average.why_none()} The module keeps its live weights."
            )
            return
        average.report_live()
        if trainer.global_step == 0:
            rank_zero_warn(
                f"{self.name}: optimizers were stepped without Lightning, so its step counter stood still: "
                "checkpoints, logs and limits that go by steps did not work. Step what self.optimizers() returns."
            )
        if self.leave == "average":
            average.share_buffers(trainer)
            average.place(trainer, statistics=True)
        average.leave()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where nothing was left to train, end as the fit before did."""
        if self._trained:
            return
        self._keep_earlier(pl_module)
        if self._average.restored and self.samples:
            if self.leave == "average":
                self._average.place(trainer)
            self._average.leave()

    def _keep_earlier(self, module: LightningModule) -> None:
        """An average that was made of the module before is still its, unless a file brought another one."""
        if self._earlier is not None and self._earlier.is_of(module) and not self.samples:
            if self._average is not None:
                self._average.close()
            self._average, self._earlier = self._earlier, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the optimizers go. The average stays with its module, for files and tests after the fit."""
        if self._average is not None and stage == "fit":
            self._average.close()

    # ---------------------------------------------------------------------------------------------------------- files

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write both halves, whichever of them the module holds now."""
        if self._average is not None and self._average.is_of(pl_module):
            average_files.save(self._average, trainer, checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume: the live weights go back into the module, which was given the average."""
        if trainer.state.fn != "fit":
            return
        self._loaded = average_files.load(self, checkpoint)
        if self._loaded is not None:
            self._loaded.restore_live(pl_module)
            if self._average is not None:  # strategies that shard load after on_fit_start
                self._resume(pl_module)
