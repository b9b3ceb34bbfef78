"""Images that belong together, such as the frames of one video: they are never in two sets."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lightning_soup.errors import UnsupportedSetup

__all__ = ["check_apart", "check_pattern", "group_keys", "group_parts"]


def check_pattern(pattern: str) -> None:
    """Refuse what is no pattern for groups.

    Raises:
        UnsupportedSetup: No regular expression, or one without a group in round brackets.
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UnsupportedSetup(f"groups={pattern!r} is no regular expression: {error}.") from error
    if groups < 1:
        raise UnsupportedSetup(
            f"groups={pattern!r}: expected a regular expression with one part in round brackets, which names what an "
            r"image belongs to: '^([^/]+)/' for folders of frames, '^(\d+)_' for files called 017_0001.png."
        )


def group_keys(paths: Sequence[str], root: Path, pattern: str) -> list[str]:
    """The group of each image: the first bracketed part of the pattern, in the path inside the class folder.

    Args:
        paths: Files, ``root/<class>/…``.
        root: The folder of the set.
        pattern: A regular expression.

    Raises:
        UnsupportedSetup: A path that the pattern does not find anything in.
    """
    found = []
    for path in paths:
        inside = Path(*Path(path).relative_to(root).parts[1:]).as_posix()
        match = re.search(pattern, inside)
        if match is None or match[1] is None:
            raise UnsupportedSetup(
                f"groups={pattern!r} finds nothing in {inside} ({path}), so it is not known which video it is of. "
                "Change the pattern, which is looked for in the path inside the class folder."
            )
        found.append(match[1])
    return found


def group_parts(keys: Sequence[str], targets: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split images into the larger rest and about ``fraction`` of them, whole groups only, each class by itself.

    Args:
        keys: The group of each image.
        targets: Its class; a group with several counts as of its most frequent one.
        fraction: Share to hold out.
        seed: Decides which groups these are.

    Returns:
        Indices of the rest and of what is held out, each in ascending order.

    Raises:
        UnsupportedSetup: A class has one group only, or none is left of it to train on or to hold out.
    """
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    by_class: dict[int, list[str]] = {}
    for key, indices in members.items():
        labels = [targets[i] for i in indices]
        by_class.setdefault(max(sorted(set(labels)), key=labels.count), []).append(key)
    generator = torch.Generator().manual_seed(seed)
    held_out: list[int] = []
    for label, groups in sorted(by_class.items()):
        if len(groups) < 2:
            raise UnsupportedSetup(
                f"Class number {label} has images of one group only ({groups[0]}), which cannot be both trained on and "
                "held out. Add images of another, or a validation folder."
            )
        order = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        aim, taken = fraction * sum(len(members[key]) for key in groups), 0
        chosen: list[str] = []
        for key in order[:-1]:  # one is left to train on
            size = len(members[key])
            if abs(taken + size - aim) < abs(taken - aim):
                chosen.append(key)
                taken += size
        chosen = chosen or [min(order, key=lambda key: len(members[key]))]  # where all are much larger than the aim
        held_out += [index for key in chosen for index in members[key]]
    outside = set(range(len(keys))) - set(held_out)
    trained, kept = ({targets[index] for index in part} for part in (outside, held_out))
    if missing := trained ^ kept:  # classes whose images are all in groups that count as of another
        label = min(missing)
        raise UnsupportedSetup(
            f"All images of class number {label} would be {'held out' if label in kept else 'trained on'}: they are in "
            "few groups, beside images of other classes. Try another seed, or give a validation folder."
        )
    return sorted(outside), sorted(held_out)


def check_apart(sets: Mapping[str, Sequence[str]]) -> None:
    """Refuse a group that is in two sets.

    Args:
        sets: Groups of the images of each set, by the set's folder.

    Raises:
        UnsupportedSetup: Names the sets and the groups.
    """
    names = list(sets)
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            if shared := sorted(set(sets[one]) & set(sets[other])):
                more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
                raise UnsupportedSetup(
                    f"Images of {', '.join(shared[:5])}{more} are in {one} and in {other}, so scores there would be of "
                    "what was trained on. Move each group to one of them, or change groups."
                )
