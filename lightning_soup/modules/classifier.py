"""ImageClassifier: fine-tuning any timm model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_soup.data.transforms import check_model_name
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.initial_weights import load_initial_weights
from lightning_soup.modules.optimization import parameter_groups, warmup_cosine, warmup_steps

__all__ = ["ImageClassifier"]

Batch = tuple[Tensor, Tensor]


class ImageClassifier(LightningModule):
    """Any image model of timm, trained with AdamW, linear warm-up and cosine decay.

    Logs ``train_loss``, ``val_loss``, ``val_acc``, ``test_loss`` and ``test_acc``; further test sets as
    ``test_acc/<name>``, with the names from the data module's ``test_names``. The timm model is ``self.model``.

    Checkpoints hold plain values only, and do not refer to the weights that training started from:
    ``ImageClassifier.load_from_checkpoint(path)`` needs nothing but its file.

    Args:
        model_name: A timm model, with a pre-trained tag if wanted, for example ``vit_base_patch16_224.augreg_in21k``.
        num_classes: Classes of the head.
        pretrained: Start from timm's own weights (downloaded once).
        checkpoint_path: Start from the weights of a checkpoint: Lightning, safetensors, raw timm, a soup.
        reset_head: Start the head anew where ``checkpoint_path`` has other classes.
        head_seed: Seed of a head that is new (``pretrained`` with other classes, ``reset_head``), whatever the seed of
            the run, so that all ingredients of a soup start alike. Training from nothing follows the run's own seed.
        img_size: Side of the images, where it is not the model's own.
        in_chans: Colour channels of the images.
        drop_rate: Dropout before the head; None: the model's own default.
        drop_path_rate: Stochastic depth; None: the model's own default.
        model_args: More arguments of the timm model, for example ``{embed_dim: 64, depth: 4, num_heads: 4}``.
        lr: Highest learning rate. For fine-tuning a pre-trained ViT 1e-5 to 1e-4; soups want ingredients of like
            quality, so vary it by no more than a factor of 3.
        weight_decay: Of matrices only; biases, norms and position embeddings have none.
        betas: Of AdamW.
        warmup: Steps of linear warm-up: a whole number, or a fraction of the training.
        layer_decay: Each layer learns this factor slower than the one above it (0.65 to 0.9 for ViTs). None: all alike.
        label_smoothing: Share of the target spread over all classes, in training only.
        mixup: α of mixup (Zhang et al. 2018): pairs of images are blended with λ ~ Beta(α, α). 0: none.

    Raises:
        UnsupportedSetup: timm does not know the model or its arguments, a value is out of range, or the checkpoint does
            not fit the model.
        UnreadableCheckpoint: ``checkpoint_path`` cannot be opened.
    """

    def __init__(
        self,
        model_name: str = "vit_base_patch16_224",
        num_classes: int = 10,
        pretrained: bool = False,
        checkpoint_path: str | None = None,
        reset_head: bool = False,
        head_seed: int = 0,
        img_size: int | None = None,
        in_chans: int = 3,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        model_args: dict[str, Any] | None = None,
        lr: float = 3e-5,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int | float = 0.1,
        layer_decay: float | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
    ):
        super().__init__()
        if num_classes < 2:
            raise UnsupportedSetup(f"num_classes={num_classes}: expected 2 or more.")
        if pretrained and checkpoint_path:
            raise UnsupportedSetup(
                f"pretrained=True and checkpoint_path={checkpoint_path!r} both say where to start from: give one."
            )
        _check_ranges(lr, weight_decay, betas, warmup, layer_decay, label_smoothing, mixup)
        self.save_hyperparameters()
        # What the starting weights do not bring, the head for new classes, is drawn from a seed of its own: runs that
        # are seeded apart must still start from one point, or their average is of no use.
        fixed = head_seed if pretrained or reset_head else None
        with _drawn_from(fixed):
            self.model = _build(
                model_name,
                pretrained,
                model_args or {},
                num_classes=num_classes,
                img_size=img_size,
                in_chans=in_chans,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
            )
        if checkpoint_path:
            load_initial_weights(self.model, checkpoint_path, reset_head)
        # Loggers show where training started (they read the initial hyperparameters), but what a checkpoint holds are
        # its own weights: restoring it must neither read the old file again nor download.
        self.hparams.update(pretrained=False, checkpoint_path=None, reset_head=False)
        self.accuracies = nn.ModuleDict({"val": nn.ModuleList(), "test": nn.ModuleList()})

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, C, H, W]``."""
        return self.model(images)

    def setup(self, stage: str) -> None:
        """Refuse data with more classes than the head, which would fail in the middle of the first epoch."""
        classes = getattr(self.trainer.datamodule, "num_classes", None)
        if isinstance(classes, int) and classes > self.hparams.num_classes:
            raise UnsupportedSetup(
                f"The data has {classes} classes, the head of the model {self.hparams.num_classes}. "
                f"Set num_classes={classes}."
            )

    # ------------------------------------------------------------------------------------------------------- training

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine, stepped with the optimizer."""
        hparams = self.hparams
        groups = parameter_groups(self.model, hparams.lr, hparams.weight_decay, hparams.layer_decay)
        # The fused step takes 0.4 ms instead of 2.3 ms for a tiny ViT on a CPU. In mixed precision Lightning refuses
        # to clip gradients before it.
        refused = "mixed" in str(self.trainer.precision) and self.trainer.gradient_clip_val
        fused = self.device.type in ("cpu", "cuda") and not refused
        optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=hparams.betas, fused=fused)
        total = self.trainer.estimated_stepping_batches
        total = float("inf") if total < 0 else total  # how Lightning says endless where the data has no length
        warmup = warmup_steps(hparams.warmup, total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy, with label smoothing and mixup."""
        images, targets = batch
        alpha = self.hparams.mixup
        if alpha > 0:
            blend = torch.distributions.Beta(alpha, alpha).sample().to(images)
            partner = torch.randperm(len(images), device=images.device)
            logits = self(torch.lerp(images[partner], images, blend))
            loss = torch.lerp(self._train_loss(logits, targets[partner]), self._train_loss(logits, targets), blend)
        else:
            loss = self._train_loss(self(images), targets)
        if self._logs():
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def _train_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
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
        logits = self(images)
        loss = F.cross_entropy(logits.float(), targets)
        if not self._logs():
            return loss
        suffix = "" if index == 0 else f"/{self._set_name(stage, index)}"
        accuracy = self._accuracy(stage, index)
        accuracy.update(logits, targets)
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

    def _logs(self) -> bool:
        """Whether there is a Trainer to log to; asking Lightning to log without one would warn in every step."""
        try:
            return not self.trainer.barebones
        except RuntimeError:  # not attached to a Trainer
            return False

    def _set_name(self, stage: str, index: int) -> str:
        names = getattr(self.trainer.datamodule, f"{stage}_names", ())
        return names[index] if index < len(names) else str(index)

    def _accuracy(self, stage: str, index: int) -> MulticlassAccuracy:
        metrics = self.accuracies[stage]
        while len(metrics) <= index:  # how many sets there are is known only now
            metrics.append(MulticlassAccuracy(self.hparams.num_classes, average="micro").to(self.device))
        return metrics[index]

    def _reset(self, stage: str) -> None:
        for metric in self.accuracies[stage]:
            metric.reset()


@contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """Draw random numbers from a seed, and leave the run's own stream as it was; None: from the run's own."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _build(model_name: str, pretrained: bool, model_args: dict[str, Any], **arguments: int | float | None) -> nn.Module:
    if ":" not in model_name:  # hf-hub:… and local-dir:… are resolved by timm
        check_model_name(model_name)
    given = {**model_args, **{name: value for name, value in arguments.items() if value is not None}}
    try:
        return timm.create_model(model_name, pretrained=pretrained, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise UnsupportedSetup(
            f"timm could not build {model_name} (pretrained={pretrained}) with {given}: "
            f"{str(error).rstrip('.')}. Check img_size, in_chans, drop_path_rate and model_args: not every model takes "
            "each of them."
        ) from error


def _check_ranges(
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    warmup: int | float,
    layer_decay: float | None,
    label_smoothing: float,
    mixup: float,
) -> None:
    expectations = (
        (lr > 0, f"lr={lr}: expected more than 0."),
        (weight_decay >= 0, f"weight_decay={weight_decay}: expected 0 or more."),
        (all(0 <= beta < 1 for beta in betas), f"betas={betas}: expected two numbers in [0, 1)."),
        (
            warmup >= 0 and (isinstance(warmup, int) or warmup < 1),
            f"warmup={warmup}: expected a number of steps (500), or a fraction of the training below 1 (0.1).",
        ),
        (layer_decay is None or 0 < layer_decay <= 1, f"layer_decay={layer_decay}: expected a number in (0, 1]."),
        (0 <= label_smoothing < 1, f"label_smoothing={label_smoothing}: expected a number in [0, 1)."),
        (mixup >= 0, f"mixup={mixup}: expected 0 or more."),
    )
    for holds, message in expectations:
        if not holds:
            raise UnsupportedSetup(message)
