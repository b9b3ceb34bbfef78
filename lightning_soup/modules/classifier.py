"""ImageClassifier: fine-tuning any timm model."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.image_sizes import check_patches, timm_at_size
from lightning_soup.evaluation.sized_modules import rehearse
from lightning_soup.modules.classification import Batch, ClassificationModule
from lightning_soup.modules.initial_weights import head_layers, load_initial_weights
from lightning_soup.modules.lora import LoRA, add_lora, config_in
from lightning_soup.modules.optimization import check_ranges
from lightning_soup.modules.regularizers import Regularizer
from lightning_soup.modules.soft_targets import agreed_weights, check_targets
from lightning_soup.modules.timm_models import build_timm_model, drawn_from
from lightning_soup.modules.train_sizes import TrainSizes
from lightning_soup.weights.formats import ADAPTER_KEY

__all__ = ["ImageClassifier"]


class ImageClassifier(ClassificationModule):
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
        train_sizes: Train at several image sizes: each step resizes its batch to one of these sides (bicubic, in
            float32), drawn by the number of the step. ViTs are built with ``dynamic_img_size`` for it, so that their
            position embedding stays on the grid of ``img_size``; CNNs need nothing. The cost of a step grows with the
            square of the side, and that of attention with its fourth power. Validation is at the data's own size.
        token_budget: Most tokens of a step with ``train_sizes``, as a multiple of those of the batch at the data's own
            size: of larger sizes fewer images are taken. 1: no step costs more tokens than one without ``train_sizes``.
        lora: Train low-rank adapters and the head only, by peft: ``{r: 8, alpha: 16, targets: [qkv]}``. ``self.model``
            is then a ``PeftModel``.
        regularizer: What holds the training to an earlier model or a soup: :class:`.ReferenceKL`, :class:`.L2SP`.
        targets: ``soft``: trained on rows of probabilities, such as the labels of :class:`.CrowdDataModule`, by their
            KL divergence. Label smoothing and mixup then apply to them. Validation and test take class numbers and
            rows, by the cross entropy and whether the likeliest class is right.
        class_weights: Weight of each sample by the likeliest class of its soft target, a number per class;
            ``balanced``: the data module's ``class_weights``, so that all classes count alike. None: all samples alike.

    Raises:
        UnsupportedSetup: timm does not know the model or its arguments, a value is out of range, or the checkpoint does
            not fit the model, or ``lora`` does not.
        MissingExtra: ``lora`` is given, and peft is not installed.
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
        train_sizes: list[int] | None = None,
        token_budget: float | None = None,
        lora: LoRA | None = None,
        regularizer: Regularizer | None = None,
        targets: Literal["hard", "soft"] = "hard",
        class_weights: list[float] | Literal["balanced"] | None = None,
    ):
        super().__init__()
        if num_classes < 2:
            raise UnsupportedSetup(f"num_classes={num_classes}: expected 2 or more.")
        if pretrained and checkpoint_path:
            raise UnsupportedSetup(
                f"pretrained=True and checkpoint_path={checkpoint_path!r} both say where to start from: give one."
            )
        check_ranges(lr, weight_decay, betas, warmup, label_smoothing, mixup, layer_decay)
        if lora is not None and layer_decay is not None:
            raise UnsupportedSetup(f"layer_decay={layer_decay} is for training all layers; leave it out beside lora.")
        if token_budget is not None and train_sizes is None:
            raise UnsupportedSetup(f"token_budget={token_budget} is for train_sizes: give them, or leave it out.")
        check_targets(targets, class_weights, num_classes)
        self.class_weights = None if class_weights == "balanced" else class_weights
        self.save_hyperparameters(ignore=["lora", "regularizer"])
        lora = LoRA(**lora) if isinstance(lora, Mapping) else lora  # as a checkpoint holds it
        self.save_hyperparameters({"lora": None if lora is None else lora.plain()})
        self.regularizer = regularizer
        self.train_sizes = None if train_sizes is None else TrainSizes(train_sizes, token_budget)
        # What the starting weights do not bring, the head for new classes, is drawn from a seed of its own: runs that
        # are seeded apart must still start from one point, or their average is of no use.
        fixed = head_seed if pretrained or reset_head else None
        with drawn_from(fixed):
            self.model = build_timm_model(
                model_name,
                pretrained,
                model_args or {},
                many_sizes=train_sizes is not None,
                num_classes=num_classes,
                img_size=img_size,
                in_chans=in_chans,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rate,
            )
        if self.train_sizes is not None:
            self._check_train_sizes()
        if checkpoint_path:
            load_initial_weights(self.model, checkpoint_path, reset_head)
        if lora is not None:
            self.model = add_lora(self.model, lora, head_layers(self.model))
        # Loggers show where training started (they read the initial hyperparameters), but what a checkpoint holds are
        # its own weights: restoring it must neither read the old file again nor download.
        self.hparams.update(pretrained=False, checkpoint_path=None, reset_head=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say also how an adapter is configured, so that it can be taken out of the file."""
        super().on_save_checkpoint(checkpoint)
        if self.hparams.lora is not None:
            checkpoint[ADAPTER_KEY] = config_in(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, C, H, W]``."""
        return self.model(images)

    def model_at_size(self, size: tuple[int, int]) -> nn.Module:
        """``model``, or a copy of it, for images of this height and width; see :func:`.timm_at_size`."""
        return timm_at_size(self.model, size)

    def setup(self, stage: str) -> None:
        """Refuse data with more classes than the head, or other targets, which would fail in the first epoch."""
        classes = getattr(self.trainer.datamodule, "num_classes", None)
        if isinstance(classes, int) and classes > self.hparams.num_classes:
            raise UnsupportedSetup(
                f"The data has {classes} classes, the head of the model {self.hparams.num_classes}. "
                f"Set num_classes={classes}."
            )
        if stage == "fit":
            fewer = isinstance(classes, int) and classes < self.hparams.num_classes
            if fewer and self.hparams.targets == "soft":
                raise UnsupportedSetup(
                    f"The rows of the data have {classes} classes, the head of the model {self.hparams.num_classes}: "
                    f"soft targets need as many. Set num_classes={classes}."
                )
            self.class_weights = agreed_weights(
                self.hparams.targets, self.hparams.class_weights, self.trainer.datamodule
            )
        super().setup(stage)

    def _check_train_sizes(self) -> None:
        """Refuse sizes that the model cannot take, or cannot change between."""
        if hasattr(self.model, "set_input_size") and not getattr(self.model, "dynamic_img_size", False):
            raise UnsupportedSetup(
                f"train_sizes: {self.hparams.model_name} has one image size at a time, which must not change while it "
                "is trained. Take a ViT that can be built with dynamic_img_size=True, or a CNN."
            )
        for size in dict.fromkeys(self.train_sizes.sizes):
            check_patches(self.model, size)
            rehearse(self, size, self.hparams.in_chans)

    def training_loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, with label smoothing and mixup, at the size of the step with ``train_sizes``."""
        if self.train_sizes is not None:
            batch = self.train_sizes(batch, 0 if self._trainer is None else self.trainer.global_step)
        return super().training_loss(batch)

    def trained_part(self) -> nn.Module:
        """The timm model, which names the parameters without decay and the order of its layers."""
        return self.model
