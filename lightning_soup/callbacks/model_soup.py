"""Cooking a soup at the end of a fit, from the checkpoints that the fit left behind."""

import os
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_soup.callbacks.model_soup_checks import (
    WatchedMetric,
    check_kept_files,
    check_loss,
    check_trail,
    check_training_ends,
    check_writable_on_rank_zero,
    checkpoint_callback,
)
from lightning_soup.callbacks.rank_zero_files import on_rank_zero
from lightning_soup.callbacks.strategies import check_strategy
from lightning_soup.errors import LightningSoupError, RecipeError, UnsupportedSetup
from lightning_soup.evaluation.evaluator import direction
from lightning_soup.evaluation.fit_evaluator import FitEvaluator
from lightning_soup.progress import Progress, rich_progress, silent
from lightning_soup.recipes import Ingredient, Recipe, Soup, UniformSoup
from lightning_soup.recipes.ingredient import saves_between_validations
from lightning_soup.runs.tracking import log_soup
from lightning_soup.weights.atomic import user_path
from lightning_soup.weights.weights_file import module_tensors


class ModelSoup(Callback):
    """Soup what ``ModelCheckpoint`` kept (or the last k epochs) when the fit ends.

    ``Trainer(callbacks=[ModelCheckpoint(monitor="val_acc", mode="max", save_top_k=5), ModelSoup()])`` is enough. The
    soup is saved beside the checkpoints, scored on the validation data, logged, and left in the module. Checkpoints of
    one run make a *trajectory* soup; for a soup of several runs use ``lightning-soup soup``.

    Works on one device and under DDP, where all ranks evaluate together and rank 0 writes. Sharded strategies are
    refused before training starts.

    Args:
        recipe: How coefficients are chosen; :class:`.UniformSoup` by default. With
            :class:`.InterpolatedSoup` the weights before the first step are saved too: they are θ_zs, and the soup of
            the checkpoints is θ_ft.
        last: Soup the weights at the end of the last ``last`` epochs instead (each saved without optimizer state), and
            do not ask for a ``ModelCheckpoint``.
        monitor: Metric that scores the soup and its candidates; that of the ``ModelCheckpoint`` by default.
        mode: ``"max"`` or ``"min"``; that of the ``ModelCheckpoint`` by default, else ``"min"`` for losses and errors.
        leave: What the module holds afterwards: ``"soup"``, or the ``"live"`` weights that training ended with.
        dirpath: Folder of the soup; that of the checkpoints by default.
        filename: Name of the soup's file. A ``.ckpt`` is loadable by ``load_from_checkpoint``.
        recalibrate: Estimate BatchNorm statistics anew for the soup, in one pass over the training data after the
            coefficients are chosen; see :meth:`.Soup.recalibrated`. Its history tells the score before and after.
        trail: Soup what the Trainer's :class:`.CheckpointTrail` kept, and do not ask for a ``ModelCheckpoint``.

    Attributes:
        soup: The :class:`.Soup`, once the fit has ended.
        soup_path: Where it was saved.

    Raises:
        UnsupportedSetup: Before training: nothing would be kept to soup, there is no metric for a recipe that needs
            one, or the strategy shards parameters. At the end of the first validation: it does not log that metric.
        UnwritableOutput: Before training: the soup could not be written to its folder.
    """

    def __init__(
        self,
        recipe: Recipe | None = None,
        last: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        leave: Literal["soup", "live"] = "soup",
        dirpath: str | None = None,
        filename: str = "soup.ckpt",
        recalibrate: bool = False,
        trail: bool = False,
    ) -> None:
        if last is not None and trail:
            raise UnsupportedSetup(f"ModelSoup(last={last}, trail=True): expected one of them; they are other files.")
        if last is not None and last < 2:
            raise UnsupportedSetup(f"ModelSoup(last={last}): a soup needs at least the last 2 epochs.")
        if leave not in ("soup", "live"):
            raise UnsupportedSetup(f"ModelSoup(leave={leave!r}): expected 'soup' or 'live'.")
        if Path(filename).suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
            raise UnsupportedSetup(
                f"ModelSoup(filename={filename!r}): expected .safetensors, .ckpt, .pt, .pth or .bin."
            )
        self.recipe = recipe or UniformSoup()
        self.last, self.monitor, self.mode, self.leave, self.trail = last, monitor, mode, leave, trail
        self.dirpath, self.filename, self.recalibrate = dirpath, filename, recalibrate
        self.soup: Soup | None = None
        self.soup_path: Path | None = None
        self._epochs: list[str] = []
        self._start: str | None = None
        self._earlier: set[str] = set()
        self._watched, self._trained = WatchedMetric(), False

    @property
    def state_key(self) -> str:
        """Two of them in one Trainer are told apart by their files."""
        return f"ModelSoup({self.filename})"

    # --------------------------------------------------------------------------------------------- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        if stage != "fit" or trainer.fast_dev_run:
            return
        instead = "soup the checkpoints after training"
        check_strategy(trainer, type(self).__name__, "its checkpoints are sharded", instead=instead)
        if self.trail:
            check_trail(trainer)
        elif self.last is None:
            check_kept_files(trainer)
        if self._purpose() and not (self._metric(trainer)[0] and trainer.enable_validation):
            raise UnsupportedSetup(
                f"{self._purpose()}. Give ModelSoup(monitor='val_acc', …) or a ModelCheckpoint with monitor, and "
                "validation data; or use UniformSoup without recalibrate."
            )

    @property
    def _chooser(self) -> Recipe:
        """The recipe that chooses among the checkpoints of the fit."""
        if self.recipe.needs_evaluator or not self.recipe.from_init:
            return self.recipe
        return self.recipe.soup

    def _purpose(self) -> str:
        """What the score of a candidate is needed for; empty where it is no more than a report."""
        if self._chooser.needs_evaluator:
            return f"{type(self._chooser).__name__} chooses by a validation metric"
        return "recalibrate=True tells the score before and after, by a validation metric" if self.recalibrate else ""

    def _metric(self, trainer: Trainer) -> tuple[str | None, Literal["min", "max"]]:
        kept = checkpoint_callback(trainer)
        if self.monitor is not None:
            told = kept.mode if kept and kept.monitor == self.monitor else direction(self.monitor)
            return self.monitor, self.mode or told
        return (kept.monitor, self.mode or kept.mode) if kept else (None, self.mode or "max")

    # --------------------------------------------------------------------------------------------- while training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that the soup can be written, and that the files are there from which a resumed fit goes on."""
        self._watched, self._trained = WatchedMetric(), False
        if trainer.fast_dev_run:
            return
        check_writable_on_rank_zero(trainer, self._folder(trainer) / self.filename)
        if trainer.ckpt_path is None:
            return
        if self.recipe.from_init and not (self._start and os.path.exists(self._start)):
            raise UnsupportedSetup(
                f"ModelSoup({type(self.recipe).__name__}()) needs the weights before the first step, but "
                f"{trainer.ckpt_path} names no file with them that is still there. Resume a fit that had this "
                "callback from its beginning, or choose another recipe."
            )
        gone = [path for path in self._epochs if not os.path.exists(path)]
        if gone:
            rank_zero_warn(f"ModelSoup: {', '.join(gone)} of the earlier fit is gone, and will not be in the soup.")
            self._epochs = [path for path in self._epochs if path not in gone]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit, unless this one goes on with it; keep the start where the recipe needs it.

        By now the data are there, so that a recipe can tell whether they have what it needs.
        """
        self._trained, self.soup, self.soup_path, self._earlier = True, None, None, set()
        if trainer.fast_dev_run:
            return
        if self.recalibrate:
            check_training_ends(trainer, pl_module)
        metric, mode = self._metric(trainer)
        if metric is not None and trainer.enable_validation:
            evaluator, new = FitEvaluator(trainer, pl_module, metric, mode), trainer.ckpt_path is None
            on_rank_zero(
                trainer, lambda: self._chooser.check(evaluator, new), "ModelSoup: its recipe cannot be checked"
            )
        if trainer.ckpt_path is None:
            self._epochs, self._start = [], None
            kept = checkpoint_callback(trainer)
            self._earlier = set(kept.best_k_models) if kept else set()
            if self.recipe.from_init:
                self._start = str(self._folder(trainer) / f"{Path(self.filename).stem}-start.ckpt")
                trainer.save_checkpoint(self._start, weights_only=True)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say in the sanity check, not after the training, that a recipe lacks the loss it learns from."""
        if trainer.state.fn == "fit" and not trainer.fast_dev_run:
            check_loss(self._chooser, pl_module, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say at the first validation, not after the training, that the metric is not logged."""
        metric, _ = self._metric(trainer)
        if metric is not None and trainer.state.fn == "fit":
            self._watched.look(trainer, metric, self._purpose())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this epoch's weights, and drop those of the oldest."""
        if self.last is None or trainer.fast_dev_run:
            return
        path = str(self._folder(trainer) / f"{Path(self.filename).stem}-epoch={trainer.current_epoch}.ckpt")
        trainer.save_checkpoint(path, weights_only=True)
        self._epochs = [*(epoch for epoch in self._epochs if epoch != path), path]
        while len(self._epochs) > self.last:
            trainer.strategy.remove_checkpoint(self._epochs.pop(0))

    def state_dict(self) -> dict[str, Any]:
        """The files of the epochs kept so far, and of the start."""
        return {"epochs": list(self._epochs), "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the files of an interrupted fit."""
        self._epochs, self._start = list(state_dict["epochs"]), state_dict["start"]

    # ----------------------------------------------------------------------------------------------------- the soup

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cook, save, score and log the soup. Runs on every rank."""
        if trainer.fast_dev_run or not (self._trained or trainer.ckpt_path):
            return  # nothing was left to train: the soup of the fit before is still that of the module
        metric, mode = self._metric(trainer)
        ingredients = self._ingredients(trainer, metric)
        if len(ingredients) < 2:
            rank_zero_warn(
                f"ModelSoup: only {len(ingredients)} checkpoint was kept in this fit; there is nothing to soup."
            )
            return
        evaluator = None
        if metric is not None and trainer.enable_validation and self._watched.logged is not False:
            evaluator = FitEvaluator(trainer, pl_module, metric, mode)
        shown = rich_progress if trainer.is_global_zero and trainer.progress_bar_callback is not None else silent
        live = {name: value.detach().clone() for name, value in module_tensors(pl_module).items()}
        device, left = pl_module.device, False
        try:
            self.soup = self._cook(trainer, ingredients, evaluator, shown)
            self.soup_path = self._save(trainer, self.soup)
            if self.leave == "soup":
                self.soup.apply_to(pl_module)
                left = True
        finally:
            if not left:
                with torch.no_grad():  # a plain copy: what diverged is put back as it was
                    for name, value in module_tensors(pl_module).items():
                        value.copy_(live[name])
            pl_module.to(device)
        self._report(trainer, self.soup)

    def _cook(
        self, trainer: Trainer, ingredients: list[Ingredient], evaluator: FitEvaluator | None, shown: Progress
    ) -> Soup:
        """The same soup on every rank."""
        # Checkpoints of one run have a common start, however far they have gone from it.
        recipe = self.recipe.without_start_check()
        try:
            soup = recipe.cook(ingredients, evaluator, shown)
        except RecipeError as error:
            if self._chooser.needs_evaluator or evaluator is None:
                raise
            rank_zero_warn(f"ModelSoup: the soup gets no score: {error}")
            soup = recipe.cook(ingredients, None, shown)
        coefficients = trainer.strategy.broadcast(soup.coefficients)  # learned ones may differ in the last bits
        soup = replace(soup, recipe=str(self.recipe), coefficients=coefficients)
        if not self.recalibrate or evaluator is None:
            return soup
        try:
            soup = soup.recalibrated(evaluator)
        except Exception as error:  # training is over: what only adjusts the soup must not cost it
            note = f"the BatchNorm statistics were not estimated anew ({type(error).__name__}: {error})."
            rank_zero_warn(f"ModelSoup: {note}")
            return replace(soup, notes=(*soup.notes, note))
        return replace(soup, statistics=trainer.strategy.broadcast(soup.statistics))

    def _ingredients(self, trainer: Trainer, metric: str | None) -> list[Ingredient]:
        kept = checkpoint_callback(trainer)
        if self.last is not None or self.trail:
            files = check_trail(trainer).files if self.trail else self._epochs
            scores: dict[str, float] = dict.fromkeys(files, float("nan"))
        else:
            scores = {path: float(score) for path, score in kept.best_k_models.items()} if kept else {}
            scores = {path: score for path, score in scores.items() if path not in self._earlier}
            if kept and saves_between_validations(kept.state_key):
                scores = dict.fromkeys(scores, float("nan"))
        if self._start is not None and scores:
            scores = {self._start: float("nan"), **scores}  # θ_zs, the first ingredient of an interpolation
        scores = trainer.strategy.broadcast(scores)
        missing = [path for path in scores if not os.path.exists(path)]
        if not trainer.strategy.reduce_boolean_decision(not missing, all=True):
            seen = f"rank {trainer.global_rank} cannot see {missing[0]}" if missing else "another rank misses one"
            raise LightningSoupError(
                f"ModelSoup: a checkpoint of this fit is gone: {seen}. Leave the files where ModelCheckpoint "
                "put them, on a disk that all ranks share."
            )
        return [
            Ingredient(path, {metric: score} if metric and not isnan(score) else {}, label=Path(path).stem)
            for path, score in scores.items()
        ]

    def _save(self, trainer: Trainer, soup: Soup) -> Path:
        """Write on rank 0; a failure there is raised on every rank, so that none waits for the others."""
        path = self._folder(trainer) / self.filename
        return on_rank_zero(trainer, lambda: soup.save(path), f"{path}: the soup was not saved")

    def _folder(self, trainer: Trainer) -> Path:
        if self.dirpath is not None:
            return user_path(self.dirpath)
        kept = checkpoint_callback(trainer)
        if kept is not None and kept.dirpath:
            return Path(kept.dirpath)
        return Path(trainer.strategy.broadcast(trainer.log_dir or trainer.default_root_dir)) / "checkpoints"

    def _report(self, trainer: Trainer, soup: Soup) -> None:
        values: dict[str, float] = {"soup_ingredients": float(sum(share != 0.0 for share in soup.shares()))}
        if soup.score is not None:
            values[f"soup_{soup.metric}"] = soup.natural_score
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        log_soup(trainer.loggers, soup, self.soup_path)
        used = f"{int(values['soup_ingredients'])} of {len(soup.ingredients)} checkpoints"
        told = "" if soup.score is None else f", {soup.metric} {soup.natural_score:.4f}"
        if self.recalibrate and soup.statistics:
            told += f" ({soup.history[-1].label}: {soup.history[-1].reason})"
        rank_zero_info(f"{soup.recipe}: {used}{told}, in {self.soup_path}")
