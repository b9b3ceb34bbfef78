"""DigitStylesDataModule: real digits in five styles, as five tasks for continual learning without a network.

Four sets of the UCI digits share no image: 300 to pre-train on, 300 as an unlabelled reference, 500 to train every task
on, and 630 to test with.
"""

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_soup.data.digit_images import HELD_OUT, read_images, split_by_class
from lightning_soup.data.handwriting import EVAL_BATCH_SIZE, InMemoryImages
from lightning_soup.data.reference import Reference
from lightning_soup.errors import UnsupportedSetup

__all__ = ["STYLES", "DigitStyleReference", "DigitStylesDataModule"]

Part = Literal["pretrain", "reference", "train", "test"]
_PER_CLASS = 30  # of the pre-training images and of the reference


def _invert(images: Tensor) -> Tensor:
    return 1 - images


def _turn(images: Tensor) -> Tensor:
    return images.rot90(1, dims=(-2, -1))


def _roll(images: Tensor) -> Tensor:
    """By half the width: the left half and the right half change places."""
    return images.roll(images.shape[-1] // 2, dims=-1)


def _cross(images: Tensor) -> Tensor:
    """Black and white, and crossed out by a diagonal."""
    line = torch.eye(images.shape[-1]).add(torch.eye(images.shape[-1]).roll(1, dims=1).triu()).bool()
    return (images > 0.5).float().masked_fill(line, 1.0)


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda images: images,
    "inverted": _invert,
    "turned": _turn,
    "rolled": _roll,
    "crossed": _cross,
}
"""Name of a style -> images ``[B, 1, 28, 28]`` with values 0…1 in that style."""


class DigitStylesDataModule(LightningDataModule):
    """Digits in one style, ten classes with names such as "inverted 3"; or in all styles, fifty classes.

    Images are 28×28, one channel, normalised as by :class:`.HandwritingDataModule`.

    Args:
        style: A name of :data:`STYLES`, or ``all``.
        part: What is trained on: the images of the tasks (``train``, 500), or the other ones that a model is
            pre-trained with (``pretrain``, 300). ``all`` has each image in every style.
        seed: Decides which image belongs to which set.
        batch_size: Training batch size.

    Raises:
        UnsupportedSetup: An unknown style or part, or a batch size below 1.
        MissingExtra: scikit-learn is not installed.
    """

    test_names = ("test",)

    def __init__(
        self,
        style: str = "all",
        part: Literal["train", "pretrain"] = "train",
        seed: int = 0,
        batch_size: int = 50,
    ):
        super().__init__()
        if style not in (*STYLES, "all"):
            raise UnsupportedSetup(f"style={style!r}: expected one of {', '.join(STYLES)}, all.")
        if part not in ("train", "pretrain"):
            raise UnsupportedSetup(f"part={part!r}: expected one of train, pretrain.")
        if batch_size < 1:
            raise UnsupportedSetup(f"batch_size={batch_size}: expected 1 or more.")
        self.style, self.part, self.seed, self.batch_size = style, part, seed, batch_size
        self.class_names = class_names(style)
        self._train: InMemoryImages | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, split and restyle the images; all stages at once, as it takes a tenth of a second."""
        if self._train is None:
            self._test = self._set("test")
            self._train = self._set(self.part)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        return DataLoader(self._train, batch_size=self.batch_size, shuffle=True)

    def test_dataloader(self) -> list[DataLoader]:
        """The test set."""
        return [DataLoader(self._test, batch_size=EVAL_BATCH_SIZE)]  # by name: Lightning's predict sets it anew

    def predict_dataloader(self) -> DataLoader:
        """The test set."""
        return self.test_dataloader()[0]

    def _set(self, part: Part) -> InMemoryImages:
        images, labels = digits(part, self.seed)
        names = list(STYLES) if self.style == "all" else [self.style]
        styled = torch.cat([STYLES[name](images) for name in names])
        return InMemoryImages(styled, torch.cat([labels + 10 * number for number in range(len(names))]))


class DigitStyleReference(Reference):
    """300 digits that belong to no task and no label, each in a style drawn at random, and the names of all classes.

    Args:
        seed: Of the split of the images, as for the tasks; and decides styles and order.
        batch_size: Images in a step.
    """

    def __init__(self, seed: int = 0, batch_size: int = 50):
        images, labels = digits("reference", seed)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(STYLES), (len(images),), generator=generator)
        styled = images.clone()
        for number, style in enumerate(STYLES.values()):
            styled[drawn == number] = style(images[drawn == number])
        super().__init__(InMemoryImages(styled, labels), class_names("all"), batch_size, seed)


def class_names(style: str) -> list[str]:
    """Names from "inverted 0" to "inverted 9", or those of all styles."""
    return [f"{name} {digit}" for name in (STYLES if style == "all" else [style]) for digit in range(10)]


def digits(part: Part, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[N, 1, 28, 28]`` and labels ``[N]`` of one of the four sets."""
    images, labels = read_images("digits")
    split = split_by_class(labels, 500, 20 * _PER_CLASS, HELD_OUT["digits"], seed)
    apart = split.val.view(10, 2 * _PER_CLASS)  # class by class
    chosen = {
        "pretrain": apart[:, :_PER_CLASS].flatten(),
        "reference": apart[:, _PER_CLASS:].flatten(),
        "train": split.train,
        "test": split.test,
    }[part]
    return images[chosen], labels[chosen]
