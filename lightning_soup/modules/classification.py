"""What the classifiers have in common: steps, losses, accuracies by name, AdamW with warm-up and cosine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.robustness import Classes, check_classes, project, project_targets
from lightning_soup.layers.moe import RandomUniformMoE
from lightning_soup.modules.optimization import adamw_with_cosine, parameter_groups
from lightning_soup.modules.regularizers import Regularizer
from lightning_soup.modules.soft_targets import are_soft, soft_target_kl
from lightning_soup.weights.formats import CLASS_NAMES_KEY, EXPERTS_KEY

__all__ = ["Batch", "ClassificationModule", "in_a_loop"]

Batch = tuple[Tensor, Tensor]
_REGULARIZER = "regularizer"  # where checkpoints keep what the training was held to


class ClassificationModule(LightningModule, ABC):
    """Base of the classifiers: a subclass says what its logits are.

    Logs ``train_loss``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc``; further test sets as
    ``test_acc/<name>``, with the names from the data module's ``test_names``, among the classes that its
    ``test_classes`` let compete there.

    A subclass calls :func:`check_ranges` and ``save_hyperparameters`` in its ``__init__``; among its hyperparameters
    are ``lr``, ``weight_decay``, ``betas``, ``warmup``, ``label_smoothing``, ``mixup`` and, if it has them,
    ``layer_decay`` and ``targets``. It implements ``forward``, from images ``[B, C, H, W]`` to logits ``[B, classes]``,
    and :meth:`trained_part`.
    """

    class_weights: Sequence[float] | None = None  # of soft targets

    def __init__(self) -> None:
        super().__init__()
        self.regularizer: Regularizer | None = None
        self.accuracies = nn.ModuleDict({"val": nn.ModuleList(), "test": nn.ModuleList()})

    @abstractmethod
    def trained_part(self) -> nn.Module:
        """The module whose parameters are optimized; it may name those without decay (``no_weight_decay()``)."""

    def setup(self, stage: str) -> None:
        """Build what the regularizer holds the training to."""
        if stage == "fit" and self.regularizer is not None:
            self.regularizer.prepare(self)

    def on_fit_start(self) -> None:
        """Bring it to where the module is by now."""
        if self.regularizer is not None:
            self.regularizer.place(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which class each output is, where the data has names, so that nothing is combined in another order.

        Say, too, what a regularizer holds the training to.
        """
        if self.regularizer is not None and self.regularizer.digest:
            checkpoint[_REGULARIZER] = {"name": self.regularizer.name, "digest": self.regularizer.digest}
        names = getattr(self.trainer.datamodule, CLASS_NAMES_KEY, None) if self._trainer is not None else None
        if names is not None:
            checkpoint[CLASS_NAMES_KEY] = [str(name) for name in names]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the plain model, also of a file with experts (:class:`.ExpertsWeightAveraging`).

        Raises:
            UnsupportedSetup: A training is resumed from such a file without the callback, or held to something else.
        """
        fitting = self._trainer is not None and self._trainer.state.fn == "fit"
        held = checkpoint.get(_REGULARIZER)
        if fitting and held is not None and self.regularizer is not None:
            self.regularizer.recall(held["digest"])
        own = self.regularizer and {"name": self.regularizer.name, "digest": self.regularizer.digest}
        if fitting and held != own:
            raise UnsupportedSetup(
                f"The checkpoint was trained with the regularizer {held or 'None'}, and now there is {own or 'None'}. "
                "To resume give the same one, over the same checkpoints; for another one begin a training from the "
                "checkpoint's weights, with checkpoint_path."
            )
        if fitting and EXPERTS_KEY in checkpoint and not any(isinstance(p, RandomUniformMoE) for p in self.modules()):
            raise UnsupportedSetup(
                "The checkpoint is of a training with ExpertsWeightAveraging. Add the callback to the Trainer, with "
                "the same options, to resume; or begin a training from its plain model, with checkpoint_path."
            )

    # ------------------------------------------------------------------------------------------------------- training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine, stepped with the optimizer."""
        return adamw_with_cosine(self, self.parameter_groups())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer; see :func:`.parameter_groups`."""
        hparams = self.hparams
        return parameter_groups(self.trained_part(), hparams.lr, hparams.weight_decay, hparams.get("layer_decay", None))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The training loss, logged."""
        loss = self.training_loss(batch)
        if in_a_loop(self):
            self.log("train_loss", loss, prog_bar=True)
            if self.regularizer is not None:
                self.log(f"train_{self.regularizer.name}", self._figure)
        return loss

    def training_loss(self, batch: Batch) -> Tensor:
        """Cross entropy or the divergence from soft targets, with label smoothing, mixup and the regularizer's part."""
        images, targets = batch
        alpha = self.hparams.mixup
        if alpha == 0:
            logits = self(images)
            return self._regularized(self._train_loss(logits, targets), images, logits)
        blend = torch.distributions.Beta(alpha, alpha).sample().to(images)
        partner = torch.randperm(len(images), device=images.device)
        images = torch.lerp(images[partner], images, blend)
        logits = self(images)
        loss = torch.lerp(self._train_loss(logits, targets[partner]), self._train_loss(logits, targets), blend)
        return self._regularized(loss, images, logits)

    def _regularized(self, loss: Tensor, images: Tensor, logits: Tensor) -> Tensor:
        if self.regularizer is None:
            return loss
        penalty, self._figure = self.regularizer(self, images, logits)
        return loss + penalty

    def _train_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.hparams.get("targets") == "soft":
            return soft_target_kl(logits, targets, self.hparams.label_smoothing, self.class_weights)
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.hparams.label_smoothing)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        """Count from zero, even after a validation that was broken off."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Count from zero, even after a test that was broken off."""
        self._reset("test")

    def validation_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Plain cross entropy; without a Trainer nothing is logged, and the loss can be differentiated."""
        return self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Plain cross entropy."""
        return self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int = 0, dataloader_idx: int = 0) -> Tensor:
        """Logits of a batch of images, with or without targets."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def _evaluate(self, stage: Literal["val", "test"], batch: Batch, index: int) -> Tensor:
        images, targets = batch
        return self._score(stage, self(images), targets, index)

    def _score(self, stage: Literal["val", "test"], logits: Tensor, targets: Tensor, index: int) -> Tensor:
        logs = in_a_loop(self)
        classes = self._competing(stage, index) if logs else None
        if classes is not None:
            check_classes(classes, logits.shape[1])
            logits, targets = project(logits, classes), project_targets(targets, classes)
        soft = are_soft(targets)
        loss = F.cross_entropy(logits.float(), targets.float() if soft else targets)
        if not logs:
            return loss
        suffix = "" if index == 0 else f"/{self._set_name(stage, index)}"
        accuracy = self._accuracy(stage, index, logits.shape[1])
        accuracy.update(logits, targets.argmax(dim=1) if soft else targets)
        # The names are unique already, so Lightning need not append the loader's number.
        shared: dict[str, Any] = {"on_step": False, "on_epoch": True, "add_dataloader_idx": False}
        self.log(f"{stage}_loss{suffix}", loss, batch_size=len(targets), sync_dist=True, **shared)
        self.log(
            f"{stage}_acc{suffix}",
            accuracy,
            prog_bar=stage == "val",
            batch_size=len(targets),
            metric_attribute=f"accuracies.{stage}.{index}",
            **shared,
        )
        return loss

    def _set_name(self, stage: str, index: int) -> str:
        names = getattr(self.trainer.datamodule, f"{stage}_names", ())
        return names[index] if index < len(names) else str(index)

    def _competing(self, stage: str, index: int) -> Classes | None:
        known = getattr(self.trainer.datamodule, f"{stage}_classes", {})
        return known.get(self._set_name(stage, index))

    def _accuracy(self, stage: str, index: int, classes: int) -> MulticlassAccuracy:
        metrics = self.accuracies[stage]
        while len(metrics) <= index:  # how many sets there are, and of how many classes, is known only now
            metrics.append(self._new_accuracy(classes))
        if metrics[index].num_classes != classes:  # other data than in the last run
            metrics[index] = self._new_accuracy(classes)
        return metrics[index]

    def _new_accuracy(self, classes: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(classes, average="micro").to(self.device)

    def _reset(self, stage: str) -> None:
        for metric in self.accuracies[stage]:
            metric.reset()


def in_a_loop(module: LightningModule) -> bool:
    """Whether a Trainer's loop is there to log to; asking Lightning to log without one would warn in every step."""
    try:
        return not module.trainer.barebones and module.trainer._results is not None
    except RuntimeError:  # not attached to a Trainer
        return False
