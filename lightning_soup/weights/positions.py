"""Position embeddings of images on a grid of patches: found in files, and resampled to another grid."""

import copy
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_soup.errors import IncompatibleIngredients, RecipeError
from lightning_soup.weights.weights_file import WeightsFile

__all__ = ["Grid", "Resampling", "plan_resampling", "resample_positions", "resampled", "tell_size"]

Grid = tuple[int, int]
"""Rows and columns of patches, or height and width in pixels."""

_KINDS = {"pos_embed": "patch_embed.proj.weight", "visual.positional_embedding": "visual.conv1.weight"}
"""How timm and open_clip call the embedding, and the layer that cuts out the patches."""
_TOKENS = ("cls_token", "dist_token", "reg_token", "class_embedding")  # which may have positions before the grid's


def resample_positions(positions: Tensor, new: Grid, old: Grid, prefix: int = 0, *, antialias: bool = True) -> Tensor:
    """Resample position embeddings by a bicubic kernel, as timm and open_clip do when the size of images changes.

    It is a linear map, so it may be done before or after averaging. Do it once, from the grid of training: down and up
    again loses. Computed in float32 or more, as there is no such kernel for 16 bits on a CPU.

    Args:
        positions: ``[1, P + h·w, D]`` or ``[P + h·w, D]``: P prefix tokens, which stay as they are, and the grid.
        new: The grid wanted.
        old: The grid ``(h, w)`` that they lie on.
        prefix: P.
        antialias: Smooth before shrinking. It also changes values on enlarging (a = −0.5 instead of −0.75).

    Returns:
        ``[…, P + h'·w', D]`` in the type given; the very tensor given where the grids are equal.

    Raises:
        RecipeError: The grid does not fit the tensor.
    """
    if tuple(new) == tuple(old):
        return positions
    if positions.shape[-2] != prefix + math.prod(old):
        raise RecipeError(
            f"position embeddings {list(positions.shape)} do not lie on a grid of {old[0]}×{old[1]} with {prefix} "
            "tokens before it. Give the grid that they were trained on."
        )
    kept, cells = positions[..., :prefix, :], positions[..., prefix:, :]
    full = torch.promote_types(positions.dtype, torch.float32)
    with torch.autocast(positions.device.type, enabled=False):
        plane = cells.to(full).reshape(1, *old, -1).permute(0, 3, 1, 2)
        plane = F.interpolate(plane, tuple(new), mode="bicubic", antialias=antialias, align_corners=False)
    cells = plane.permute(0, 2, 3, 1).reshape(*positions.shape[:-2], math.prod(new), -1).to(positions.dtype)
    return torch.cat([kept, cells], dim=-2)


@dataclass(frozen=True)
class Resampling:
    """What is done to a position embedding of several checkpoints before they are combined.

    Attributes:
        prefix: Tokens before the grid.
        old: The grid of each checkpoint.
        new: The grid of all of them afterwards.
    """

    prefix: int
    old: tuple[Grid, ...]
    new: Grid

    def plain(self) -> dict[str, Any]:
        """For a record."""
        return {"prefix": self.prefix, "old": [list(grid) for grid in self.old], "new": list(self.new)}

    @classmethod
    def from_plain(cls, value: Any, count: int) -> "Resampling":
        """Read a record.

        Raises:
            ValueError: It is not one of ``count`` checkpoints.
        """
        match value:
            case {"prefix": int(prefix), "old": [*old], "new": new} if prefix >= 0 and len(old) == count:
                if all(_is_grid(grid) for grid in (new, *old)):
                    return cls(prefix, tuple((grid[0], grid[1]) for grid in old), (new[0], new[1]))
        raise ValueError(f"expected prefix, new, and old with {count} grids")


def _is_grid(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)


def plan_resampling(
    files: Sequence[WeightsFile], sizes: Sequence[Grid | int | None], target: Grid | None = None
) -> dict[str, Resampling]:
    """Find the position embeddings that lie on different grids, or not on that of the target.

    Args:
        files: The checkpoints.
        sizes: Height and width in pixels of the images of each, or the side of squares, where known: needed where they
            are not square, and the file's hyperparameters do not say it.
        target: Height and width in pixels that the result is for; by default the grid of the first file.

    Returns:
        By the name of the tensor; empty where nothing needs to be done.

    Raises:
        RecipeError: The target or a size is not a multiple of the patch.
        IncompatibleIngredients: A grid cannot be told from the number of tokens.
    """
    plans = {}
    for name in files[0].specs:
        kind = next((kind for kind in _KINDS if name == kind or name.endswith(f".{kind}")), None)
        found = [file.specs[name].shape for file in files if kind and name in file.specs]
        if len(found) < len(files) or any(len(shape) not in (2, 3) for shape in found):
            continue  # one for check_compatible
        stem = name.removesuffix(kind)
        projection = files[0].specs.get(stem + _KINDS[kind])
        patch = projection.shape[2:] if projection is not None and len(projection.shape) == 4 else None
        counts = [shape[-2] for shape in found]
        alike = len(set(counts)) == 1 and len({_told(file, None, patch) for file in files} - {()}) < 2
        if target is None and alike and not any(isinstance(size, tuple) for size in sizes):
            continue
        special = _special(files[0], stem + kind.rpartition("pos")[0])
        told = [_told(file, size, patch) for file, size in zip(files, sizes, strict=True)]
        prefix, grids = _grids(files, name, counts, told, special)
        if target is not None and patch is None:
            raise RecipeError(f"target_size={target}: the patch of {name!r} is not known; leave target_size out.")
        new = grids[0] if target is None else _patches(target, patch, "target_size")
        if any(grid != new for grid in grids):
            plans[name] = Resampling(prefix, grids, new)
    if target is not None and not plans and not any(_ends(name) for name in files[0].specs):
        raise RecipeError(
            f"target_size={target}: these checkpoints hold no position embeddings on a grid (pos_embed, "
            "visual.positional_embedding), so they have no size. Leave target_size out."
        )
    return plans


