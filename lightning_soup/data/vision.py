"""What the data modules over image files have in common: views of a set, the validation split, the loaders."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_soup.data.transforms import Augmentation, Preprocessing
from lightning_soup.errors import UnsupportedSetup

__all__ = ["ImageView", "VisionDataModule", "map_classes", "random_parts"]


class ImageView(Dataset):
    """Some images of a set, in RGB, through a transform, with renumbered classes.

    Training and validation views share one set, which is opened and held in memory once.

    Args:
        images: A set of ``(PIL image, class)``.
        transform: Makes a tensor of a PIL image.
        indices: Which images, in this order; all of them by default.
        class_map: New number of each class; as they are by default.
    """

    def __init__(
        self,
        images: Dataset,
        transform: Callable[[Any], Tensor],
        indices: Sequence[int] | None = None,
        class_map: dict[int, int] | None = None,
    ):
        self.images, self.transform, self.class_map = images, transform, class_map
        self.indices = range(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.images[self.indices[index]]
        target = int(target)
        return self.transform(image.convert("RGB")), target if self.class_map is None else self.class_map[target]


def random_parts(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split ``range(count)`` at random into the larger rest and ``fraction`` of it, each in ascending order.

    Raises:
        UnsupportedSetup: One of the two would be empty.
    """
    size = round(count * fraction)
    if not 0 < size < count:
        raise UnsupportedSetup(
            f"A split of {count} samples at fraction {fraction} leaves {count - size} and {size}: neither may be empty."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[size:]), sorted(order[:size])


def map_classes(found: Sequence[str], expected: Sequence[str], place: str, *, subset: bool) -> dict[int, int] | None:
    """Renumber the classes of a set as the training set numbers them, by name.

    Args:
        found: Names of the set's classes, in its order.
        expected: Names of the training set's classes.
        place: Where ``found`` was found, for the message.
        subset: Whether classes may be missing.

    Returns:
        Number in ``found`` -> number in ``expected``, or None where both agree.

    Raises:
        UnsupportedSetup: Unknown classes, or missing ones where none may be.
    """
    unknown = [name for name in found if name not in set(expected)]
    missing = [] if subset else [name for name in expected if name not in set(found)]
    if unknown or missing:
        parts = [
            f"{label}: {_shorten(names)}" for label, names in (("unknown", unknown), ("missing", missing)) if names
        ]
        raise UnsupportedSetup(
            f"The classes of {place} are not those of the training set ({_shorten(expected)}); {'; '.join(parts)}. "
            "Rename, add or remove class folders so that the names agree"
            + (" (classes may be missing here, but not be new)." if subset else ".")
        )
    number = {name: index for index, name in enumerate(expected)}
    class_map = {index: number[name] for index, name in enumerate(found)}
    return None if all(old == new for old, new in class_map.items()) else class_map


def _shorten(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class VisionDataModule(LightningDataModule):
    """Base of the data modules over image files; a subclass says how to open its sets.

    Subclasses set ``test_names`` in ``__init__`` and implement ``class_names``, ``open_train``, ``open_val`` and
    ``open_tests``.
    """

    test_names: list[str]

    def __init__(
        self,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        val_fraction: float,
        third_fraction: float,
        seed: int,
        batch_size: int,
        num_workers: int,
    ):
        super().__init__()
        if not 0 < val_fraction < 1:
            raise UnsupportedSetup(f"val_fraction={val_fraction}: expected a fraction between 0 and 1.")
        if not 0 <= third_fraction < 1:
            raise UnsupportedSetup(f"third_fraction={third_fraction}: expected 0, or a fraction between 0 and 1.")
        if batch_size < 1 or num_workers < 0:
            raise UnsupportedSetup(
                f"batch_size={batch_size}, num_workers={num_workers}: expected batch_size ≥ 1 and num_workers ≥ 0."
            )
        self.preprocessing, self.augmentation = preprocessing, augmentation
        self.val_fraction, self.third_fraction, self.seed = val_fraction, third_fraction, seed
        self.batch_size, self.num_workers = batch_size, num_workers
        self._train: ImageView | None = None
        self._third: ImageView | None = None
        self._tests: list[ImageView] | None = None

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @abstractmethod
    def open_train(self) -> tuple[Dataset, Sequence[int] | None]:
        """The training set without a transform, and which of its images to use (None: all)."""

    @abstractmethod
    def open_val(self) -> tuple[Dataset, dict[int, int] | None] | None:
        """The validation set and its class map, or None: a part of the training set is held out."""

    @abstractmethod
    def open_tests(self) -> list[tuple[Dataset, Sequence[int] | None, dict[int, int] | None]]:
        """Set, images to use and class map of every entry of ``test_names``."""

    def setup(self, stage: str | None = None) -> None:
        """Open the sets that the stage needs, once."""
        if stage in (None, "fit", "validate") and self._train is None:
            self._open_train_and_val()
        if stage in (None, "test", "predict") and self._tests is None:
            transform = self.preprocessing.evaluate()
            self._tests = [ImageView(images, transform, *rest) for images, *rest in self.open_tests()]

    def _open_train_and_val(self) -> None:
        images, indices = self.open_train()
        evaluate = self.preprocessing.evaluate()
        if (own := self.open_val()) is not None:
            self._val = ImageView(own[0], evaluate, class_map=own[1])
        else:
            indices = range(len(images)) if indices is None else indices
            rest, held_out = self.split(images, indices, self.val_fraction)
            self._val = ImageView(images, evaluate, [indices[i] for i in held_out])
            indices = [indices[i] for i in rest]
        if self.third_fraction:
            every, of_val = self._val.indices, self._val.images
            rest, third = self.split(of_val, every, self.third_fraction)
            self._third = ImageView(of_val, evaluate, [every[i] for i in third], self._val.class_map)
            self._val = ImageView(of_val, evaluate, [every[i] for i in rest], self._val.class_map)
        self._train = ImageView(images, self.preprocessing.train(self.augmentation), indices)

    def split(self, images: Dataset, indices: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
        """Which of ``indices`` to keep and which share of them to hold out, as places in it."""
        return random_parts(len(indices), fraction, self.seed)

    def views(self, split: Literal["val", "test"]) -> dict[str, ImageView]:
        """The images of a split by the name of the set, as they are evaluated."""
        self.prepare_data()
        self.setup("validate" if split == "val" else "test")
        return {"val": self._val} if split == "val" else dict(zip(self.test_names, self._tests, strict=True))

    def train_dataloader(self) -> DataLoader:
        """Shuffled and augmented training batches."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation batches."""
        return self._loader(self._val)

    def third_dataloader(self) -> DataLoader | list[DataLoader]:
        """Images that neither trained nor validate, or no loader at all with ``third_fraction=0``."""
        return self._loader(self._third) if self.third_fraction else []

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per entry of ``test_names``."""
        return [self._loader(view) for view in self._tests]

    def predict_dataloader(self) -> DataLoader:
        """The main test set."""
        return self._loader(self._tests[0])

    def _loader(self, view: ImageView, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            view,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
