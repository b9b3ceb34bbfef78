"""MWA: checkpoints of one training, kept with their training loss, and merged by it when the fit ends."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_soup.callbacks.model_soup_checks import check_writable_on_rank_zero
from lightning_soup.callbacks.rank_zero_files import folder_of_fit, on_rank_zero
from lightning_soup.callbacks.schedule import planned_time
from lightning_soup.callbacks.steps import OptimizerSteps
from lightning_soup.callbacks.strategies import check_strategy
from lightning_soup.callbacks.training_loss import TrainingLoss, WeighBy
from lightning_soup.callbacks.window_files import PATTERN, WindowFiles, adapter_tensors, record_adapter
from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.modules.lora import config_in, peft_model_in
from lightning_soup.progress import rich_progress, silent
from lightning_soup.recipes import MetricsWeightedSoup, Soup
from lightning_soup.recipes.training_record import STEP, TRAIN_LOSS
from lightning_soup.runs.tracking import log_soup

_WINDOW = 10  # of most of the paper's configurations


class MetricsWeightedAveraging(Callback):
    """Keep the last checkpoints of a fit with their mean training loss, and merge them by it when the fit ends.

    Made for LoRA: of a module with a ``PeftModel`` in it, only the adapter is kept (a folder ``step=<steps>`` of PEFT's
    own form, with ``metrics.json``), and the merged adapter is a folder for ``PeftModel.from_pretrained``. Of other
    modules all weights are kept and merged. The loss of one batch is noise: what counts is the mean over all batches,
    of all ranks, since the checkpoint before.

    Works on one device and under DDP, with gradient accumulation and manual optimization. A fit that is resumed ends as
    one that was not interrupted. Sharded strategies are refused before training starts.

    Args:
        every_n_steps: Keep a checkpoint after every so many optimizer steps. None: after every validation, with what it
            logged, which ``recipe`` can then go by.
        recipe: How checkpoints are weighted and merged; :class:`.MetricsWeightedSoup` over the last 10 by default.
        weigh_by: What a batch counts for in the mean loss: its ``"samples"``, its ``"tokens"`` (``labels`` other than
            -100, or else the ``attention_mask``, of a batch that is a mapping), or as one, ``"batches"``.
        leave: What the module holds afterwards: ``"soup"``, or the ``"live"`` weights that training ended with. A
            merged adapter that does not fit the module (all but ``"factor"``) is in its folder only.
        dirpath: Folder of the checkpoints and the result; by default one named as ``filename`` in the run's folder.
        filename: Name of the result: of a folder for an adapter, and with ``.ckpt`` for whole models. Of two such
            callbacks in one Trainer, each needs its own, and its own ``dirpath`` where that is given.

    Attributes:
        soup: The :class:`.Soup`, once the fit has ended.
        soup_path: Where it was saved.

    Raises:
        UnsupportedSetup: Before training: an option has no meaning, the training is too short for the window, a merging
            of adapters is asked for where there is none, or the strategy shards parameters. In training: the training
            step returns no loss.
        NonFiniteWeights: In training: the weights became NaN.
        RecipeError: At the end: a checkpoint has no finite value of the metric.

    Source: Yu, Choi, Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging, 2025 (arXiv 2504.18580).
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        recipe: MetricsWeightedSoup | None = None,
        weigh_by: WeighBy = "samples",
        leave: Literal["soup", "live"] = "soup",
        dirpath: str | None = None,
        filename: str = "mwa",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UnsupportedSetup(f"MetricsWeightedAveraging(every_n_steps={every_n_steps}): expected 1 or more.")
        if leave not in ("soup", "live"):
            raise UnsupportedSetup(f"MetricsWeightedAveraging(leave={leave!r}): expected 'soup' or 'live'.")
        if not filename or Path(filename).name != filename or filename.startswith(PATTERN[:-1]):
            raise UnsupportedSetup(
                f"MetricsWeightedAveraging(filename={filename!r}): expected a name, not a path, that does not begin "
                f"with {PATTERN[:-1]!r}."
            )
        self.every_n_steps, self.recipe = every_n_steps, recipe or MetricsWeightedSoup(window=_WINDOW)
        if every_n_steps is not None and self.recipe.metric not in (TRAIN_LOSS, STEP):
            raise UnsupportedSetup(
                f"MetricsWeightedAveraging(every_n_steps={every_n_steps}) keeps checkpoints between validations, whose "
                f"{self.recipe.metric!r} is not known. Leave every_n_steps out to keep one after each validation, or "
                f"go by {TRAIN_LOSS!r} or {STEP!r}."
            )
        self.weigh_by, self.leave, self.dirpath, self.filename = weigh_by, leave, dirpath, filename
        self.soup: Soup | None = None
        self.soup_path: Path | None = None
        self._loss = TrainingLoss(weigh_by)
        self._files: WindowFiles | None = None
        self._signal: OptimizerSteps | None = None
        self._counts: dict[int, int] = {}
        self._last = 0
        self._loaded: dict[str, Any] | None = None
        self._trained = False

    @property
    def state_key(self) -> str:
        """Two of them in one Trainer are told apart by their files."""
        return f"MetricsWeightedAveraging({self.filename})"

    @property
    def steps(self) -> int:
        """Optimizer steps so far; with several optimizers, of the one that has made most."""
        return max(self._counts.values(), default=0)

    # ------------------------------------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        self._loaded, self._files, self._trained = None, None, False
        others = [other for other in trainer.callbacks if isinstance(other, type(self)) and other is not self]
        if self.dirpath is not None and self.dirpath in (other.dirpath for other in others):
            raise UnsupportedSetup(
                f"MetricsWeightedAveraging(dirpath={self.dirpath!r}): is that of another one in this Trainer, and they "
                "would delete each other's checkpoints. Give each its own, or none."
            )
        instead = "merge the checkpoints after training"
        check_strategy(trainer, type(self).__name__, "its checkpoints are sharded", instead=instead)
        if self.every_n_steps is None and not trainer.enable_validation:
            raise UnsupportedSetup(
                "MetricsWeightedAveraging keeps a checkpoint after each validation, but there is none. Give "
                "every_n_steps, or validation data."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapter and the folder, and follow the optimizers."""
        if trainer.fast_dev_run:
            return
        owner, config = type(self).__name__, config_in(pl_module)
        if config is None and self.recipe.merge is not None:
            raise UnsupportedSetup(
                f"{owner}: merge={self.recipe.merge!r} is for adapters, but there is no PeftModel in "
                f"{type(pl_module).__name__}. Leave merge out, or put an adapter in (ImageClassifier(lora=…))."
            )
        if config is not None and not adapter_tensors(pl_module, config):
            raise UnsupportedSetup(
                f"{owner}: the adapter in {type(pl_module).__name__} is not one that get_peft_model made."
            )
        state = self._loaded
        known = [path for path, _ in state["kept"]] if state else []
        resumed = trainer.ckpt_path is not None
        folder = folder_of_fit(trainer, owner, self.filename, PATTERN, self.dirpath, resumed, known)
        source = "It is the dirpath of MetricsWeightedAveraging, or the folder of the run."
        instead = "Give it a local dirpath, or merge the checkpoints after training."
        check_writable_on_rank_zero(trainer, folder / f"{self.filename}.ckpt", owner, source, instead)
        recipe = self.recipe
        self._files = WindowFiles(folder, recipe.window and recipe.window * recipe.stride, state)
        self._counts = {int(index): count for index, count in state["steps"]} if state else {}
        self._last = state["last"] if state else 0
        self._loss = TrainingLoss(self.weigh_by)
        if state:
            self._loss.restore(trainer, state["loss"])
        self._signal = OptimizerSteps.of(trainer)
        self._signal.listen(self, self._after_step, phase="observe")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a window that the training is too short for; warn of what an adapter would lose."""
        if trainer.fast_dev_run:
            return
        self._trained, self.soup, self.soup_path = True, None, None
        if not self._files.kept and self._files.run is None:
            self._files.begin(pl_module)
        planned = planned_time(trainer, "steps")
        if self.every_n_steps and self.recipe.window and planned is not None:
            needed = self.recipe.needed(self.recipe.window) * self.every_n_steps
            if planned < needed:
                raise UnsupportedSetup(
                    f"MetricsWeightedAveraging: window={self.recipe.window} with stride={self.recipe.stride}, a "
                    f"checkpoint every {self.every_n_steps} steps, needs {needed} optimizer steps, but training has "
                    f"{planned:.0f}. Train longer, save more often, or ask for a smaller window."
                )
        model = peft_model_in(pl_module)
        if model is not None:
            _warn_of_drifting_statistics(model)

    # ------------------------------------------------------------------------------------------------ during training

    def _after_step(self, index: int) -> None:
        self._counts[index] = self._counts.get(index, 0) + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the loss; keep a checkpoint where one is due."""
        if self._files is None:
            return
        self._loss.add(trainer, outputs, batch)
        every = self.every_n_steps
        if every is not None and self.steps // every > self._last // every:
            self._keep(trainer, pl_module, {})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a checkpoint with what was validated, if steps were made since the last."""
        if self._files is None or self.every_n_steps is not None or trainer.state.fn != "fit":
            return
        if not trainer.sanity_checking and self.steps > self._last:
            values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
            self._keep(trainer, pl_module, values)

    def _keep(self, trainer: Trainer, module: LightningModule, values: dict[str, float]) -> None:
        mean, skipped = self._loss.mean(trainer)
        if skipped:
            rank_zero_warn(f"MetricsWeightedAveraging: left out batches whose loss is not finite: {skipped}.")
        metrics = trainer.strategy.broadcast({**values, STEP: float(self.steps), TRAIN_LOSS: mean})
        self._files.write(trainer, module, metrics)
        self._loss.reset()
        self._last = self.steps

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the optimizers go."""
        if stage == "fit" and self._signal is not None:
            self._signal.stop(self)
            self._signal = self._files = None

    # ------------------------------------------------------------------------------------------------------ the files

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what is counted so far, of all ranks, and say how the adapter in the file is configured."""
        record_adapter(pl_module, checkpoint)
        if self._files is not None:
            checkpoint["callbacks"][self.state_key] = {
                **self._files.state(),
                "steps": [[index, count] for index, count in self._counts.items()],
                "last": self._last,
                "loss": self._loss.rows(trainer),
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with an interrupted fit, once it starts."""
        self._loaded = state_dict

    # ------------------------------------------------------------------------------------------------------- the soup

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge, save and log. Runs on every rank."""
        if self._files is None or not (self._trained or trainer.ckpt_path):
            return
        ingredients, gone = self._files.ingredients()
        seen = [item.name for item in ingredients]
        if not trainer.strategy.reduce_boolean_decision(trainer.strategy.broadcast(seen) == seen, all=True):
            raise LightningSoupError(
                f"MetricsWeightedAveraging: rank {trainer.global_rank} sees {len(seen)} checkpoints in "
                f"{self._files.folder}, and another rank others. Put them on a disk that all ranks share (dirpath)."
            )
        if gone:
            rank_zero_warn(f"MetricsWeightedAveraging: {', '.join(gone[:3])} is gone, and will not be in the soup.")
        if not ingredients:
            rank_zero_warn(
                "MetricsWeightedAveraging: the fit ended before a checkpoint was due; there is nothing to merge."
            )
            return
        recipe = self._fitting(len(ingredients))
        shown = rich_progress if trainer.is_global_zero and trainer.progress_bar_callback is not None else silent
        soup = replace(recipe.without_start_check().cook(ingredients, progress=shown), recipe=str(self.recipe))
        config = config_in(pl_module)
        adapter = soup.merging is not None and soup.merging.mode != "dense"
        path = self._files.folder / (self.filename if adapter else f"{self.filename}.ckpt")
        self.soup_path = on_rank_zero(trainer, lambda: soup.save(path, progress=shown), f"{path}: was not saved")
        self.soup = soup
        if self.leave == "soup" and (config is None or recipe.merging().mode == "factor"):
            if config is None:
                soup.apply_to(pl_module)
            else:
                soup.weights(adapter_tensors(pl_module, config))
        self._report(trainer, soup)

    def _fitting(self, count: int) -> MetricsWeightedSoup:
        """The recipe, with a smaller window where the fit ended early."""
        recipe, window = self.recipe, self.recipe.window
        if window is None or recipe.needed(window) <= count:
            return recipe
        possible = (count - 1) // recipe.stride + 1
        rank_zero_warn(
            f"MetricsWeightedAveraging: the fit left {count} checkpoints, fewer than the {recipe.needed(window)} of "
            f"window={window} with stride={recipe.stride}; {possible} of them are merged."
        )
        return replace(recipe, window=possible)

    def _report(self, trainer: Trainer, soup: Soup) -> None:
        used = sum(weight > 0 for weight in soup.shares())
        for logger in trainer.loggers:
            logger.log_metrics({"mwa_checkpoints": float(used)}, step=trainer.global_step)
        log_soup(trainer.loggers, soup, self.soup_path, label=self.filename)
        rank_zero_info(f"{soup.recipe}: {used} of {len(soup.ingredients)} checkpoints, in {self.soup_path}")


def _warn_of_drifting_statistics(model: Any) -> None:
    """BatchNorm layers of a frozen base count on while training, and no adapter holds what they count."""
    kept = tuple(model.peft_config["default"].modules_to_save or ())
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats:
            if any(part in kept for part in name.split(".")):
                continue
            rank_zero_warn(
                f"MetricsWeightedAveraging: the BatchNorm layer {name!r} of the frozen base is in training mode: its "
                "statistics drift, and are lost where only the adapter is saved. Put it into eval(), or name it among "
                "modules_to_save."
            )
            return
