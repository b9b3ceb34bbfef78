"""Reference: unlabelled images and texts that a model is held to while it learns something else."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_soup.data.transforms import Preprocessing
from lightning_soup.errors import UnsupportedSetup

__all__ = ["FolderImages", "Reference", "ReferenceFiles", "read_texts"]


class Reference:
    """Images and texts without labels, which need not belong together nor be as many.

    What matters is variety of meaning: the paper of ZSCL takes ImageNet's images and the captions of another set.

    Args:
        images: A data set, list or tensor of images ``[C, H, W]``, of which batches are drawn in an order that ``seed``
            decides; or anything else that can be gone through again and again, such as a DataLoader, in its own order.
            Of pairs the first is taken.
        texts: The texts, or a file: see :func:`read_texts`.
        batch_size: Images in a step.
        seed: Decides the order.
        num_workers: Loader processes.

    Raises:
        UnsupportedSetup: No images or no texts, images that can be gone through only once, or numbers out of range.
    """

    def __init__(
        self,
        images: Dataset | Iterable[Any],
        texts: Iterable[str] | str,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ):
        if batch_size < 1 or num_workers < 0:
            raise UnsupportedSetup(
                f"batch_size={batch_size}, num_workers={num_workers}: expected batch_size ≥ 1 and num_workers ≥ 0."
            )
        self.images, self.batch_size, self.seed, self.num_workers = images, batch_size, seed, num_workers
        self.texts = read_texts(texts) if isinstance(texts, str) else list(texts)
        if not self.texts:
            raise UnsupportedSetup("The reference has no texts. Give one or more: a list, or a file with one a line.")
        wrong = next((text for text in self.texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise UnsupportedSetup(f"The reference has a text {wrong!r}; expected words.")
        self._indexed = hasattr(images, "__len__") and hasattr(images, "__getitem__")
        self._indexed &= not isinstance(images, IterableDataset)
        if self._indexed and not len(images):
            raise UnsupportedSetup(f"The reference has no images: {type(images).__name__} is empty. Give one or more.")
        if not self._indexed and iter(images) is images:
            raise UnsupportedSetup(
                f"The reference images are a {type(images).__name__}, which can be gone through once, but training "
                "goes on for longer. Give a list, a data set or a DataLoader."
            )

    def batches(self, start: int = 0, rank: int = 0) -> Iterator[Tensor]:
        """Batches of images ``[B, C, H, W]`` without an end, from the batch with number ``start`` on.

        Args:
            start: How many batches were used before: a training that is resumed goes on where it was.
            rank: Ranks get different batches of an indexed set.

        Raises:
            UnsupportedSetup: There are no images.
        """
        if not self._indexed:
            return islice(self._passes(), start, None)
        order = _EndlessBatches(len(self.images), self.batch_size, 1_000_003 * self.seed + rank, start)
        # A generator of its own: resuming must not draw from the run's stream.
        generator = torch.Generator().manual_seed(self.seed)
        loader = DataLoader(
            self.images, batch_sampler=order, num_workers=self.num_workers, generator=generator, collate_fn=_collate
        )
        return iter(loader)

    def _passes(self) -> Iterator[Tensor]:
        while True:
            count, waiting = 0, []
            for item in self.images:
                image, count = _image(item), count + 1
                if image.ndim == 4:  # a batch already
                    yield image
                    continue
                waiting.append(image)
                if len(waiting) == self.batch_size:
                    yield torch.stack(waiting)
                    waiting = []
            if waiting:
                yield torch.stack(waiting)
            if not count:
                raise UnsupportedSetup(f"The reference has no images: {type(self.images).__name__} is empty.")


class ReferenceFiles(Reference):
    """A reference of image files and a file of texts.

    Args:
        images: A folder; the images in it and in the folders below are taken, whatever these are called.
        texts: See :func:`read_texts`.
        model_name: The timm model whose size and normalisation the images get, for example
            ``vit_base_patch16_clip_224.openai``.
        img_size: Side of the images, instead of the model's. This or ``model_name`` is needed.
        mean: Mean of the three channels, instead of the model's.
        std: Deviation of the three channels, instead of the model's.
        crop_pct: Share of the side that the centre crop of evaluation keeps, instead of the model's: 1 for CLIP.
        batch_size: Images in a step.
        seed: Decides the order.
        num_workers: Loader processes.

    Raises:
        UnsupportedSetup: No such folder or file, or nothing in it.
    """

    def __init__(
        self,
        images: str,
        texts: str,
        model_name: str | None = None,
        img_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        crop_pct: float | None = None,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 4,
    ):
        transform = Preprocessing(model_name, img_size, mean, std, crop_pct).evaluate()
        super().__init__(FolderImages(images, transform), texts, batch_size, seed, num_workers)


class FolderImages(Dataset):
    """All images in a folder and below, without labels.

    Args:
        root: The folder.
        transform: Makes a tensor of a PIL image.
        what: What they are, for messages.

    Raises:
        UnsupportedSetup: No such folder, or no images in it.
    """

    def __init__(self, root: str, transform: Any, what: str = "The reference images"):
        self.root = folder = Path(root).expanduser()
        found = (path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        self.paths = sorted(path for path in found if path.is_file())
        self.transform = transform
        if not self.paths:
            why = "has no images in it" if folder.is_dir() else "is no folder"
            raise UnsupportedSetup(
                f"{what}: {root} {why}. Give a folder with images ({', '.join(IMG_EXTENSIONS)}), which "
                "may lie in folders of their own."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def read_texts(source: str) -> list[str]:
    """Texts of a file, empty ones left out.

    Args:
        source: A text file with one text a line; a ``.csv`` file with a column ``caption``; a ``.tsv`` file with the
            texts in its first column and no heading, as Conceptual Captions come; or ``imagenet``: "a photo of a …" for
            each of its 1000 classes.

    Raises:
        UnsupportedSetup: No such file, or a table without the column.
    """
    if source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return [f"a photo of a {name}." for name in IMAGENET_CLASSNAMES]
    path = Path(source).expanduser()
    if not path.is_file():
        raise UnsupportedSetup(
            f"The reference texts: there is no file {source}. Expected a text file with one text a line, a .csv file "
            "with a column caption, a .tsv file with the texts in its first column, or 'imagenet'."
        )
    try:
        lines = io.StringIO(path.read_text(encoding="utf-8-sig"))  # Excel writes a byte-order mark
    except (UnicodeDecodeError, OSError) as error:
        raise UnsupportedSetup(f"The reference texts: {source} cannot be read as UTF-8: {error}.") from error
    kind = path.suffix.lower()
    if kind == ".csv":
        rows = csv.DictReader(lines)
        if "caption" not in (rows.fieldnames or ()):
            raise UnsupportedSetup(
                f"{source}: has the columns {', '.join(rows.fieldnames or ['none'])}; expected caption."
            )
        texts = [row["caption"] or "" for row in rows]
    else:
        texts = [line.split("\t")[0] if kind == ".tsv" else line for line in lines]
    return [text.strip() for text in texts if text.strip()]


class _EndlessBatches(Sampler[list[int]]):
    """Numbers of images, batch after batch: pass after pass in an order of its own, without a shorter batch between."""

    def __init__(self, size: int, batch_size: int, seed: int, start: int):
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        number, held = self.start * self.batch_size, (-1, [])
        while True:
            batch = []
            for place in range(number, number + self.batch_size):
                epoch, position = divmod(place, self.size)
                if held[0] != epoch:
                    held = epoch, self._order(epoch)
                batch.append(held[1][position])
            number += self.batch_size
            yield batch

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed((1_000_003 * self.seed + epoch) % 2**63)
        return torch.randperm(self.size, generator=generator).tolist()


def _collate(items: Sequence[Any]) -> Tensor:
    return torch.stack([_image(item) for item in items])


def _image(item: Any) -> Tensor:
    image = item[0] if isinstance(item, (list, tuple)) and item else item
    if not isinstance(image, Tensor) or image.ndim not in (3, 4):
        found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise UnsupportedSetup(f"A reference image is {found}; expected a tensor [C, H, W], or a batch of them.")
    return image
