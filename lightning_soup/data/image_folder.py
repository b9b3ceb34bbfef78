"""ImageFolderDataModule: your own images, one folder per class."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from lightning_soup.data.groups import check_apart, check_pattern, group_keys, group_parts
from lightning_soup.data.shifted_classes import competing_classes
from lightning_soup.data.transforms import DEFAULT_AUGMENTATION, Augmentation, Preprocessing
from lightning_soup.data.vision import VisionDataModule, map_classes
from lightning_soup.errors import UnsupportedSetup

__all__ = ["ImageFolderDataModule", "open_folder"]


class ImageFolderDataModule(VisionDataModule):
    """Images in folders: ``root/train/<class>/*.jpg``, and the same for validation, test and shifted test sets.

    Classes are numbered in the alphabetical order of the training folders, and every other set is matched to them
    by name.

    Args:
        root: The folder that holds the sets.
        train: Training folder, inside ``root``.
        val: Validation folder. Where there is none, ``val_fraction`` of the training images is held out.
        test: Test folder. It is only needed for testing.
        shifted: More test sets, which are scored beside the main one: sketches, another camera, another hospital. A
            list of folders (inside ``root``, or anywhere), or a mapping from a short name to a folder. They may
            lack classes.
        shifted_classes: How the classes of shifted sets compete, by the sets' short names. ``own``: only the classes
            that the set has folders for, as is usual for ImageNet-R and -A; by default all training classes do. Or a
            JSON file: folder -> training class, or a list of several whose largest logit counts, as for ObjectNet;
            folders that it does not name are left out.
        model_name: The timm model to be trained; the size and normalisation of the images follow from it.
        img_size: Side of the images, instead of the model's. This or ``model_name`` is needed.
        mean: Mean of the three channels, instead of the model's.
        std: Deviation of the three channels, instead of the model's.
        crop_pct: Share of the side that the centre crop of evaluation keeps, instead of the model's: 1 for CLIP.
        augmentation: Random changes of the training images.
        val_fraction: Share of the training images held out where there is no validation folder.
        third_fraction: Share of the validation images that are kept for a third split, which neither trains nor
            validates; see :class:`.EvolutionarySoup`.
        seed: Decides which these are.
        groups: Which images belong together, such as the frames of one video: a regular expression that is looked for
            in the path inside the class folder, and whose part in round brackets names the group. ``^([^/]+)/`` for
            ``real/<video>/<frame>.png``, ``^([0-9]+)_`` for ``real/017_01.png``. Groups are held out as a whole, and
            one that is in two of the training, validation and test folders is an error.
        batch_size: Images per batch.
        num_workers: Loader processes.

    Raises:
        UnsupportedSetup: A folder is missing or has no images in a class, classes disagree, or a value is out of range.
    """

    def __init__(
        self,
        root: str,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        shifted: list[str] | dict[str, str] | None = None,
        shifted_classes: dict[str, str] | None = None,
        model_name: str | None = None,
        img_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        crop_pct: float | None = None,
        augmentation: Augmentation = DEFAULT_AUGMENTATION,
        val_fraction: float = 0.1,
        third_fraction: float = 0.0,
        seed: int = 0,
        groups: str | None = None,
        batch_size: int = 64,
        num_workers: int = 4,
    ):
        if groups is not None:
            check_pattern(groups)
        preprocessing = Preprocessing(model_name, img_size, mean, std, crop_pct)
        super().__init__(preprocessing, augmentation, val_fraction, third_fraction, seed, batch_size, num_workers)
        self.root, self.train, self.val, self.test = Path(root), train, val, test
        self.groups = groups
        self._listed: dict[Path, ImageFolder] = {}
        self.shifted = name_sets(shifted)
        self.test_names = ["test", *self.shifted]
        self.shifted_classes = shifted_classes or {}
        check_short_names("shifted_classes", self.shifted_classes, self.shifted)
        self.test_classes: dict[str, list[list[int]]] = {}  # which compete, known when the test sets are opened

    @property
    def class_names(self) -> list[str]:
        """Names of the training folders, in alphabetical order."""
        return class_folders(self.root / self.train)

    def open_train(self) -> tuple[Dataset, None]:
        """The training folder."""
        return self._images(self.root / self.train), None

    def open_val(self) -> tuple[Dataset, dict[int, int] | None] | None:
        """The validation folder, or None without one."""
        folder = self.root / self.val
        if not folder.is_dir():
            return None
        self._check_apart(self.train, self.val)
        return self._open(folder, subset=False)

    def split(self, images: Dataset, indices: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
        """Which images to hold out: single ones, or whole groups."""
        if self.groups is None:
            return super().split(images, indices, fraction)
        paths, targets = zip(*(images.samples[i] for i in indices), strict=True)
        return group_parts(group_keys(paths, Path(images.root), self.groups), targets, fraction, self.seed)

    def open_tests(self) -> list[tuple[Dataset, Sequence[int] | None, dict[int, int] | None]]:
        """The test folder and the shifted ones."""
        self._check_apart(self.train, self.val, self.test)
        images, class_map = self._open(self.root / self.test, subset=False)
        return [(images, None, class_map), *(self._open_shifted(short) for short in self.shifted)]

    def _check_apart(self, *names: str) -> None:
        """Refuse a group that is in two of these folders; those that there are not are passed over."""
        if self.groups is None:
            return
        folders = [self.root / name for name in names if (self.root / name).is_dir()]
        keys = {}
        for folder in folders:
            paths = [path for path, _ in self._images(folder).samples]
            keys[str(folder)] = group_keys(paths, folder, self.groups)
        check_apart(keys)

    def _open_shifted(self, short: str) -> tuple[Dataset, Sequence[int] | None, dict[int, int] | None]:
        folder, source = self.root / self.shifted[short], self.shifted_classes.get(short)
        if source is None:
            images, class_map = self._open(folder, subset=True)
            return images, None, class_map
        images = open_folder(folder)
        covered = competing_classes(source, images.classes, self.class_names, str(folder))
        self.test_classes[short] = list(covered.values())
        # Any of the training classes that a folder covers can stand for it.
        class_map = {i: covered[name][0] for i, name in enumerate(images.classes) if name in covered}
        return images, [i for i, target in enumerate(images.targets) if target in class_map], class_map

    def _open(self, folder: Path, subset: bool) -> tuple[Dataset, dict[int, int] | None]:
        class_map = map_classes(class_folders(folder), self.class_names, str(folder), subset=subset)
        return self._images(folder), class_map

    def _images(self, folder: Path) -> ImageFolder:
        """A folder, listed once: a large one takes a while."""
        if folder not in self._listed:
            self._listed[folder] = open_folder(folder)
        return self._listed[folder]


def name_sets(shifted: Sequence[str] | dict[str, str] | None) -> dict[str, str]:
    """Give every shifted set a short name: its own, or the last part of its path.

    Raises:
        UnsupportedSetup: Two sets have one name, or one is called ``test``.
    """
    if isinstance(shifted, dict):
        named = list(shifted.items())
    else:
        named = [(Path(source).name, source) for source in shifted or []]
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1 or name == "test"})
    if twice:
        raise UnsupportedSetup(
            f"Two test sets are named {', '.join(twice)} (the main one is named test). Give the shifted sets as a "
            "mapping from different names to their places."
        )
    return dict(named)


def check_short_names(option: str, given: Iterable[str], shifted: Iterable[str]) -> None:
    """Refuse options for shifted sets that there are not.

    Raises:
        UnsupportedSetup: A name that is not the short name of a shifted set.
    """
    if unknown := set(given) - set(shifted):
        raise UnsupportedSetup(
            f"{option} for {', '.join(sorted(unknown))}, but the shifted sets are: {', '.join(shifted) or 'none'}."
        )


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders of a set, in alphabetical order.

    Raises:
        UnsupportedSetup: The folder is missing, or has no folders in it.
    """
    if not folder.is_dir():
        beside = sorted(path.name for path in folder.parent.glob("*/")) if folder.parent.is_dir() else []
        there = f"{folder.parent} has: {', '.join(beside) or 'no folders'}." if folder.parent.is_dir() else ""
        raise UnsupportedSetup(f"There is no folder {folder}. {there} Name the right one, or make it.")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        raise UnsupportedSetup(
            f"{folder} has no folders in it. Expected one folder per class, with the images of the class inside."
        )
    return names


def open_folder(folder: Path) -> ImageFolder:
    """Open a folder of class folders.

    Raises:
        UnsupportedSetup: A class has no images.
    """
    names = class_folders(folder)
    images = ImageFolder(str(folder), allow_empty=True)
    filled = set(images.targets)
    empty = [name for number, name in enumerate(names) if number not in filled]
    if empty:
        raise UnsupportedSetup(
            f"No images in these class folders of {folder}: {', '.join(empty)}. Remove them or add images "
            f"({', '.join(IMG_EXTENSIONS)})."
        )
    return images
