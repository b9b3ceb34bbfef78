"""Evaluating on training data: by the validation step, on fixed samples."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.evaluator import Split
from lightning_soup.evaluation.loading import listed
from lightning_soup.evaluation.module_evaluator import ModuleEvaluator

__all__ = ["TrainingEvaluator"]

_BATCH = 256  # a training's own batches may be small, which takes long


class TrainingEvaluator(ModuleEvaluator):
    """Judges weights by a module's validation step on samples of the training data, the same ones each time.

    Samples come through the training set, its augmentation too: where that draws random numbers, a warning says so.

    Args:
        module: The module; its weights are overwritten.
        datamodule: Its data.
        metric: A metric that the validation step logs.
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
        super().__init__(module, datamodule, metric, mode, trainer)
        self.samples = samples

    def figures(self, weights: Any) -> Mapping[str, float]:
        """All that the validation step logs for these weights."""
        self.load(weights)
        return {name: float(value) for name, value in self._validate().items()}

    def batches_of(self, size: int) -> DataLoader:
        """The samples in batches of a size, in one order."""
        loader = self._validation()
        return _in_order(loader.dataset, size, loader.collate_fn)

    def _validate(self, split: Split = "select") -> Mapping[str, Tensor]:
        self._validation()  # now, where its warning is not kept back
        return super()._validate(split)

    def _validation(self) -> Any:
        if self._held is None:
            loader = listed(self._training_loader())[0]
            data = getattr(loader, "dataset", None)
            if not hasattr(data, "__len__") or len(data) == 0:
                raise UnsupportedSetup(
                    f"{type(self.datamodule).__name__}: the training data has no length, so no samples can be fixed. "
                    "Give a set with __len__ and __getitem__."
                )
            count = len(data) if self.samples is None else min(self.samples, len(data))
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
            chosen = Subset(data, order.sort().values.tolist())
            _warn_of_augmentation(chosen)
            self._held = _in_order(chosen, _BATCH, loader.collate_fn)
        return self._held


def _in_order(data: Dataset, size: int, collate: Any) -> DataLoader:
    # Its own generator, since each pass draws a seed for workers, of which there are none, from the global one.
    return DataLoader(data, size, collate_fn=collate, generator=torch.Generator())


def _warn_of_augmentation(data: Subset) -> None:
    with isolate_rng():
        first, again = (_tensors(data[0]) for _ in range(2))
    if not all(map(torch.equal, first, again)):
        warnings.warn(
            "the training samples are augmented at random, so what is measured on them differs each time. Leave the "
            "augmentation out where losses and curvature are to be compared.",
            stacklevel=4,
        )


def _tensors(sample: Any) -> list[Tensor]:
    parts = sample if isinstance(sample, (list, tuple)) else [sample]
    return [part for part in parts if isinstance(part, Tensor)]
