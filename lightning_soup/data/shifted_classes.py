"""Which classes compete on a shifted test set, where its classes are not simply those of the training set."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_soup.errors import UnsupportedSetup

__all__ = ["OWN", "competing_classes"]

OWN = "own"


def competing_classes(
    source: str, folders: Sequence[str], class_names: Sequence[str], place: str
) -> dict[str, list[int]]:
    """The training classes that each class folder of a shifted set covers.

    Args:
        source: ``own``: each folder is the training class of its name; or a JSON file, a mapping from folder to the
            name of a training class, or to a list of such names.
        folders: Names of the set's class folders.
        class_names: Names of the training classes.
        place: Where the folders are, for the message.

    Returns:
        Folder -> numbers of training classes. Folders that the file does not name are left out.

    Raises:
        UnsupportedSetup: No such file, no such mapping, or unknown folders or classes.
    """
    if source == OWN:
        named = {folder: [folder] for folder in folders}
    else:
        named = _read(source)
    missing = [folder for folder in named if folder not in set(folders)]
    if missing:
        raise UnsupportedSetup(
            f"{source} names class folders that {place} does not have: {', '.join(missing[:10])}. It has: "
            f"{', '.join(list(folders)[:10])}."
        )
    number = {name: index for index, name in enumerate(class_names)}
    unknown = [name for names in named.values() for name in names if name not in number]
    if unknown:
        raise UnsupportedSetup(
            f"{place}: no training class is named {', '.join(unknown[:10])} (given by {source}). The training classes "
            f"are: {', '.join(class_names[:10])}{', …' if len(class_names) > 10 else ''}."
        )
    twice = [name for name, count in Counter(name for names in named.values() for name in names).items() if count > 1]
    if twice or len(named) < 2:
        fault = f"it gives {', '.join(twice[:10])} to two folders" if twice else f"it names {len(named)} folders"
        raise UnsupportedSetup(
            f"{place}: {source} cannot tell the classes apart: {fault}. Expected two or more folders, and each "
            "training class in one of them at most."
        )
    return {folder: [number[name] for name in names] for folder, names in named.items()}


def _read(source: str) -> dict[str, list[str]]:
    expected = (
        'Expected \'own\', or a JSON file such as {"bench": ["park bench"], "watch": ["digital watch", "stopwatch"]}.'
    )
    try:
        text = Path(source).expanduser().read_text(encoding="utf-8-sig")
        found = json.loads(text, object_pairs_hook=partial(_each_once, source))
    except OSError as error:
        raise UnsupportedSetup(f"shifted_classes: {source} cannot be read: {error.strerror}. {expected}") from error
    except ValueError as error:
        raise UnsupportedSetup(f"shifted_classes: {source} is not JSON: {error}. {expected}") from error
    named = {}
    for folder, names in found.items() if isinstance(found, dict) else [(source, None)]:
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UnsupportedSetup(f"shifted_classes: {source} gives no class names for {folder!r}. {expected}")
        named[folder] = names
    return named


def _each_once(source: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of a JSON file, of which Python's reader would keep the last of two entries with one name."""
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise UnsupportedSetup(
            f"shifted_classes: {source} has two entries for {', '.join(twice[:10])}. Give them as one list."
        )
    return dict(pairs)
