"""Tiny image sets in the files that torchvision reads: the 11 sets of ZSCL's multi-domain benchmark (MTIL).

Every class is a plain colour (a grey level in MNIST) with noise on it; no two images are equal.
"""

import colorsys
import json
import pickle
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

MTIL = {
    "FGVCAircraft": ["707-320", "A300B4", "F/A-18", "Spitfire"],
    "Caltech101": ["Faces", "Faces_easy", "accordion", "airplanes"],
    "CIFAR100": ["apple", "aquarium_fish", "lawn_mower", "sweet_pepper"],
    "DTD": ["banded", "cobwebbed", "polka-dotted", "zigzagged"],
    "EuroSAT": ["AnnualCrop", "Forest", "HerbaceousVegetation", "SeaLake"],
    "Flowers102": ["pink primrose", "colt's foot", "water lily", "blackberry lily"],
    "Food101": ["apple_pie", "baby_back_ribs", "pho", "waffles"],
    "MNIST": list("0123456789"),
    "OxfordIIITPet": ["Abyssinian", "American Bulldog", "Egyptian Mau", "Yorkshire Terrier"],
    "StanfordCars": ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van Minivan 2012"],
    "SUN397": ["abbey", "airplane_cabin", "apartment_building/outdoor", "youth_hostel"],
}
"""Name of a set, in the benchmark's order -> the classes that are written, as TorchvisionDataModule spells them."""

FLOWERS = [0, 11, 72, 101]
"""Numbers of the written classes of Flowers102, whose 102 names torchvision brings itself. Elsewhere: 0, 1, 2, …"""


def write_mtil(root: Path, names: Sequence[str] = tuple(MTIL), count: int = 3, size: int = 16) -> Path:
    """Write sets side by side below ``root``, as the ``root`` of every one of them.

    Args:
        root: A folder, made if needed.
        names: Which sets.
        count: Images per class in each part. Sets in one piece have three times as many.
        size: Side of the images, where the format does not fix it (CIFAR100: 32, MNIST: 28).
    """
    for name in names:
        _WRITERS[name](_Painter(name, root, count, size))
    return root


@contextmanager
def without_md5() -> Iterator[None]:
    """Let CIFAR100 and Flowers102 take written files: only the checksums of extracted files are not compared."""
    cifar, flowers = torchvision.datasets.CIFAR100, torchvision.datasets.Flowers102
    with pytest.MonkeyPatch.context() as patch:
        for files in ("train_list", "test_list"):
            patch.setattr(cifar, files, [[file, None] for file, _ in getattr(cifar, files)])
        patch.setitem(cifar.meta, "md5", None)
        for key in ("label", "setid"):
            patch.setitem(flowers._file_dict, key, (flowers._file_dict[key][0], None))
        yield


def colour(name: str, index: int) -> np.ndarray:
    """Colour of the class ``MTIL[name][index]``, three channels of 0 to 255."""
    if name == "MNIST":
        return np.full(3, 10 + 25 * index)
    return np.round(255 * np.array(colorsys.hsv_to_rgb(index / len(MTIL[name]), 0.8, 0.8))).astype(int)


class _Painter:
    """Paints the images of one set, and counts them."""

    def __init__(self, name: str, root: Path, count: int, size: int):
        self.name, self.root, self.count, self.size = name, root, count, size
        self.random = np.random.default_rng(list(MTIL).index(name))
        self.number = 0

    def plan(self, part: str) -> Iterator[tuple[int, str, int]]:
        """Index and name of the class, and a number from 1 on, of each image of ``train``, ``val``, ``test``, all."""
        for _ in range(self.count * (3 if part == "all" else 1)):
            for index, word in enumerate(MTIL[self.name]):
                self.number += 1
                yield index, word, self.number

    def pixels(self, index: int, size: int | None = None) -> np.ndarray:
        noise = self.random.integers(-10, 11, (size or self.size, size or self.size, 3))
        return (colour(self.name, index) + noise).clip(0, 255).astype(np.uint8)

    def image(self, index: int, *place: str) -> None:
        path = self.root.joinpath(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels(index)).save(path, quality=95)

    def lines(self, lines: Sequence[str], *place: str) -> None:
        path = self.root.joinpath(*place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))


def _aircraft(paint: _Painter) -> None:
    folder = ("fgvc-aircraft-2013b", "data")
    paint.lines(MTIL[paint.name], *folder, "variants.txt")
    for part in ("train", "val", "test"):
        lines = []
        for index, word, number in paint.plan(part):
            paint.image(index, *folder, "images", f"{number:07d}.jpg")
            lines.append(f"{number:07d} {word}")
        paint.lines(lines, *folder, f"images_variant_{part}.txt")


