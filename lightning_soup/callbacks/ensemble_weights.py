"""Learnable weights over the families of predictions that any module gives (AWARE-NET's second tier)."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.utils.data import DistributedSampler

from lightning_soup.callbacks.strategies import check_strategy
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.family_predictions import (
    FamilyPredictions,
    gathered,
    held_out_predictions,
    joined,
    predicted,
)
from lightning_soup.evaluation.mixture import check_min_alpha, entropy, learn_weights, log_alpha, mix, stack_families
from lightning_soup.evaluation.own_loops import OwnLoops
from lightning_soup.progress import rich_progress, silent
from lightning_soup.runs.figures_ensemble import draw_weights, told_weights

__all__ = ["LearnableEnsembleWeights"]


class LearnableEnsembleWeights(Callback):
    """Learn how to weigh the families of predictions of a module, on its validation data.

    The module says what the families are: ``member_logits(batch)`` returns, for each family, a list of its members'
    logits, each ``[B, C]`` (or ``[B, 1]``, one logit of class 1 of two), and ``family_names`` names them. Batches are
    pairs ``(inputs, targets)``. Inside a family probabilities are averaged; α = softmax(w) is what minimises the mean
    negative log-likelihood of Σ_k α_k p_k on the validation data, found exactly. The module and its training are not
    touched; every test then also gives the ensemble's figures: ``test_ensemble_loss``, ``test_ensemble_acc`` and, with
    all families alike, ``test_uniform_loss``.

    Logs ``ensemble_alpha/<family>``, ``ensemble_alpha_entropy``, and ``ensemble_loss`` and ``uniform_loss`` on the data
    that w was learned on; draws ``ensemble_weights.png`` in the run's folder. α is kept in checkpoints.

    Works on one device and under DDP, where ranks predict their shares and learn from all of them.

    Source: Salman et al., AWARE-NET (arXiv 2505.00312), whose code learns w on the members' training data, which
    rewards the most overfitted family; here it is learned on held-out data.

    Args:
        when: ``fit_end``: once, in one pass when the fit ends; or ``validation``: after every validation of the fit,
            from its batches, at the cost of predicting them a second time. ``trainer.validate`` learns nothing.
        min_alpha: No family gets less: α = min_alpha + (1 − K · min_alpha) softmax(w).

    Attributes:
        w: Free parameters, ``[K]``, once they are learned.
        names: Names of the families.

    Raises:
        UnsupportedSetup: Before training: the module does not say its families or learns such weights itself, there is
            no validation data, ``min_alpha`` is not below 1/K, or the strategy shards parameters. Later: members of
            other shapes, or batches that are no pairs of inputs and classes.
        NonFiniteWeights: A family predicts NaN.
    """

    def __init__(self, when: Literal["fit_end", "validation"] = "fit_end", min_alpha: float = 0.0) -> None:
        if when not in ("fit_end", "validation"):
            raise UnsupportedSetup(f"LearnableEnsembleWeights(when={when!r}): expected 'fit_end' or 'validation'.")
        self.when, self.min_alpha = when, min_alpha
        self.w: Tensor | None = None
        self.names: list[str] = []
        self._history: list[list[float]] = []
        self._parts: list[FamilyPredictions] = []

    @property
    def alpha(self) -> dict[str, float]:
        """The weight of each family; empty before it is learned."""
        return {} if self.w is None else dict(zip(self.names, self.log_alpha.exp().tolist(), strict=True))

    @property
    def log_alpha(self) -> Tensor:
        """The logs of α, ``[K]``, float64."""
        return log_alpha(self.w, self.min_alpha)

    def log_probabilities(self, pl_module: LightningModule, batch: Any) -> Tensor:
        """Log-probabilities ``[B, C]`` of the ensemble for a batch.

        Raises:
            UnsupportedSetup: The weights are not learned yet.
        """
        if self.w is None:
            raise UnsupportedSetup(
                "LearnableEnsembleWeights: the weights are not learned yet. Fit, or load a checkpoint."
            )
        log_p = stack_families(pl_module.member_logits(batch), self.names)
        return mix(log_p, self.log_alpha.to(log_p))

    # ---------------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before any training."""
        name = type(self).__name__
        names = list(getattr(pl_module, "family_names", []))
        if not callable(getattr(pl_module, "member_logits", None)) or not names:
            raise UnsupportedSetup(
                f"{name} needs a module with member_logits(batch), logits [batch, classes] by family and member, and "
                f"family_names; {type(pl_module).__name__} lacks them. AwareNet has both."
            )
        if len(set(names)) < len(names):
            raise UnsupportedSetup(f"{name}: two families of one name: {', '.join(names)}. Change family_names.")
        if self.names and self.names != names:
            raise UnsupportedSetup(
                f"{name}: its weights are of the families {', '.join(self.names)}, but {type(pl_module).__name__} has "
                f"{', '.join(names)}."
            )
        self.names = names
        check_min_alpha(self.min_alpha, len(names))
        if stage == "fit":
            from lightning_soup.modules.ensemble import AwareNet  # imports timm

            if isinstance(pl_module, AwareNet) and pl_module.hparams.freeze_members:
                raise UnsupportedSetup(
                    f"{name} beside AwareNet(freeze_members=True), which learns these weights itself. Leave the "
                    "callback out, or train the members with freeze_members=False."
                )
            instead = "learn_weights on predictions of your own"
            check_strategy(trainer, name, "its members could not predict outside a step", instead=instead)
            if not trainer.fast_dev_run and not trainer.enable_validation:
                raise UnsupportedSetup(
                    f"{name} learns from validation data, but there is none (no val_dataloader and validation_step, or "
                    "limit_val_batches=0). Give some that the members are not trained on."
                )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew, even after a validation that was broken off."""
        self._parts = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the families predict of the first loader's batches."""
        in_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if self.when == "validation" and dataloader_idx == 0 and in_fit:
            self._parts.append(predicted(pl_module, batch, self.names, trainer.precision_plugin).cpu())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn from them, and log."""
        if self.when != "validation" or not self._parts:
            return
        found = joined(self._parts)
        self._parts = []
        loader = trainer.fit_loop.epoch_loop.val_loop._combined_loader.flattened[0]
        if isinstance(getattr(loader, "sampler", None), DistributedSampler):
            found = gathered(trainer, found, len(loader.dataset))
        pl_module.log_dict(self._learn(found), sync_dist=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn from one pass over the validation data, unless that is done, and draw the weights."""
        if trainer.fast_dev_run:
            return
        if self.when == "fit_end":
            loops = OwnLoops(pl_module, trainer.datamodule, trainer.strategy.root_device, trainer.precision_plugin)
            source = trainer.fit_loop.epoch_loop.val_loop._data_source
            shows = trainer.is_global_zero and trainer.progress_bar_callback is not None
            found = held_out_predictions(
                trainer,
                loops,
                self.names,
                source.dataloader(),
                trainer.limit_val_batches,
                rich_progress if shows else silent,
            )
            values = self._learn(found)
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)
        if self.w is not None:
            path = draw_weights(self._history, self.names, trainer, "ensemble_weights")
            rank_zero_info(told_weights("LearnableEnsembleWeights", self.alpha, path))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the ensemble's figures."""
        if self.w is None:
            return
        log_p, targets = predicted(pl_module, batch, self.names, trainer.precision_plugin)
        learned = mix(log_p, self.log_alpha.to(log_p))
        alike = mix(log_p, torch.full_like(log_p[0, :, 0], -math.log(len(self.names))))
        values = {
            "test_ensemble_loss": nll_loss(learned, targets),
            "test_ensemble_acc": (learned.argmax(1) == targets).float().mean(),
            "test_uniform_loss": nll_loss(alike, targets),
        }
        pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=len(targets), sync_dist=True)

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """The weights and whose they are; plain values."""
        w = None if self.w is None else self.w.tolist()
        return {"w": w, "names": self.names, "history": self._history}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the weights of a checkpoint.

        Raises:
            UnsupportedSetup: They are of other families.
        """
        names = list(state_dict["names"])
        if self.names and names != self.names:
            raise UnsupportedSetup(
                f"LearnableEnsembleWeights: the checkpoint's weights are of the families {', '.join(names)}, but the "
                f"module has {', '.join(self.names)}. Use the same families, in the same order."
            )
        self.names = names
        self.w = None if state_dict["w"] is None else torch.tensor(state_dict["w"], dtype=torch.float64)
        self._history = [list(row) for row in state_dict["history"]]

    # -------------------------------------------------------------------------------------------------------- helpers

    def _learn(self, found: FamilyPredictions) -> dict[str, float]:
        """Learn w, and give what is logged of it."""
        self.w = learn_weights(found.log_p, found.targets, self.min_alpha)
        count, log_p = len(self.names), found.log_p.double()
        self._history = self._history or [[1 / count] * count]
        self._history.append(list(self.alpha.values()))
        alike = torch.full((count,), -math.log(count), dtype=torch.float64)
        return {
            **{f"ensemble_alpha/{name}": value for name, value in self.alpha.items()},
            "ensemble_alpha_entropy": float(entropy(self.log_alpha)),
            "ensemble_loss": float(nll_loss(mix(log_p, self.log_alpha), found.targets)),
            "uniform_loss": float(nll_loss(mix(log_p, alike), found.targets)),
        }
