"""TorchvisionDataModule: the classification sets of torchvision by name."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torchvision
from torch.utils.data import Dataset

from lightning_soup.data.image_folder import check_short_names, class_folders, name_sets, open_folder
from lightning_soup.data.transforms import DEFAULT_AUGMENTATION, Augmentation, Preprocessing
from lightning_soup.data.vision import VisionDataModule, map_classes, random_parts
from lightning_soup.errors import UnsupportedSetup

__all__ = ["SETS", "SetRecord", "TorchvisionDataModule"]


@dataclass(frozen=True)
class SetRecord:
    """How the constructor of a set is asked for its parts.

    Args:
        train: Arguments that select the training part.
        test: Arguments that select the test part; None: the set is one piece, to be split at random.
        val: Arguments that select the validation part; None: it has none.
        args: Other arguments that it needs.
        names: Names of the classes, where torchvision does not give them.
        unnamed: Number of classes, where there are no names: all that is known of a class is its number.
        download: Whether torchvision can download it.
        on_disk: Whether it has a root folder at all.
    """

    train: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] | None = None
    val: dict[str, Any] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    unnamed: int | None = None
    download: bool = True
    on_disk: bool = True


def _by_flag(**options: Any) -> SetRecord:
    return SetRecord(train={"train": True}, test={"train": False}, **options)


def _by_split(train: str = "train", test: str = "test", val: str | None = None, **options: Any) -> SetRecord:
    own_val = None if val is None else {"split": val}
    return SetRecord(train={"split": train}, test={"split": test}, val=own_val, **options)


_DIGITS = tuple("0123456789")

SETS: dict[str, SetRecord] = {
    "CIFAR10": _by_flag(),
    "CIFAR100": _by_flag(),
    "Caltech101": SetRecord(),
    "Caltech256": SetRecord(),
    "Country211": _by_split(val="valid"),
    "DTD": _by_split(val="val"),
    "EMNIST": _by_flag(args={"split": "balanced"}),
    "EuroSAT": SetRecord(),
    "FER2013": _by_split(unnamed=7, download=False),
    "FGVCAircraft": _by_split(val="val"),
    "FakeData": SetRecord(download=False, on_disk=False),
    "FashionMNIST": _by_flag(),
    "Flowers102": _by_split(val="val", unnamed=102),  # named since torchvision 0.22
    "Food101": _by_split(),
    "GTSRB": _by_split(unnamed=43),
    "ImageNet": _by_split(test="val", download=False),
    "Imagenette": _by_split(test="val"),
    "KMNIST": _by_flag(),
    "MNIST": _by_flag(),
    "OxfordIIITPet": _by_split(train="trainval"),
    "PCAM": _by_split(val="val", unnamed=2),
    "Places365": _by_split(train="train-standard", test="val"),
    "QMNIST": _by_flag(),
    "RenderedSST2": _by_split(val="val"),
    "SEMEION": SetRecord(names=_DIGITS),
    "STL10": _by_split(),
    "SUN397": SetRecord(),
    "SVHN": _by_split(names=_DIGITS),
    "StanfordCars": _by_split(download=False),
    "USPS": _by_flag(names=_DIGITS),
}
"""Name of a torchvision class -> how it is asked for its parts."""


class TorchvisionDataModule(VisionDataModule):
    """A classification set of torchvision, with shifted test sets beside its own.

    The set's own validation part is used where it has one; elsewhere a share of the training images is held out. A
    set that comes in one piece (EuroSAT, Caltech101, …) is split at random, by ``seed``.

    Args:
        name: Class name in torchvision.datasets, for example ``CIFAR10``, ``Flowers102``, ``EuroSAT``.
        root: Where the set lies, or goes.
        download: Download what is missing.
        shifted: More test sets: names of torchvision sets, or folders with one folder per class. A list, or a mapping
            from a short name to either. Classes are matched by name and may be missing, but not be new. Sets that
            do not name their classes have ``0``, ``1``, …
        set_args: Other arguments of the set, for example ``{size: 160px}`` for Imagenette.
        shifted_args: The same for shifted sets, by their short names.
        model_name: The timm model to be trained; the size and normalisation of the images follow from it.
        img_size: Side of the images, instead of the model's. This or ``model_name`` is needed.
        mean: Mean of the three channels, instead of the model's. Grey images are repeated in three channels.
        std: Deviation of the three channels, instead of the model's.
        crop_pct: Share of the side that the centre crop of evaluation keeps, instead of the model's: 1 for CLIP.
        augmentation: Random changes of the training images.
        val_fraction: Share of the training images held out where the set has no validation part.
        third_fraction: Share of the validation images that are kept for a third split, which neither trains nor
            validates; see :class:`.EvolutionarySoup`.
        test_fraction: Share of all images that become the test set where the set comes in one piece.
        seed: Decides which these are.
        batch_size: Images per batch.
        num_workers: Loader processes.

    Raises:
        UnsupportedSetup: torchvision has no such set, it is not on disk, or classes disagree.
    """

    def __init__(
        self,
        name: str,
        root: str = "data",
        download: bool = False,
        shifted: list[str] | dict[str, str] | None = None,
        set_args: dict[str, Any] | None = None,
        shifted_args: dict[str, dict[str, Any]] | None = None,
        model_name: str | None = None,
        img_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        crop_pct: float | None = None,
        augmentation: Augmentation = DEFAULT_AUGMENTATION,
        val_fraction: float = 0.1,
        third_fraction: float = 0.0,
        test_fraction: float = 0.2,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int = 4,
    ):
        if name not in SETS:
            by_lower_case = {known.lower(): known for known in SETS}
            close = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
            raise UnsupportedSetup(
                f"name={name!r} is not a classification set of torchvision."
                + (f" Did you mean {by_lower_case[close[0]]}?" if close else "")
                + f" Available: {', '.join(SETS)}."
            )
        if not 0 < test_fraction < 1:
            raise UnsupportedSetup(f"test_fraction={test_fraction}: expected a fraction between 0 and 1.")
        preprocessing = Preprocessing(model_name, img_size, mean, std, crop_pct)
        super().__init__(preprocessing, augmentation, val_fraction, third_fraction, seed, batch_size, num_workers)
        self.name, self.root, self.download, self.test_fraction = name, root, download, test_fraction
        self.shifted = name_sets(shifted)
        for short, source in self.shifted.items():
            if source not in SETS and not Path(source).is_dir():
                raise UnsupportedSetup(
                    f"The shifted set {short}: {source} is neither an existing folder nor a set of torchvision. "
                    f"Available sets: {', '.join(SETS)}."
                )
        check_short_names("shifted_args", shifted_args or {}, self.shifted)
        self.set_args, self.shifted_args = set_args or {}, shifted_args or {}
        self.test_names = ["test", *self.shifted]
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes; opens the training set. None where torchvision knows their numbers only."""
        names = self._names()
        return None if SETS[self.name].unnamed and names[0] == "0" else names

    @property
    def num_classes(self) -> int:
        """Number of classes; opens the training set."""
        return len(self._names())

    def _names(self) -> list[str]:
        """Names of the classes, or their numbers."""
        if self._class_names is None:
            self._class_names = _class_names(self.name, self._open(self.name, "train", self.set_args))
        return self._class_names

    def prepare_data(self) -> None:
        """Download every part of every set, if asked to."""
        if not self.download:
            return
        for part in ("train", "val", "test"):
            self._open(self.name, part, self.set_args, download=True)
        for short, source in self.shifted.items():
            if source in SETS:
                self._open(source, "test", self.shifted_args.get(short, {}), download=True)

    def open_train(self) -> tuple[Dataset, Sequence[int] | None]:
        """The training part, or what the test share leaves of a set in one piece."""
        images = self._open(self.name, "train", self.set_args)
        if SETS[self.name].test is None:
            return images, random_parts(len(images), self.test_fraction, self.seed)[0]
        return images, None

    def open_val(self) -> tuple[Dataset, None] | None:
        """The validation part, where the set has one."""
        return None if SETS[self.name].val is None else (self._open(self.name, "val", self.set_args), None)

    def open_tests(self) -> list[tuple[Dataset, Sequence[int] | None, dict[int, int] | None]]:
        """The test part and the shifted sets."""
        images = self._open(self.name, "test", self.set_args)
        indices = None
        if SETS[self.name].test is None:
            indices = random_parts(len(images), self.test_fraction, self.seed)[1]
        return [(images, indices, None), *(self._open_shifted(short) for short in self.shifted)]

    def _open_shifted(self, short: str) -> tuple[Dataset, None, dict[int, int] | None]:
        source = self.shifted[short]
        if source in SETS:
            images = self._open(source, "test", self.shifted_args.get(short, {}))
            found = _class_names(source, images)
        else:
            images, found = open_folder(Path(source)), class_folders(Path(source))
        return images, None, map_classes(found, self._names(), f"the shifted set {short}", subset=True)

    def _open(self, name: str, part: str, args: dict[str, Any], download: bool = False) -> Dataset:
        record = SETS[name]
        arguments = {**record.args, **args, **(getattr(record, part) or {})}
        if record.on_disk:
            arguments["root"] = self.root
        if record.download:
            arguments["download"] = download
        try:
            images = getattr(torchvision.datasets, name)(**arguments)
        except (RuntimeError, OSError, TypeError, ValueError, ImportError) as error:
            way = "pass download=True" if record.download else "put its files there as torchvision's page of it says"
            raise UnsupportedSetup(
                f"torchvision could not open {name} ({part}) in {self.root}: {error}\n"
                f"If the set is not there, {way}; check root and the set's other arguments."
            ) from error
        if name == "SUN397":  # is listed in the order of the file system, on which the split would depend
            order = sorted(range(len(images)), key=images._image_files.__getitem__)
            images._image_files = [images._image_files[i] for i in order]
            images._labels = [images._labels[i] for i in order]
        return images


def _class_names(name: str, images: Dataset) -> list[str]:
    named = getattr(images, "classes", None) or getattr(images, "categories", None) or SETS[name].names
    if named is None:
        count = SETS[name].unnamed or images.num_classes  # only FakeData counts its own
        return [str(number) for number in range(count)]
    # ImageNet gives several words for a class; MNIST calls its classes "7 - seven".
    words = [entry if isinstance(entry, str) else ", ".join(entry) for entry in named]
    return [re.sub(r"^(\d) - \w+$", r"\1", word) for word in words]
