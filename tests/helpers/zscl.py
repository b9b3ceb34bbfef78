"""A tiny ZSCL with a teacher in a file and a reference of noise."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_soup.data.reference import Reference
from lightning_soup.modules.zscl import ZSCL
from tests.helpers.clip import ROWS, TINY_CLIP

TEXTS = ["the top row", "a cat", "a dog at night", "nothing at all", "the bottom row"]


def noise(count: int = 20, size: int = 8, seed: int = 5) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def reference(count: int = 20, **options: Any) -> Reference:
    """20 images in batches of 6, so that a pass ends within a batch, and five texts."""
    return Reference(**{"images": noise(count), "texts": TEXTS, "batch_size": 6, **options})


def tiny_zscl(seed: int = 0, **options: Any) -> ZSCL:
    """A ZSCL with random weights for the rows of RowData."""
    torch.manual_seed(seed)
    defaults = {"model_config": TINY_CLIP, "classnames": ROWS, "templates": ["the {} row"], "lr": 2e-3, "warmup": 2}
    return ZSCL(**{**defaults, "reference": reference(), **options})


def write_teacher(folder: Path, seed: int = 0) -> str:
    """A file with the weights of ``tiny_zscl(seed)``."""
    path = folder / f"teacher-{seed}.pt"
    torch.save(tiny_zscl(seed).model.state_dict(), path)
    return str(path)
