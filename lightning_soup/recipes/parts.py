"""Dividing a network into parts of consecutive layers, by the names of its tensors."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_soup.errors import RecipeError
from lightning_soup.weights.weights_file import WeightsFile

__all__ = ["blocks_of", "divide", "given_parts", "part_sizes"]

_BLOCK = re.compile(r"^(.*?\.)?(\d+)\.")  # the first number in a name: blocks.3.attn…, layer1.0.conv1…


def part_sizes(layers: int, parts: int) -> list[int]:
    """Sizes of parts that differ by one at most, the larger ones last.

    Args:
        layers: Number of layers L.
        parts: Number of parts K.

    Example:
        >>> part_sizes(26, 3), part_sizes(32, 3)
        ([8, 9, 9], [10, 11, 11])
    """
    small, larger = divmod(layers, parts)
    return [small + (part >= parts - larger) for part in range(parts)]


def divide(weights: WeightsFile, parts: int) -> dict[str, int | None]:
    """The part of each tensor: 0 for the input's, ``parts`` − 1 for the output's, None after the last layer.

    Layers are the numbered blocks of the network (``blocks.0.``, ``blocks.1.``, …), in the order of the file. Where
    there are several such lists, towers are divided each by itself if they have enough blocks; stages are taken in a
    row. What comes before the first block belongs to the first part, what comes after the last to none. Tied tensors
    are of one part, that of the first.

    Raises:
        RecipeError: Fewer blocks than parts.
    """
    lists: dict[str, list[str]] = {}  # by list of blocks: its blocks
    block_of: dict[str, tuple[str, str]] = {}
    for name in weights.specs:
        if match := _BLOCK.match(name):
            prefix, block = match[1] or "", match[0]
            if block not in lists.setdefault(prefix, []):
                lists[prefix].append(block)
            block_of[name] = (prefix, block)
    apart = {prefix: blocks for prefix, blocks in lists.items() if len(blocks) >= parts}
    if apart:  # towers; shorter lists (a head of two layers, a stem) are what comes before or after
        rows = list(apart.values())
    else:
        rows = [[block for blocks in lists.values() for block in blocks]]
    if len(rows[0]) < parts:
        raise RecipeError(
            f"AdaptiveSoup(parts={parts}): {weights.label} has {len(rows[0])} numbered blocks. Ask for fewer parts, or "
            "name the tensors of each with groups=[[…], […]]."
        )
    number = {}
    for blocks in rows:
        edges = [part for part, size in enumerate(part_sizes(len(blocks), parts)) for _ in range(size)]
        number.update(zip(blocks, edges, strict=True))
    found: dict[str, int | None] = {}
    names = list(weights.specs)
    first = next(place for place, name in enumerate(names) if _part_of(name, block_of, number) is not None)
    for place, name in enumerate(names):
        own = _part_of(name, block_of, number)
        found[name] = own if own is not None else 0 if place < first else None
    return tied_together(found, weights)


def given_parts(weights: WeightsFile, groups: Sequence[Sequence[str]]) -> dict[str, int | None]:
    """The part of each tensor by patterns (``blocks.0.*``); None for what no pattern fits.

    Raises:
        RecipeError: A pattern that fits nothing, or a tensor that two parts name.
    """
    found: dict[str, int | None] = dict.fromkeys(weights.specs)
    for part, patterns in enumerate(groups):
        for pattern in patterns:
            names = [name for name in found if fnmatchcase(name, pattern)]
            if not names:
                known = ", ".join(list(found)[:5])
                raise RecipeError(
                    f"AdaptiveSoup: the pattern {pattern!r} of group {part + 1} fits no tensor. The first are: {known}."
                )
            for name in names:
                if found[name] not in (None, part):
                    raise RecipeError(
                        f"AdaptiveSoup: {name} is in group {found[name] + 1} and in group {part + 1}. A tensor has one "
                        "ratio; change the patterns."
                    )
                found[name] = part
    return tied_together(found, weights)


def blocks_of(weights: WeightsFile) -> dict[str, int]:
    """By tensor name, the number of its block; tied tensors have one.

    ``model.layers.3.attn.weight`` belongs to ``model.layers.3``, ``model.head.weight`` to ``model.head``.
    """
    alias = {name: names[0] for names in weights.ties for name in names}
    blocks: dict[str, int] = {}
    found = {}
    for name in weights.specs:
        own = alias.get(name, name)
        numbered = _BLOCK.match(own)
        found[name] = blocks.setdefault(numbered[0] if numbered else own.rpartition(".")[0], len(blocks))
    return found


def tied_together(parts: Mapping[str, int | None], weights: WeightsFile) -> dict[str, int | None]:
    """Tensors that share their values in one part: that of the first."""
    found = dict(parts)
    for names in weights.ties:
        for name in names[1:]:
            found[name] = found[names[0]]
    return found


def _part_of(name: str, block_of: Mapping[str, tuple[str, str]], number: Mapping[str, int]) -> int | None:
    return number.get(block_of[name][1]) if name in block_of else None
