"""Training at several image sizes: which one a step uses, and how many images fit into it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.image_sizes import resized

__all__ = ["TrainSizes"]


class TrainSizes:
    """Resizes each training batch to one of several sizes.

    The size follows from the number of the optimizer step alone: it is the same on all ranks and in all batches of one
    accumulation, and a training that is resumed goes on with the same ones.

    Args:
        sizes: Sides in pixels. A size that stands twice is drawn twice as often.
        token_budget: Most that a step may cost in tokens, as a multiple of what its batch costs at the size that the
            data gives. Where more is drawn, the first images of the (shuffled) batch are taken and the rest left out:
            ⌊B · budget · HW/s²⌋ of B. Attention grows with the square of the tokens of an image, so a larger size still
            costs somewhat more than a smaller one within one budget. None: all images, at whatever cost.

    Raises:
        UnsupportedSetup: No size, one below 1, or a budget that is not above 0.
    """

    def __init__(self, sizes: Sequence[int], token_budget: float | None = None):
        if not sizes:
            raise UnsupportedSetup(
                "train_sizes is empty. Give sides in pixels, such as [192, 224, 256], or leave it out."
            )
        if min(sizes) < 1:
            raise UnsupportedSetup(f"train_sizes={list(sizes)}: expected sides of 1 pixel or more.")
        self.sizes = [(size, size) for size in sizes]
        if token_budget is not None and not 0 < token_budget < math.inf:
            raise UnsupportedSetup(f"token_budget={token_budget}: expected a number above 0, such as 1.")
        self.token_budget = token_budget

    def at(self, step: int) -> tuple[int, int]:
        """The size of an optimizer step."""
        generator = torch.Generator().manual_seed(step)
        return self.sizes[int(torch.randint(len(self.sizes), (), generator=generator))]

    def __call__(self, batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, images ``[B, C, H, W]`` and targets ``[B]``, at the step's size."""
        images, targets = batch
        size = self.at(step)
        if self.token_budget is not None:
            share = self.token_budget * math.prod(images.shape[-2:]) / math.prod(size)
            count = max(1, min(len(images), math.floor(share * len(images))))
            images, targets = images[:count], targets[:count]
        return resized(images, size), targets
