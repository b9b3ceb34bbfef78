"""The items that a crowd votes on: what they are called, and the same items with rows of probabilities as targets."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler, Subset
from torchvision.datasets import DatasetFolder

from lightning_soup.data.handwriting import InMemoryImages
from lightning_soup.data.reference import FolderImages
from lightning_soup.data.vision import ImageView, VisionDataModule
from lightning_soup.errors import UnsupportedSetup

__all__ = ["SoftTargets", "as_evaluated", "flat_images", "item_names", "loader_options", "whole_set"]


class SoftTargets(Dataset):
    """Some items of a set, with rows of probabilities in place of whatever targets they have.

    Args:
        items: A set of inputs, or of tuples that begin with one.
        indices: Which of them, in this order.
        rows: Their targets, ``[N, C]``.
    """

    def __init__(self, items: Dataset, indices: Sequence[int], rows: Tensor):
        self.items, self.indices, self.rows = items, list(indices), rows

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, Tensor]]:
        places = [self.indices[index] for index in indices]
        if hasattr(self.items, "__getitems__"):  # a whole batch at once, which is how torch asks for it
            found = self.items.__getitems__(places)
        else:
            found = [self.items[place] for place in places]
        inputs = [item[0] if isinstance(item, (tuple, list)) else item for item in found]
        return list(zip(inputs, self.rows[indices].unbind(), strict=True))


def item_names(dataset: Dataset) -> list[str]:
    """What the items of a set are called in a table of votes, in their order.

    Items with files have the path inside the folder of the set, with ``/`` between its parts; others have their number
    in the set. A part of a set, such as what a validation split leaves, keeps the names of the whole one.
    """
    if isinstance(dataset, ImageView):
        names = item_names(dataset.images)
        return [names[index] for index in dataset.indices]
    if isinstance(dataset, Subset):
        names = item_names(dataset.dataset)
        return [names[index] for index in dataset.indices]
    if isinstance(dataset, DatasetFolder):
        return [Path(path).relative_to(dataset.root).as_posix() for path, _ in dataset.samples]
    if isinstance(dataset, FolderImages):
        return [path.relative_to(dataset.root).as_posix() for path in dataset.paths]
    return [str(number) for number in range(len(dataset))]


def whole_set(dataset: Dataset) -> Dataset:
    """The set that a set is a part of, or itself."""
    if isinstance(dataset, ImageView):
        return whole_set(dataset.images)
    return whole_set(dataset.dataset) if isinstance(dataset, Subset) else dataset


def as_evaluated(dataset: Dataset, items: LightningDataModule) -> Dataset:
    """The training items without random changes, where it is known how: for the data modules over images."""
    if isinstance(dataset, InMemoryImages):
        return InMemoryImages(dataset.images, dataset.targets)
    if isinstance(dataset, (ImageView, FolderImages)) and isinstance(items, VisionDataModule):
        dataset = copy.copy(dataset)
        dataset.transform = items.preprocessing.evaluate()
    return dataset


def flat_images(folder: str, items: LightningDataModule) -> FolderImages:
    """The images in a folder and below, prepared for training as those of ``items`` are.

    Raises:
        UnsupportedSetup: There are none, or ``items`` does not say how images are prepared.
    """
    if not isinstance(items, VisionDataModule):
        raise UnsupportedSetup(
            f"images={folder!r} needs a data module over image files, such as ImageFolderDataModule, which says how "
            f"images become inputs; {type(items).__name__} does not. Leave images out to train on its own items."
        )
    return FolderImages(folder, items.preprocessing.train(items.augmentation), "The images that votes are on")


def loader_options(loader: Any) -> dict[str, Any]:
    """How a training loader makes batches.

    Raises:
        UnsupportedSetup: It is no DataLoader over a set with a length, with batches of one size, or it has a sampler of
            its own.
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is None or not hasattr(loader.dataset, "__len__"):
        raise UnsupportedSetup(
            "The items of a crowd come from one DataLoader over a set with a length, with a batch_size; the training "
            f"data is a {type(loader).__name__} that is not so. Let train_dataloader() return one."
        )
    if not isinstance(loader.sampler, (SequentialSampler, RandomSampler, DistributedSampler)):
        raise UnsupportedSetup(
            f"The training data of the items is drawn by a {type(loader.sampler).__name__}, which does not know those "
            "that have votes. Leave it out: they are shuffled. Classes count alike with the model's class_weights: "
            "balanced."
        )
    return {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
