"""What a loader gives, as a whole."""

from collections.abc import Iterable

import torch
from torch import Tensor


def read(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """All images and all targets."""
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def keys(images: Tensor) -> list[bytes]:
    """Each image as something that can be compared and hashed."""
    return [image.numpy().tobytes() for image in images]


def contents(loader: Iterable[tuple[Tensor, Tensor]]) -> set[bytes]:
    """The images of a loader, whatever their order."""
    return set(keys(read(loader)[0]))