def _caltech(paint: _Painter) -> None:
    folder = ("caltech101", "101_ObjectCategories")
    paint.image(0, *folder, "BACKGROUND_Google", "image_0001.jpg")
    for index, word, number in paint.plan("all"):
        paint.image(index, *folder, word, f"image_{(number - 1) // len(MTIL[paint.name]) + 1:04d}.jpg")


def _cifar(paint: _Painter) -> None:
    folder = paint.root / "cifar-100-python"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        labels = [index for index, _, _ in paint.plan(part)]
        data = np.stack([paint.pixels(index, 32).transpose(2, 0, 1).ravel() for index in labels])
        content = {"data": data, "fine_labels": labels, "coarse_labels": [0] * len(labels)}
        (folder / part).write_bytes(pickle.dumps(content))
    names = {"fine_label_names": MTIL[paint.name], "coarse_label_names": ["things"]}
    (folder / "meta").write_bytes(pickle.dumps(names))


def _dtd(paint: _Painter) -> None:
    for part in ("train", "val", "test"):
        lines = []
        for index, word, number in paint.plan(part):
            lines.append(f"{word}/{word}_{number:04d}.jpg")
            paint.image(index, "dtd", "dtd", "images", lines[-1])
        paint.lines(lines, "dtd", "dtd", "labels", f"{part}1.txt")


def _eurosat(paint: _Painter) -> None:
    for index, word, number in paint.plan("all"):
        paint.image(index, "eurosat", "2750", word, f"{word}_{number}.jpg")


def _flowers(paint: _Painter) -> None:
    from scipy.io import savemat

    labels, parts = [], {}
    for part, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        plan = list(paint.plan(part))
        for index, _, number in plan:
            paint.image(index, "flowers-102", "jpg", f"image_{number:05d}.jpg")
        labels += [FLOWERS[index] + 1 for index, _, _ in plan]
        parts[key] = [number for _, _, number in plan]
    savemat(paint.root / "flowers-102" / "imagelabels.mat", {"labels": np.array(labels, dtype=np.uint8)})
    savemat(paint.root / "flowers-102" / "setid.mat", parts)


def _food(paint: _Painter) -> None:
    for part in ("train", "test"):
        content = {word: [] for word in MTIL[paint.name]}
        for index, word, number in paint.plan(part):
            content[word].append(f"{word}/{number}")
            paint.image(index, "food-101", "images", f"{word}/{number}.jpg")
        paint.lines([json.dumps(content)], "food-101", "meta", f"{part}.json")


def _mnist(paint: _Painter) -> None:
    folder = paint.root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, file in (("train", "train"), ("test", "t10k")):
        labels = np.array([index for index, _, _ in paint.plan(part)], dtype=np.uint8)
        images = np.stack([paint.pixels(index, 28)[..., 0] for index in labels])
        (folder / f"{file}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (folder / f"{file}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + labels.tobytes())


def _pets(paint: _Painter) -> None:
    cats = ("Abyssinian", "Egyptian Mau")  # whose files begin with a capital letter
    for part, file in (("train", "trainval"), ("test", "test")):
        lines = []
        for index, word, number in paint.plan(part):
            stem = f"{(word if word in cats else word.lower()).replace(' ', '_')}_{number}"
            paint.image(index, "oxford-iiit-pet", "images", f"{stem}.jpg")
            lines.append(f"{stem} {index + 1} {1 if word in cats else 2} 1")
        paint.lines(lines, "oxford-iiit-pet", "annotations", f"{file}.txt")


def _cars(paint: _Painter) -> None:
    from scipy.io import savemat

    folder = paint.root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(MTIL[paint.name], dtype=object)})
    for part, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = []
        for index, _, number in paint.plan(part):
            paint.image(index, "stanford_cars", f"cars_{part}", f"{number:05d}.jpg")
            rows.append((np.uint8(index + 1), f"{number:05d}.jpg"))
        savemat(folder / file, {"annotations": np.array(rows, dtype=[("class", object), ("fname", object)])})


def _sun(paint: _Painter) -> None:
    paint.lines([f"/{word[0]}/{word}" for word in MTIL[paint.name]], "SUN397", "ClassName.txt")
    for index, word, number in paint.plan("all"):
        paint.image(index, "SUN397", word[0], word, f"sun_{number:08d}.jpg")


_WRITERS = {
    "FGVCAircraft": _aircraft,
    "Caltech101": _caltech,
    "CIFAR100": _cifar,
    "DTD": _dtd,
    "EuroSAT": _eurosat,
    "Flowers102": _flowers,
    "Food101": _food,
    "MNIST": _mnist,
    "OxfordIIITPet": _pets,
    "StanfordCars": _cars,
    "SUN397": _sun,
}
