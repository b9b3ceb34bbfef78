"""How an ensemble with frozen members is trained: on what they predicted of held-out images, once."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_soup.evaluation.family_predictions import FamilyPredictions, held_out_predictions
from lightning_soup.evaluation.loading import limited, listed
from lightning_soup.evaluation.own_loops import OwnLoops, normed
from lightning_soup.progress import rich_progress, silent

if TYPE_CHECKING:
    from lightning_soup.modules.ensemble import AwareNet

__all__ = ["HeldOut", "recalibrate_soups"]


class _OneBatch:
    """A loader of one batch, all that there is."""

    def __init__(self, batch: FamilyPredictions):
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[FamilyPredictions]:
        yield self.batch


@dataclass
class HeldOut:
    """The loaders of a fit that the predictions stand in for, and the data module whose hooks do not apply to them."""

    sources: list[tuple[Any, Any]]
    hooks: tuple[Any, Any]

    @classmethod
    def of(cls, module: "AwareNet", trainer: Trainer) -> "HeldOut":
        """Predict, and let the Trainer's loops train and validate on the predictions.

        Raises:
            UnsupportedSetup: There is no held-out data.
            NonFiniteWeights: A member predicts NaN.
        """
        loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop)
        on_training = module.hparams.learn_on == "train"
        chosen = loops[0] if on_training else loops[1]
        limit = trainer.limit_train_batches if on_training else trainer.limit_val_batches
        loaders = chosen._data_source.dataloader() if chosen._data_source.is_defined() else None
        shows = trainer.is_global_zero and trainer.progress_bar_callback is not None
        found = held_out_predictions(
            trainer, own_loops(module, trainer), module.family_names, loaders, limit, rich_progress if shows else silent
        )
        selector = trainer._data_connector._datahook_selector
        own = cls([(loop._data_source, loop._data_source.instance) for loop in loops], (selector, selector.datamodule))
        for source, _ in own.sources:
            source.instance = _OneBatch(found)
        selector.datamodule = None  # whose hooks may augment images
        with _limits_of_one_batch(trainer):
            for loop in loops:
                loop._combined_loader = None  # of the images, where a callback has asked how many steps there will be
                loop.setup_data()
        # Not made anew (reload_dataloaders_every_n_epochs).
        loops[0]._last_train_dl_reload_epoch = loops[1]._last_val_dl_reload_epoch = math.inf
        return own

    def put_back(self) -> None:
        """Give the Trainer its loaders back."""
        for source, instance in self.sources:
            source.instance = instance
        self.hooks[0].datamodule = self.hooks[1]


@contextmanager
def _limits_of_one_batch(trainer: Trainer) -> Iterator[None]:
    """Limits that hold for the loaders of images, for their one batch: a share of it would be none."""
    limits = {"limit_train_batches": trainer.limit_train_batches, "limit_val_batches": trainer.limit_val_batches}
    one = {name: 1.0 if limit else limit for name, limit in limits.items()}
    interval = getattr(trainer, "val_check_interval", None)  # none where validation goes by time
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None:
        limits["val_check_interval"], one["val_check_interval"] = interval, 1.0
    vars(trainer).update(one)
    try:
        yield
    finally:
        vars(trainer).update(limits)


def own_loops(module: "AwareNet", trainer: Trainer) -> OwnLoops:
    """Loops with the Trainer's data module, device and precision."""
    return OwnLoops(module, trainer.datamodule, trainer.strategy.root_device, trainer.precision_plugin)


def recalibrate_soups(module: "AwareNet", trainer: Trainer, stale: Collection[str]) -> None:
    """Estimate the statistics of some BatchNorm layers anew, on the training images; every rank on all of them."""
    source = trainer.fit_loop._data_source
    if not source.is_defined():
        return
    with isolate_rng():
        torch.manual_seed(0)  # the same batches on all ranks
        loader = listed(source.dataloader())[0]
        frozen = [name for name in normed(module) if name not in stale]
        own_loops(module, trainer).recalibrate(limited(loader, trainer.limit_train_batches), frozen)
