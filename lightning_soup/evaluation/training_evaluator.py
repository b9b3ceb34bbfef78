"""Evaluating on training data: by the validation step, on fixed samples."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.evaluator import Split
from lightning_soup.evaluation.loading import listed, rebatched
from lightning_soup.evaluation.module_evaluator import ModuleEvaluator

__all__ = ["TrainingEvaluator", "of_one_loader", "training_set"]

_BATCH = 256  # a training's own batches may be small, which takes long
_LOOKED_AT = 8  # samples; one that is flipped half of the time may stay the same


class TrainingEvaluator(ModuleEvaluator):
    """Judges weights by a module's validation step on samples of the training data, the same ones each time.

    Samples come through the training set, its augmentation too: where that draws random numbers, a warning says so.

    Args:
        module: The module; its weights are overwritten.
        datamodule: Its data.
        metric: A metric that the validation step logs; of several validation loaders (``val_acc/dataloader_idx_1``),
            its part before the number, since the samples are one loader's.
        mode: Whether a large (``"max"``) or a small (``"min"``) value is good; by default as of
            :class:`.ModuleEvaluator`.
        trainer: Trainer that validates; a quiet one on one device by default.
        samples: How many of the training samples, drawn by a seed of their own; None: all.

    Raises:
        UnsupportedSetup: When data is first asked for: there is no training data, or it has no length.
    """

    def __init__(
        self,
        module: LightningModule,
        datamodule: LightningDataModule,
        metric: str = "val_loss",
        mode: Literal["min", "max"] | None = None,
        trainer: Trainer | None = None,
        *,
        samples: int | None = None,
    ) -> None:
        super().__init__(module, datamodule, of_one_loader(metric), mode, trainer)
        self.samples = samples

    def batches(self, epoch: int, batch_size: int) -> Iterable[Any]:
        """The samples, shuffled by ``epoch``, in batches of ``batch_size``."""
        return rebatched(self._validation(), epoch, batch_size, 1.0)

    def batches_of(self, size: int) -> DataLoader:
        """The samples in batches of a size, in one order."""
        loader = self._validation()
        return _in_order(loader.dataset, size, loader.collate_fn)

    def _validate(self, split: Split = "select") -> Mapping[str, Tensor]:
        self._validation()  # now, where its warning is not kept back
        trainer = self.trainer
        limit, trainer.limit_val_batches = trainer.limit_val_batches, 1.0  # which is for validation data
        try:
            return super()._validate(split)
        finally:
            trainer.limit_val_batches = limit

    def _validation(self) -> Any:
        if self._held is None:
            loader = listed(self._training_loader())[0]
            data = training_set(loader, self.datamodule)
            count = len(data) if self.samples is None else min(self.samples, len(data))
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
            chosen = Subset(data, order.sort().values.tolist())
            _warn_of_augmentation(chosen, loader.collate_fn)
            self._held = _in_order(chosen, _BATCH, loader.collate_fn)
        return self._held


def of_one_loader(metric: str) -> str:
    """The name of a metric where there is one loader, to whose metrics Lightning appends no number."""
    return metric.partition("/dataloader_idx_")[0]


def training_set(loader: Any, datamodule: LightningDataModule | None) -> Dataset:
    """The set behind a loader of training data, of which samples can be fixed.

    Raises:
        UnsupportedSetup: They cannot, since it has no length or is iterated over.
    """
    data = getattr(loader, "dataset", None)
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or len(data) == 0:
        raise UnsupportedSetup(
            f"{type(datamodule).__name__}: the training data has no length, so no samples can be fixed. "
            "Give a set with __len__ and __getitem__."
        )
    return data


def _in_order(data: Dataset, size: int, collate: Any) -> DataLoader:
    # Its own generator, since each pass draws a seed for workers, of which there are none, from the global one.
    return DataLoader(data, size, collate_fn=collate, generator=torch.Generator())


def _warn_of_augmentation(data: Subset, collate: Any) -> None:
    some = range(min(_LOOKED_AT, len(data)))
    with isolate_rng():
        # As batches, in which a sample's parts are tensors, and which a collate_fn may mix at random.
        first, again = (tree_leaves(collate([data[i] for i in some])) for _ in range(2))
    pairs = [pair for pair in zip(first, again, strict=False) if isinstance(pair[0], Tensor)]
    if not all(torch.equal(*pair) for pair in pairs):
        warnings.warn(
            "the training samples are augmented at random, so what is measured on them differs each time. Leave the "
            "augmentation out where losses and curvature are to be compared.",
            stacklevel=4,
        )
