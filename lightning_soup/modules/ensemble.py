"""AwareNet: families of networks whose predictions are averaged with learnable weights (AWARE-NET)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.detection import detection_metrics
from lightning_soup.evaluation.family_predictions import FamilyPredictions
from lightning_soup.evaluation.mixture import (
    check_min_alpha,
    entropy,
    log_alpha,
    mix,
    stack_families,
    weights_optimizer,
)
from lightning_soup.modules.classification import Batch, ClassificationModule, in_a_loop
from lightning_soup.modules.ensemble_checks import (
    check_fit,
    check_kept,
    check_labels,
    check_positive,
    check_trained,
    note_normalization,
)
from lightning_soup.modules.families import Family, as_families, build_family, label_orders, trained_statistics
from lightning_soup.modules.held_out import HeldOut, recalibrate_soups
from lightning_soup.modules.optimization import check_ranges, parameter_groups
from lightning_soup.runs.figures_ensemble import draw_weights, told_weights

__all__ = ["AwareNet"]

_STATE = "aware_net"


class AwareNet(ClassificationModule):
    """An ensemble of families: p = Σ_k α_k p_k, with p_k the mean probability of family k and α = softmax(w) learned.

    The outputs are **log-probabilities**, mixed in logs and in float32: their loss is ``nll_loss``.

    Two ways to train it. With ``freeze_members`` (default) only w is learned, from held-out data: each member predicts
    the validation images once, before the first step, and one step of L-BFGS ends at the best w; the fit then stops.
    The members must be trained already, on other data. ``val_*`` of such a fit are of the images that w was learned
    on; the test images give the honest figures. Without, all members and w are trained together, as in the paper, w
    with a rate of its own and without weight decay.

    Logs what :class:`.ClassificationModule` does, ``<stage>_auc``, ``_f1``, ``_precision`` and ``_recall`` of each set,
    and ``alpha/<family>`` and ``alpha_entropy``. At the end of a fit ``family_weights.png`` is drawn in the run's
    folder.

    Source: Salman et al., AWARE-NET, ICEPECC 2025 (arXiv 2505.00312). Where the authors' code differs: it holds one
    member a family, applies a softmax to probabilities a second time, and learns w on the members' training data.

    Args:
        families: Names of timm models, :class:`.Family`, modules, or lists of modules.
        members_per_family: Members of a family that does not say itself.
        num_classes: Number of classes.
        freeze_members: Learn w alone, on held-out data, or train the members too.
        tier1: Inside a family: ``prob``, the mean of its members' probabilities, or ``soup``, one network with the mean
            of their weights (:class:`.UniformSoup`, which refuses members that did not start alike), at the cost of
            one. Where BatchNorm was trained its statistics are estimated anew, on training images, before a fit.
        min_alpha: No family gets less: α = min_alpha + (1 − K · min_alpha) softmax(w).
        one_logit: Members with one logit, for class 1 of two, as in the paper.
        in_chans: Colour channels of the images.
        positive: Of two classes the one that is detected (F1, precision, recall), by name or number.
        class_names: Names of the classes in the order of the outputs; by default those of the data.
        data_mean: Mean that images are normalised with, for families with a normalisation of their own, where the data
            module does not say it.
        data_std: Deviation likewise.
        learn_on: The loader whose images are held out: ``val``, or ``train`` where the members were trained elsewhere.
        lr: Highest learning rate of the members.
        lr_w: That of w; 10 × ``lr`` by default.
        weight_decay: Of the members' matrices.
        betas: Of AdamW.
        warmup: Steps of linear warm-up: a whole number, or a fraction of the training.
        label_smoothing: Share of the target spread over all classes, in training members.
        mixup: α of mixup, in training members. 0: none.

    Raises:
        UnsupportedSetup: A family cannot be built, a checkpoint does not fit it, a value is out of range; before
            training: frozen members with random weights, orders of classes that disagree, nothing held out.
        UnreadableCheckpoint: A checkpoint cannot be opened.
        NonFiniteWeights: Before training: a member predicts NaN.
    """

    def __init__(
        self,
        families: list[str | Family | nn.Module | list[nn.Module]],
        members_per_family: int = 3,
        num_classes: int = 2,
        freeze_members: bool = True,
        tier1: Literal["prob", "soup"] = "prob",
        min_alpha: float = 0.0,
        one_logit: bool = False,
        in_chans: int = 3,
        positive: int | str = 1,
        class_names: list[str] | None = None,
        data_mean: list[float] | None = None,
        data_std: list[float] | None = None,
        learn_on: Literal["val", "train"] = "val",
        lr: float = 3e-4,
        lr_w: float | None = None,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int | float = 0.1,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
    ):
        super().__init__()
        known = as_families(families)
        counts = [family.count(members_per_family) for family in known]
        check_ranges(lr, weight_decay, betas, warmup, label_smoothing, mixup)
        check_min_alpha(min_alpha, len(known))
        _check_values(members_per_family, num_classes, one_logit, tier1, learn_on, lr_w)
        self.save_hyperparameters(ignore=["families"])
        self.save_hyperparameters(
            {"families": [family.plain(members=n) for family, n in zip(known, counts, strict=True)]}
        )
        self.family_names = [family.title for family in known]
        outputs = 1 if one_logit else num_classes
        built = [build_family(f, n, outputs, in_chans, tier1 == "soup") for f, n in zip(known, counts, strict=True)]
        self.members = nn.ModuleList(networks for networks, _ in built)
        self.inputs = nn.ModuleList(given for _, given in built)
        self.w = nn.Parameter(torch.zeros(len(known)))  # all families the same
        self._orders = {path: names for family in known for path, names in label_orders(family).items()}
        self._untrained = [f.title for f in known if not (f.checkpoints or f.modules)]
        # Layers of soups whose statistics are those of no network yet.
        self._stale = [
            f"members.{k}.0.{layer}"
            for k, family in enumerate(known if tier1 == "soup" else [])
            for layer in trained_statistics(family, self.members[k][0])
        ]
        self.measures = nn.ModuleDict({"val": nn.ModuleList(), "test": nn.ModuleList()})
        self.history: list[list[float]] = []  # α after each epoch
        self._held_out: HeldOut | None = None
        if freeze_members:
            self.members.requires_grad_(False)  # before optimizers and DDP look
        self.train()  # modules may come in evaluation mode, in which Lightning would leave them
        # A checkpoint holds the members' weights itself: restoring it must neither read other files nor download.
        kept = [
            f.plain(members=len(n), checkpoints=None, pretrained=False)
            for f, n in zip(known, self.members, strict=True)
        ]
        self.hparams.update(families=kept, tier1="prob")

    # ---------------------------------------------------------------------------------------------------- predictions

    def member_logits(self, batch: Batch | Tensor) -> list[list[Tensor]]:
        """Logits ``[B, C]`` of each member of each family, for images ``[B, C, H, W]`` or a batch of them."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        data = self.hparams.data_mean, self.hparams.data_std
        found = []
        for transform, members in zip(self.inputs, self.members, strict=True):
            seen = transform(images, *data)
            found.append([member(seen) for member in members])
        return found

    def family_log_probabilities(self, images: Tensor) -> Tensor:
        """Log p_k of every family, ``[B, K, C]``."""
        return stack_families(self.member_logits(images), self.family_names)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities ``[B, C]`` of images ``[B, C, H, W]``."""
        return mix(self.family_log_probabilities(images), self.log_alpha)

    @property
    def log_alpha(self) -> Tensor:
        """Log α_k, ``[K]``."""
        return log_alpha(self.w, self.hparams.min_alpha)

    @property
    def alpha(self) -> dict[str, float]:
        """The weight of each family."""
        return dict(zip(self.family_names, self.log_alpha.detach().exp().tolist(), strict=True))

    def train(self, mode: bool = True) -> "AwareNet":
        """Set the mode; frozen members stay in evaluation mode, so that BatchNorm does not drift."""
        super().train(mode)
        if self.hparams.get("freeze_members", False):
            self.members.eval()
        return self

    # ------------------------------------------------------------------------------------------------------- training

    def trained_part(self) -> nn.Module:
        """The members."""
        return self.members

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of each member, and w with a rate of its own and without weight decay."""
        lr, decay = self.hparams.lr, self.hparams.weight_decay
        every = [member for members in self.members for member in members]
        groups = [group for member in every for group in parameter_groups(member, lr, decay, None)]
        taken: set[nn.Parameter] = set()
        for group in groups:  # members may share layers
            group["params"] = [parameter for parameter in group["params"] if parameter not in taken]
            taken.update(group["params"])
        lr_w = 10 * lr if self.hparams.lr_w is None else self.hparams.lr_w
        return [*groups, {"params": [self.w], "lr": lr_w, "weight_decay": 0.0}]

    def configure_optimizers(self) -> Any:
        """AdamW for all; for w alone L-BFGS, whose one step ends at the optimum."""
        return weights_optimizer([self.w]) if self.hparams.freeze_members else super().configure_optimizers()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clip as the Trainer says; of w alone nothing, as its step searches along the true gradient."""
        if not self.hparams.freeze_members:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def training_loss(self, batch: Batch | FamilyPredictions) -> Tensor:
        """Mean negative log-likelihood of the ensemble."""
        if isinstance(batch, FamilyPredictions):
            return self._train_loss(mix(batch.log_p, self.log_alpha), batch.targets)
        return super().training_loss(batch)

    def _train_loss(self, log_p: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if self.hparams.freeze_members else self.hparams.label_smoothing
        loss = F.nll_loss(log_p, targets)
        return loss if not smoothing else torch.lerp(loss, -log_p.mean(), smoothing)

    # ----------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, stage: Literal["val", "test"], batch: Batch | FamilyPredictions, index: int) -> Tensor:
        if isinstance(batch, FamilyPredictions):
            return self._score(stage, mix(batch.log_p, self.log_alpha), batch.targets, index)
        return super()._evaluate(stage, batch, index)

    def _score(self, stage: Literal["val", "test"], logits: Tensor, targets: Tensor, index: int) -> Tensor:
        loss = super()._score(stage, logits, targets, index)
        if in_a_loop(self) and self._competing(stage, index) is None:
            measures = self._measures(stage, index, logits.shape[1])
            measures.update(logits.float().exp(), targets)
            suffix = "" if index == 0 else f"/{self._set_name(stage, index)}"
            for name, metric in measures.items():
                self.log(
                    f"{stage}_{name}{suffix}",
                    metric,
                    on_step=False,
                    on_epoch=True,
                    add_dataloader_idx=False,
                    metric_attribute=f"measures.{stage}.{index}.{name}",
                )
        return loss

    def _measures(self, stage: str, index: int, classes: int) -> MetricCollection:
        known = self.measures[stage]
        while len(known) <= index:
            known.append(detection_metrics(classes, self._positive).to(self.device))
        return known[index]

    @property
    def _positive(self) -> int:
        positive = self.hparams.positive
        return positive if isinstance(positive, int) else self.hparams.class_names.index(positive)

    def _reset(self, stage: str) -> None:
        super()._reset(stage)
        for metrics in self.measures[stage]:
            metrics.reset()

    # ---------------------------------------------------------------------------------------------------------- hooks

    def setup(self, stage: str) -> None:
        """Refuse what cannot work before any training."""
        self.check_data(self.trainer.datamodule)
        check_positive(self)
        if stage == "fit":
            check_fit(self, self.trainer)

    def check_data(self, datamodule: LightningDataModule | None) -> None:
        """Note how a data module normalises images and what it calls the classes.

        Raises:
            UnsupportedSetup: It does not say, or numbers the classes differently.
        """
        note_normalization(self, datamodule)
        check_labels(self, datamodule, self._orders)

    def on_fit_start(self) -> None:
        """Estimate the statistics of soups anew, and let frozen members predict the held-out images, once."""
        check_trained(self, self._untrained)  # a checkpoint is restored by now
        if self._stale:
            recalibrate_soups(self, self.trainer, self._stale)
            self._stale = []
        if self.hparams.freeze_members:
            self._held_out = HeldOut.of(self, self.trainer)
            self.members.train()  # Lightning warns of modules in evaluation mode, which is meant here
        self.history = self.history or [list(self.alpha.values())]

    def on_train_start(self) -> None:
        """Frozen members are evaluated only."""
        self.train()

    def on_train_epoch_end(self) -> None:
        """Log α; where only w is learned, stop once it does not change any more."""
        alpha = self.alpha
        values = {f"alpha/{name}": value for name, value in alpha.items()}
        self.log_dict({**values, "alpha_entropy": entropy(self.log_alpha.detach())}, sync_dist=True)
        before = self.history[-1] if self.history else []
        self.history.append(list(alpha.values()))
        exact = any(isinstance(used, torch.optim.LBFGS) for used in self.trainer.optimizers)  # others take small steps
        if (
            self.hparams.freeze_members
            and exact
            and all(abs(a - b) < 1e-4 for a, b in zip(alpha.values(), before, strict=False))
        ):
            self.trainer.should_stop = True

    def on_fit_end(self) -> None:
        """Draw the weights of the families."""
        if self._held_out is not None:
            self._held_out.put_back()
            self._held_out = None
        if not self.trainer.fast_dev_run:
            path = draw_weights(self.history, self.family_names, self.trainer, "family_weights")
            rank_zero_info(told_weights("AwareNet", self.alpha, path))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the weights belong to: names and sizes of the families, and the order of the classes."""
        super().on_save_checkpoint(checkpoint)
        sizes = [len(members) for members in self.members]
        checkpoint[_STATE] = {"families": self.family_names, "sizes": sizes, "history": self.history}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the file of another ensemble; its members need no further files.

        Raises:
            UnsupportedSetup: Its families or classes are others.
        """
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get(_STATE, {})
        check_kept(self, kept, checkpoint)
        self.history = [list(row) for row in kept.get("history", [])]
        self._untrained, self._stale = [], []


def _check_values(members: int, classes: int, one_logit: bool, tier1: str, learn_on: str, lr_w: float | None) -> None:
    expectations = (
        (members >= 1, f"members_per_family={members}: expected 1 or more."),
        (classes >= 2, f"num_classes={classes}: expected 2 or more (for members with one logit, one_logit=True)."),
        (not one_logit or classes == 2, f"one_logit=True is for two classes, but num_classes={classes}."),
        (tier1 in ("prob", "soup"), f"tier1={tier1!r}: expected 'prob' or 'soup'."),
        (learn_on in ("val", "train"), f"learn_on={learn_on!r}: expected 'val' or 'train'."),
        (lr_w is None or lr_w > 0, f"lr_w={lr_w}: expected more than 0."),
    )
    for holds, message in expectations:
        if not holds:
            raise UnsupportedSetup(message)
