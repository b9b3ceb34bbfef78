"""Held-out images at any size: decoded once, and brought to each size from what was decoded."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from operator import length_hint
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_soup.data.vision import ImageView, VisionDataModule
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.image_sizes import resized, smart_resize
from lightning_soup.evaluation.loading import listed
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["HeldOut", "SizedImages", "images_of"]

HeldOut = LightningDataModule | DataLoader | Mapping[str, LightningDataModule | DataLoader]
Size = tuple[int, int]


class SizedImages(ABC):
    """The images of one task."""

    #: The data module whose transfer hooks apply to batches, if there is one.
    datamodule: LightningDataModule | None = None

    @abstractmethod
    def at(self, size: Size) -> Iterable[tuple[Tensor, Tensor]]:
        """All images at one height and width, in batches."""

    @abstractmethod
    def within(self, low: int, high: int, factor: int) -> dict[Size, Iterable[tuple[Tensor, Tensor]]]:
        """All images at the size of :func:`.smart_resize`: batches by size."""

    @property
    @abstractmethod
    def own_size(self) -> Size:
        """The size of training, as far as the data knows."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Colour channels of the images."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Tells these images from others, by the first of them and by how many there are."""


class DecodedImages(SizedImages):
    """Images of a data module over files: each size is made from the file's own pixels, as evaluation does it.

    Args:
        view: The set.
        data: Its data module.
        cache_bytes: Decoded images are kept as long as they take no more; the rest is decoded for each size.
    """

    def __init__(self, view: ImageView, data: VisionDataModule, cache_bytes: int) -> None:
        self.datamodule, self.data = data, data
        self._images = _Decoded(view.images, cache_bytes)
        self._view = view

    @property
    def own_size(self) -> Size:
        """That of the data module's preprocessing."""
        return self.data.preprocessing.input_size[1:]

    @property
    def channels(self) -> int:
        """Always in RGB."""
        return self.data.preprocessing.input_size[0]

    @property
    def digest(self) -> str:
        """The first image as it is evaluated, and which images of the set there are."""
        image, target = ImageView(self._images, self._view.transform, self._view.indices, self._view.class_map)[0]
        return f"{open_checkpoint({'image': image}).digest()} {target} {list(self._view.indices)}"

    def at(self, size: Size) -> Iterable[tuple[Tensor, Tensor]]:
        """Resized and cropped in the middle, as in evaluation."""
        return self._loader(self.data.preprocessing.at_size(size).evaluate(), self._view.indices)

    def within(self, low: int, high: int, factor: int) -> dict[Size, Iterable[tuple[Tensor, Tensor]]]:
        """The whole image, its aspect ratio kept up to rounding."""
        groups: dict[Size, list[int]] = {}
        for index in self._view.indices:
            width, height = self._images[index][0].size
            groups.setdefault(smart_resize(height, width, factor, low, high), []).append(index)
        return {size: self._loader(self.data.preprocessing.exactly(size), indices) for size, indices in groups.items()}

    def _loader(self, transform: Any, indices: Any) -> DataLoader:
        view = ImageView(self._images, transform, indices, self._view.class_map)
        # Other processes would each decode and keep images of their own.
        workers = 0 if self._images.keeps_all() else self.data.num_workers
        return DataLoader(view, self.data.batch_size, num_workers=workers)


class _Decoded(Dataset):
    """A set of (PIL image, class) that keeps what it has decoded."""

    def __init__(self, images: Dataset, budget: int) -> None:
        self.images, self.left = images, budget
        self._kept: dict[int, tuple[Any, int]] = {}
        self._whole: bool | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index in self._kept:
            return self._kept[index]
        image, target = self.images[index]
        found = image.convert("RGB"), target
        size = 3 * image.size[0] * image.size[1]
        if size <= self.left:
            self._kept[index], self.left = found, self.left - size
        return found

    def keeps_all(self) -> bool:
        """Whether all images are likely to be kept, as the first one's size says."""
        if self._whole is None:
            width, height = self[0][0].size
            self._whole = 3 * width * height * len(self) <= self.left
        return self._whole


