"""Six corruptions of images: pure functions on a batch, and the table that names them.

Each takes images ``[B, C, H, W]`` with values 0…1 and a generator, and returns a new batch of the same shape in
the same range. The strengths suit images of 28×28 with a dark background: a model that reads the clean images
at 95 % reads these at about two thirds, so that there is something to lose and to win.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CORRUPTIONS", "add_noise", "blur", "corrupt", "lower_contrast", "occlude", "rotate", "shift"]

Corruption = Callable[[Tensor, torch.Generator], Tensor]


def add_noise(images: Tensor, generator: torch.Generator, sigma: float = 0.35) -> Tensor:
    """Gaussian noise of standard deviation ``sigma`` on every pixel, clipped to 0…1."""
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return (images + sigma * noise).clamp(0, 1)


def blur(images: Tensor, generator: torch.Generator, times: int = 2) -> Tensor:
    """A 3×3 box blur, ``times`` over; the generator is not used."""
    for _ in range(times):
        images = F.avg_pool2d(images, kernel_size=3, stride=1, padding=1)
    return images


def rotate(images: Tensor, generator: torch.Generator, degrees: float = 25.0) -> Tensor:
    """Turn every image by ``degrees``, to the left or to the right at random."""
    angle = math.radians(degrees) * _random_signs(len(images), generator)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    theta = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3).to(images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def occlude(images: Tensor, generator: torch.Generator, size: int = 7) -> Tensor:
    """Cover a square of ``size``×``size`` pixels at a random place with the background (0)."""
    count, _, height, width = images.shape
    top = torch.randint(height - size + 1, (count, 1), generator=generator)
    left = torch.randint(width - size + 1, (count, 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    covered_BH = (rows >= top) & (rows < top + size)
    covered_BW = (columns >= left) & (columns < left + size)
    covered = covered_BH[:, None, :, None] & covered_BW[:, None, None, :]
    return images.masked_fill(covered, 0.0)


def shift(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Move every image by ``pixels`` along both axes, each way at random; background comes in."""
    count, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4)
    # With the padding, a window that starts at 0 moves the picture towards the end, one at 2·pixels towards
    # the start.
    top = pixels * (1 + _random_signs(count, generator).long())
    left = pixels * (1 + _random_signs(count, generator).long())
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[:, None, None], rows, columns]


def lower_contrast(images: Tensor, generator: torch.Generator, factor: float = 0.35) -> Tensor:
    """Scale the distance of every pixel from its image's mean by ``factor``; the generator is not used."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + factor * (images - mean)


CORRUPTIONS: dict[str, Corruption] = {
    "noise": add_noise,
    "blur": blur,
    "rotation": rotate,
    "occlusion": occlude,
    "shift": shift,
    "contrast": lower_contrast,
}
"""Name of a corruption -> the function."""


def corrupt(images: Tensor, name: str, seed: int) -> Tensor:
    """Apply one corruption of the table, the same way for the same seed whatever else was drawn before.

    Args:
        images: ``[B, C, H, W]``, values 0…1.
        name: A key of ``CORRUPTIONS``.
        seed: Seed of the corruption's own generator.
    """
    return CORRUPTIONS[name](images, torch.Generator().manual_seed(seed))


def _random_signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=generator).mul(2).sub(1).float()
