"""Small sets of images on disk: class folders, and MNIST's file format."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_folders(root: Path, classes: Sequence[str], count: int = 3, size: int = 24, seed: int = 0) -> Path:
    """Write ``root/<class>/0.png`` and so on: plain colours that differ between images; the first is grey."""
    colours = np.random.default_rng(seed).integers(0, 256, (len(classes), count, 3), dtype=np.uint8)
    for name, row in zip(classes, colours, strict=True):
        (root / name).mkdir(parents=True)
        for number, colour in enumerate(row):
            if number == 0:
                image = Image.new("L", (size, size), int(colour[0]))
            else:
                image = Image.new("RGB", (size, size + 4), tuple(int(channel) for channel in colour))
            image.save(root / name / f"{number}.png")
    return root


def write_mnist(root: Path, train: int = 40, test: int = 20, name: str = "MNIST") -> Path:
    """Write ``root/MNIST/raw`` as torchvision's MNIST sets read it; image i has the label i mod 10."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *images.shape) + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    return root