class LoadedImages(SizedImages):
    """Images of any loader of batches ``(images, targets)``: each size is made from the tensors that it gives.

    Args:
        loader: In order, without random changes.
        datamodule: Where it is from, if it is from one.
        cache_bytes: Batches are kept if they take no more; else they are loaded for each size.
    """

    def __init__(self, loader: Any, datamodule: LightningDataModule | None, cache_bytes: int) -> None:
        self.datamodule, self._loader, self._budget = datamodule, loader, cache_bytes
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    @cached_property
    def _first(self) -> tuple[Tensor, Any]:
        first = next(iter(self._batches()), None)
        if first is None:
            raise UnsupportedSetup("The loader of held-out images gives no batches. Give it some.")
        return first

    @property
    def own_size(self) -> Size:
        """That of the first batch."""
        return tuple(self._first[0].shape[2:])

    @property
    def channels(self) -> int:
        """Those of the first batch."""
        return self._first[0].shape[1]

    @property
    def digest(self) -> str:
        """The first batch, and the number of batches where the loader knows it."""
        tensors = {str(place): part for place, part in enumerate(self._first) if torch.is_tensor(part)}
        return f"{open_checkpoint(tensors).digest()} {length_hint(self._loader, -1)}"

    def at(self, size: Size) -> Iterator[tuple[Tensor, Tensor]]:
        """Resized, bicubic with antialias."""
        return ((resized(images, size), targets) for images, targets in self._batches())

    def within(self, low: int, high: int, factor: int) -> dict[Size, Iterable[tuple[Tensor, Tensor]]]:
        """Each batch at a size of its own: loaders of images in their own sizes give them one by one."""
        shapes = dict.fromkeys(tuple(images.shape[2:]) for images, _ in self._batches())
        sizes = {shape: smart_resize(*shape, factor, low, high) for shape in shapes}
        return {size: self._with(size, sizes) for size in dict.fromkeys(sizes.values())}

    def _with(self, size: Size, sizes: Mapping[Size, Size]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in self._batches():
            if sizes[tuple(images.shape[2:])] == size:
                yield resized(images, size), targets

    def _batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        if self._kept is not None:
            return self._kept
        return self._load()

    def _load(self) -> Iterator[tuple[Tensor, Tensor]]:
        kept, left = [], self._budget
        for batch in self._loader:
            if (
                not isinstance(batch, (list, tuple))
                or len(batch) < 2
                or not torch.is_tensor(batch[0])
                or batch[0].ndim != 4
            ):
                raise UnsupportedSetup(
                    f"A search over image sizes needs batches (images [B, C, H, W], targets), got "
                    f"{type(batch).__name__}. Change the loader."
                )
            left -= batch[0].numel() * batch[0].element_size()
            if left >= 0:
                kept.append((batch[0], batch[1]))
            yield batch[0], batch[1]
        if left >= 0:
            self._kept = kept


def images_of(data: HeldOut, split: Literal["val", "test"], cache_bytes: int = 1 << 30) -> dict[str, SizedImages]:
    """The tasks of a split by name.

    Args:
        data: A data module, a loader, or several of them by the name of the task.
        split: ``val`` or ``test``; of loaders that are given as such it is what they are.
        cache_bytes: How much of decoded images may be kept.

    Raises:
        UnsupportedSetup: There is none.
    """
    if isinstance(data, Mapping):
        several = {name: images_of(given, split, cache_bytes // max(len(data), 1)) for name, given in data.items()}
        found = {
            name if len(parts) == 1 else f"{name}/{part}": images
            for name, parts in several.items()
            for part, images in parts.items()
        }
    elif isinstance(data, VisionDataModule):
        views = data.views(split)
        found = {name: DecodedImages(view, data, cache_bytes // len(views)) for name, view in views.items()}
    else:
        found = _loaded(data, split, cache_bytes)
    if not found:
        raise UnsupportedSetup(f"There is no {split} data to evaluate image sizes on. Give a {split}_dataloader.")
    return found


def _loaded(data: LightningDataModule | DataLoader, split: str, cache_bytes: int) -> dict[str, SizedImages]:
    if not isinstance(data, LightningDataModule):
        return {split: LoadedImages(data, None, cache_bytes)}
    if not is_overridden(f"{split}_dataloader", data):
        return {}
    data.prepare_data()
    data.setup("validate" if split == "val" else "test")
    loaders = listed(data.val_dataloader() if split == "val" else data.test_dataloader())
    names = list(getattr(data, f"{split}_names", ()))
    if len(names) != len(loaders):
        names = [split] if len(loaders) == 1 else [f"{split}_{number}" for number in range(len(loaders))]
    budget = cache_bytes // max(len(loaders), 1)
    return {name: LoadedImages(loader, data, budget) for name, loader in zip(names, loaders, strict=True)}