def _ends(name: str) -> bool:
    return any(name == kind or name.endswith(f".{kind}") for kind in _KINDS)


def _special(file: WeightsFile, stem: str) -> int:
    """How many tokens that are no patches the model has."""
    specs = [file.specs[stem + token] for token in _TOKENS if stem + token in file.specs]
    return sum(spec.shape[-2] if len(spec.shape) > 1 else 1 for spec in specs)


def _told(file: WeightsFile, size: Grid | int | None, patch: Any) -> tuple[Grid, ...]:
    """The grids that the size given and that of the file's hyperparameters make; a model of many sizes has another."""
    if patch is None:
        return ()
    if isinstance(size, tuple):
        _patches(size, patch, f"the size of {file.label}")
    pairs = [(size, size) if isinstance(size, int) else size, _told_size(file.mapping_beside("hyper_parameters"))]
    return tuple((pair[0] // patch[0], pair[1] // patch[1]) for pair in pairs if pair is not None)


def _patches(size: Grid, patch: Sequence[int], what: str) -> Grid:
    if any(side < 1 or side % step for side, step in zip(size, patch, strict=True)):
        raise RecipeError(
            f"{what} is {size[0]}×{size[1]} pixels, but the patches are {patch[0]}×{patch[1]}: expected multiples of "
            "them."
        )
    return size[0] // patch[0], size[1] // patch[1]


def _grids(
    files: Sequence[WeightsFile], name: str, counts: Sequence[int], told: Sequence[tuple[Grid, ...]], special: int
) -> tuple[int, tuple[Grid, ...]]:
    """The prefix and the grids: all special tokens have a position, or none has.

    Grids that are told decide first: 9 positions may be 3×3, or 2×2 after 5 special tokens. A file that tells none has
    that of another one with as many positions, or a square.
    """
    others = {count: grids for count, grids in zip(counts, told, strict=True) if grids}
    for exact in (True, False):
        for prefix in dict.fromkeys((special, 0)):
            found = [
                _fit(count - prefix, own or others.get(count, ()), exact)
                for count, own in zip(counts, told, strict=True)
            ]
            if all(found):
                return prefix, tuple(found)
    held = ", ".join(f"{file.label}: {count}" for file, count in zip(files, counts, strict=True))
    raise IncompatibleIngredients(
        f"{name!r}: the grid cannot be told from the number of its positions ({held}; {special} tokens are no "
        "patches). Give the image size of each ingredient as [height, width] in lengths."
    )


def _fit(cells: int, told: Sequence[Grid], exact: bool) -> Grid | None:
    for grid in told:
        if math.prod(grid) == cells:
            return grid
    side = 0 if told and exact else math.isqrt(max(cells, 0))
    return (side, side) if side and side * side == cells else None


def resampled(file: WeightsFile, index: int, plans: Mapping[str, Resampling]) -> WeightsFile:
    """A checkpoint with its position embeddings on the new grids; the very file given where nothing changes.

    The image size among its hyperparameters becomes the new one, so that a model is built for these weights.

    Args:
        file: The checkpoint.
        index: Which of the checkpoints of the plans it is.
        plans: What :func:`plan_resampling` found.
    """
    changed = {n: plan for n, plan in plans.items() if plan.old[index] != plan.new}
    if not changed:
        return file
    tensors = {n: resample_positions(file[n], plan.new, plan.old[index], plan.prefix) for n, plan in changed.items()}
    found = file.replaced(tensors)
    found.metadata = copy.deepcopy(dict(file.metadata))
    hparams = found.metadata.get("hyper_parameters")
    for name, plan in changed.items():
        kind = next(kind for kind in _KINDS if name.endswith(kind))
        step = file.specs.get(name.removesuffix(kind) + _KINDS[kind])
        if step is not None and isinstance(hparams, dict):
            tell_size(hparams, tuple(cells * side for cells, side in zip(plan.new, step.shape[2:], strict=True)))
    return found


def _told_size(hparams: Mapping[str, Any]) -> Grid | None:
    """The image size in hyperparameters, from where :func:`tell_size` writes it."""
    config = hparams.get("model_config")
    vision = config.get("vision_cfg") if isinstance(config, Mapping) else None
    size = hparams.get("img_size") or (vision.get("image_size") if isinstance(vision, Mapping) else None)
    if isinstance(size, int):
        return size, size
    return tuple(size) if isinstance(size, (list, tuple)) and [type(side) for side in size] == [int, int] else None


def tell_size(hparams: MutableMapping[str, Any], size: Grid) -> None:
    """Write the image size, in pixels, into hyperparameters that a model is built with, where they hold one.

    Args:
        hparams: Those of :class:`.ImageClassifier` (``img_size``) or :class:`.CLIPClassifier` (``model_config``).
        size: Height and width.
    """
    value = size[0] if size[0] == size[1] else list(size)
    config = hparams.get("model_config")
    if "img_size" in hparams:
        hparams["img_size"] = value
    if isinstance(config, dict) and isinstance(config.get("vision_cfg"), dict):
        config["vision_cfg"]["image_size"] = value
