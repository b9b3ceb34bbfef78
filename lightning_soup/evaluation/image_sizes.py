"""Sizes of images: how they are rounded, what they cost, and models that take another one than they were built for."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_soup.errors import UnsupportedSetup

__all__ = ["patch_of", "resized", "smart_resize", "snapped", "timm_at_size", "tokens_of"]

_PLAIN = 32  # pixels; what a token of a network without patches is taken for, the stride of most of them


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 3136, max_pixels: int = 1_003_520
) -> tuple[int, int]:
    """The size that an image is brought to: sides that are multiples of a factor, an area within bounds.

    The aspect ratio is kept up to rounding, which is to the nearest multiple, ties to the even one.

    Args:
        height: Of the image, in pixels.
        width: Likewise.
        factor: f.
        min_pixels: lo: smaller images are enlarged to this area.
        max_pixels: hi: larger ones are reduced; of very long ones a side is ``factor`` at least, which may exceed it.

    Returns:
        Height and width.

    Raises:
        UnsupportedSetup: Bounds or sides that cannot be, or one side more than 200 times the other.

    Source: the rule of Qwen2-VL, which MindVL (arXiv 2509.11662) uses; the guard against sides of 0 is ours.
    """
    check_bounds(min_pixels, max_pixels)
    if min(height, width, factor) < 1:
        raise UnsupportedSetup(f"An image of {height}×{width} with factor={factor}: expected 1 or more of each.")
    if max(height, width) > 200 * min(height, width):
        raise UnsupportedSetup(
            f"An image of {height}×{width} is more than 200 times as long as wide. Crop or leave it out."
        )
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def check_bounds(low: int, high: int) -> None:
    """Refuse bounds of areas that cannot be.

    Raises:
        UnsupportedSetup: Not 1 ≤ low ≤ high.
    """
    if not 1 <= low <= high:
        raise UnsupportedSetup(f"Bounds of ({low}, {high}) pixels: expected 1 ≤ lowest ≤ highest.")


def snapped(size: int, patch: int, snap: str = "error") -> int:
    """A side that patches of this size cover.

    Args:
        size: In pixels.
        patch: p.
        snap: ``error``, or ``nearest``: max(p, ⌊x/p + ½⌋·p).

    Raises:
        UnsupportedSetup: Less than a pixel, or no multiple with ``error``.
    """
    if size < 1:
        raise UnsupportedSetup(f"size {size}: expected 1 pixel or more.")
    near = max(patch, math.floor(size / patch + 0.5) * patch)
    if snap == "error" and near != size:
        raise UnsupportedSetup(
            f"size {size} is no multiple of the patch size {patch}. The nearest is {near}; snap='nearest' takes it."
        )
    return near


def patch_of(model: nn.Module) -> tuple[int, int] | None:
    """Patch height and width of a vision transformer of timm or open_clip; None of networks without patches.

    It is what the side of an image is divided by: the stride of patches that overlap, and of hybrids, whose patches are
    cut out of the features of a CNN, that of both together.
    """
    for place in (model, getattr(model, "visual", None), getattr(getattr(model, "visual", None), "trunk", None)):
        embedding = getattr(place, "patch_embed", None)
        own = getattr(embedding, "patch_size", None)
        ratio = embedding.feat_ratio(as_scalar=False) if hasattr(embedding, "feat_ratio") else None
        stride = None if own is None else getattr(getattr(embedding, "proj", None), "stride", None)
        for found in (ratio, stride, getattr(place, "patch_size", None), own):
            if isinstance(found, int):
                return found, found
            if isinstance(found, (tuple, list)) and len(found) == 2:
                return int(found[0]), int(found[1])
    return None


def check_patches(model: nn.Module, size: Sequence[int]) -> None:
    """Refuse a size that a model's patches do not divide: it would leave pixels at the margins out.

    Raises:
        UnsupportedSetup: They do not.
    """
    patch = patch_of(model)
    if patch is not None and (size[0] % patch[0] or size[1] % patch[1]):
        raise UnsupportedSetup(
            f"{type(model).__name__} cannot take images of {size[0]}×{size[1]}: its patches are {patch[0]}×{patch[1]}. "
            "Choose sizes that they divide."
        )


def tokens_of(model: nn.Module, size: tuple[int, int]) -> int:
    """Tokens of an image: its patches and the model's prefix tokens; without patches, squares of 32×32 pixels."""
    patch = patch_of(model)
    if patch is None:
        return math.ceil(size[0] / _PLAIN) * math.ceil(size[1] / _PLAIN)
    visual = getattr(model, "visual", model)
    visual = getattr(visual, "trunk", visual)
    prefix = getattr(visual, "num_prefix_tokens", 1 if getattr(visual, "class_embedding", None) is not None else 0)
    return math.ceil(size[0] / patch[0]) * math.ceil(size[1] / patch[1]) + int(prefix)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images ``[B, C, H, W]`` at another size: bicubic with antialias, computed in float32 whatever their type.

    What bicubic resizing puts beyond the range of an integer type is cut off: 256 as a byte would be 0.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    found = functional.interpolate(images.float(), tuple(size), mode="bicubic", antialias=True, align_corners=False)
    if not images.dtype.is_floating_point:
        limits = torch.iinfo(images.dtype)
        found = found.round().clamp(limits.min, limits.max)
    return found.to(images.dtype)


def timm_at_size(model: nn.Module, size: Sequence[int]) -> nn.Module:
    """A model of timm that takes images of this size: itself where it is built for no other, else a copy.

    Position embeddings of the copy are resampled from those of the model, always from their own grid. The model itself
    is never changed: its parameters may be in the hands of an optimizer or of averages.

    Args:
        model: Any; those with ``set_input_size`` (ViT, BEiT, EVA, Swin, MaxxViT) can be brought to another size.
        size: Height and width.

    Raises:
        UnsupportedSetup: It cannot take this size, or its patches do not divide it.
    """
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if getattr(model, "dynamic_img_size", False) or not hasattr(model, "set_input_size") or own == tuple(size):
        return model
    check_patches(model, size)
    changed = copy.deepcopy(model)
    try:
        with torch.no_grad():
            changed.set_input_size(tuple(size))
    except Exception as error:  # whatever a model makes of a size that it cannot have
        raise UnsupportedSetup(
            f"{type(model).__name__} cannot take images of {size[0]}×{size[1]}: {str(error).rstrip('.')}. Choose sizes "
            "that its patches (and windows) divide."
        ) from error
    return changed.train(model.training)
