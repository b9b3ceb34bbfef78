"""What ``ModelSoup`` refuses or warns of, as soon as it can be known: no training should end without its soup."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_soup.errors import LightningSoupError, UnsupportedSetup, UnwritableOutput
from lightning_soup.evaluation.evaluator import not_logged
from lightning_soup.evaluation.own_loops import loss_of
from lightning_soup.recipes import Recipe
from lightning_soup.weights.save import check_output

if TYPE_CHECKING:
    from lightning_soup.callbacks.checkpoint_trail import CheckpointTrail


def checkpoint_callback(trainer: Trainer) -> ModelCheckpoint | None:
    """The ModelCheckpoint that keeps several scored files, or the first one."""
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    scored = [callback for callback in found if callback.monitor is not None and callback.save_top_k not in (0, 1)]
    return (scored or found or [None])[0]


def check_kept_files(trainer: Trainer) -> None:
    """Refuse a Trainer whose ModelCheckpoint leaves no list of files to soup."""
    kept = checkpoint_callback(trainer)
    if kept is None:
        raise UnsupportedSetup(
            "ModelSoup needs checkpoints to soup. Add ModelCheckpoint(monitor='val_acc', mode='max', save_top_k=5)"
            ", or pass ModelSoup(last=5) to soup the last 5 epochs."
        )
    if kept.save_top_k in (0, 1):
        raise UnsupportedSetup(
            f"ModelSoup needs at least two checkpoints, but ModelCheckpoint keeps {kept.save_top_k} (save_top_k). "
            "Set save_top_k=5, or pass ModelSoup(last=5)."
        )
    if kept.monitor is None:
        raise UnsupportedSetup(
            "ModelSoup: a ModelCheckpoint without monitor keeps no list of its files. Set monitor, or pass "
            "ModelSoup(last=5)."
        )


def check_trail(trainer: Trainer) -> "CheckpointTrail":
    """The CheckpointTrail of a Trainer; without one, or with one whose files do not fit the module, refuse."""
    from lightning_soup.callbacks.checkpoint_trail import CheckpointTrail

    found = [callback for callback in trainer.callbacks if isinstance(callback, CheckpointTrail)]
    if not found:
        raise UnsupportedSetup("ModelSoup(trail=True) needs weights to soup. Add CheckpointTrail(every=20, keep=24).")
    if not found[0].frozen:
        raise UnsupportedSetup(
            "ModelSoup(trail=True) needs files that fit the whole module, but CheckpointTrail(frozen=False) leaves "
            "frozen parameters out. Pass frozen=True, or combine the files afterwards."
        )
    return found[0]


def check_writable_on_rank_zero(
    trainer: Trainer,
    path: Path,
    owner: str = "ModelSoup",
    source: str = "It is the dirpath of ModelSoup, or that of ModelCheckpoint.",
    instead: str = "Give ModelCheckpoint a local dirpath, or soup the checkpoints after training.",
) -> None:
    """Refuse a soup's file that rank 0 could not write; all ranks raise, so that none waits for the others.

    Args:
        trainer: The Trainer.
        path: The file.
        owner: The callback.
        source: Where its folder comes from.
        instead: What to do where the folder is not local.
    """
    if re.match(r"[a-z][a-z0-9+.]+:/", str(path)):
        raise UnsupportedSetup(
            f"{owner}: {path.parent} is no local folder, from which the checkpoints can be read. {instead}"
        )
    error: LightningSoupError | None = None
    if trainer.is_global_zero:
        try:
            check_output(path)
        except UnwritableOutput as caught:
            error = UnwritableOutput(f"{owner}: {caught} {source}")
    error = trainer.strategy.broadcast(error)
    if error is not None:
        raise error


def check_training_ends(trainer: Trainer, module: LightningModule) -> None:
    """Refuse to recalibrate on training data without a known end: the pass over them might have none."""
    if math.isinf(trainer.num_training_batches) and any(isinstance(part, _BatchNorm) for part in module.modules()):
        raise UnsupportedSetup(
            "ModelSoup(recalibrate=True) goes over the training data once, but their loader has no length, so it may "
            "have no end. Pass Trainer(limit_train_batches=100), or go without recalibrate."
        )


class WatchedMetric:
    """Whether validation logs the metric by which a soup is judged: looked up after each until one does.

    Args:
        owner: The callback, for messages.

    Attributes:
        logged: Whether a validation has logged it, on every rank; ``None`` before the first.
    """

    def __init__(self, owner: str = "ModelSoup") -> None:
        self.owner = owner
        self.logged: bool | None = None
        self._told = False

    def look(self, trainer: Trainer, metric: str, purpose: str) -> None:
        """Look at what the validation that ends now has logged.

        After a sanity check there is a warning only: modules may log less there than in a validation.

        Args:
            trainer: The Trainer, in ``on_validation_end``.
            metric: The metric.
            purpose: What cannot be done without; empty where the score is no more than a report.

        Raises:
            UnsupportedSetup: The metric is not logged, and there is a purpose. Raised on all ranks or on none.
        """
        if self.logged:
            return
        found = _names(trainer.fit_loop.epoch_loop.val_loop)
        logged = trainer.strategy.reduce_boolean_decision(metric in found, all=True)
        if trainer.sanity_checking:
            if purpose and found and not logged:
                text = self._explained(trainer, metric, found)
                rank_zero_warn(
                    f"{self.owner}: {purpose}, but in the sanity check {text} If the first validation does not log it "
                    "either, training ends there with an error."
                )
            return
        self.logged = logged
        if logged:
            return
        if purpose:
            raise UnsupportedSetup(f"{self.owner}: {purpose}, but {self._explained(trainer, metric, found)}")
        if not self._told:
            self._told = True
            rank_zero_warn(f"{self.owner}: the soup gets no score: {self._explained(trainer, metric, found)}")

    def _explained(self, trainer: Trainer, metric: str, found: list[str]) -> str:
        if metric in found:
            return (
                f"the metric {metric!r} is logged in validation on some ranks only. Log it on all, with sync_dist=True."
            )
        text = not_logged(metric, found)
        if metric in _names(trainer.fit_loop.epoch_loop):
            text += f" Training logs {metric!r}, but that says nothing of data that was held out."
        elif metric in trainer.callback_metrics:
            text += f" A callback reports {metric!r}, but callbacks are not at work while candidates are judged."
        if not found:
            return text
        named = f"{self.owner}(monitor={found[0]!r})"
        return f"{text} Name one of these, as in {named}, or log {metric!r} in validation_step."


def _names(loop: object) -> list[str]:
    """The metrics of a whole pass that were logged in a loop since it began, by their names in callback_metrics."""
    results = loop._results  # type: ignore[attr-defined]  # the Trainer's own dictionaries mix those of all loops
    fresh = [result for result in results.values() if result.meta.on_epoch and not result.has_reset]
    fresh = [result for result in fresh if result.meta.fx != "on_validation_start"]  # callbacks, of the sparsity
    return sorted({name for result in fresh for name in results._forked_name(result, on_step=False)})


def check_loss(recipe: Recipe, module: LightningModule, outputs: Any) -> None:
    """Refuse a recipe that learns from a loss where ``validation_step`` returned none.

    Raises:
        UnsupportedSetup: It is so.
    """
    if recipe.needs_loss and loss_of(outputs) is None:
        kind = type(module).__name__
        raise UnsupportedSetup(
            f"{type(recipe).__name__} learns from the loss that validation_step returns, but that of {kind} "
            f"returned {type(outputs).__name__}. Let it return the loss, or use UniformSoup or GreedySoup."
        )
