"""Votes: what annotators said of items, read from a table and checked."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra

__all__ = ["Votes", "read_votes"]

_COLUMNS = ("task", "worker", "label")
Vote = tuple[str, str, str]


@dataclass(frozen=True)
class Votes:
    """V votes of W workers on I items, among C classes; sorted, so that no result depends on the order of the rows.

    Attributes:
        item: Number of the item, ``[V]``.
        worker: Number of the worker, ``[V]``.
        label: Number of the class, ``[V]``.
        items: Names of the items.
        workers: Names of the workers.
        classes: Names of the classes, also of those that nobody chose.
    """

    item: np.ndarray
    worker: np.ndarray
    label: np.ndarray
    items: tuple[str, ...]
    workers: tuple[str, ...]
    classes: tuple[str, ...]

    @classmethod
    def of(
        cls, votes: Iterable[tuple[object, object, object]], classes: Sequence[str] | None = None, place: str = "votes"
    ) -> "Votes":
        """Check votes and number them.

        Args:
            votes: Of each vote the item, the worker and the label, as texts or numbers.
            classes: Names of all classes, in the order of their numbers; None: those that were chosen, sorted.
            place: Where they come from, for messages.

        Raises:
            UnsupportedSetup: There are none, one is empty or no class, or a worker voted twice on an item.
        """
        rows = [tuple(str(part).strip() for part in vote) for vote in votes]
        if not rows:
            raise UnsupportedSetup(f"{place}: has no votes; expected rows with {', '.join(_COLUMNS)}.")
        for number, row in enumerate(rows, 1):
            if not all(row):
                raise UnsupportedSetup(
                    f"{place}, vote {number}: {row} has an empty field; expected task, worker, label."
                )
        known = (
            tuple(str(name) for name in classes)
            if classes is not None
            else tuple(sorted({r[2] for r in rows}, key=_key))
        )
        if len(set(known)) != len(known) or len(known) < 2:
            raise UnsupportedSetup(f"{place}: the classes are {list(known)}; expected two or more, all different.")
        strange = [(number, row[2]) for number, row in enumerate(rows, 1) if row[2] not in known]
        if strange:
            raise UnsupportedSetup(
                f"{place}, vote {strange[0][0]}: the label {strange[0][1]!r} is none of the classes "
                f"{', '.join(known[:10])}{' …' if len(known) > 10 else ''} ({len(strange)} such votes). Give "
                "class_names with all labels, or correct the table."
            )
        seen: dict[tuple[str, str], str] = {}
        for number, (task, worker, label) in enumerate(rows, 1):
            if (task, worker) in seen:
                raise UnsupportedSetup(
                    f"{place}, vote {number}: {worker!r} votes on {task!r} a second time ({seen[task, worker]!r}, then "
                    f"{label!r}), and would count twice. Keep one vote of each worker on an item."
                )
            seen[task, worker] = label
        items, workers = (tuple(sorted({row[i] for row in rows}, key=_key)) for i in (0, 1))
        numbers = [{name: i for i, name in enumerate(names)} for names in (items, workers, known)]
        table = np.array(sorted(tuple(n[part] for n, part in zip(numbers, row, strict=True)) for row in rows))
        return cls(table[:, 0], table[:, 1], table[:, 2], items, workers, known)

    @property
    def counts(self) -> np.ndarray:
        """n_ic: how many gave item i class c, ``[I, C]``."""
        found = np.zeros((len(self.items), len(self.classes)))
        np.add.at(found, (self.item, self.label), 1.0)
        return found


def read_votes(path: str | Path, classes: Sequence[str] | None = None) -> Votes:
    """Read a table with the columns ``task``, ``worker`` and ``label``; others are left out.

    Args:
        path: A CSV file, or a ``.parquet`` file (with the extra ``crowd``).
        classes: As of :meth:`Votes.of`.

    Raises:
        UnsupportedSetup: It cannot be read, lacks a column, or as :meth:`Votes.of`.
        MissingExtra: A parquet file, and pyarrow is not installed.
    """
    path = Path(path).expanduser()
    try:
        rows = list(_parquet(path) if path.suffix == ".parquet" else _csv(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnsupportedSetup(
            f"{path}: cannot be read as a table of votes ({type(error).__name__}: {error})."
        ) from error
    return Votes.of(rows, classes, str(path))


def _csv(path: Path) -> Iterator[Vote]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        _check_columns(path, table.fieldnames or ())
        for row in table:
            yield tuple(row[name] or "" for name in _COLUMNS)  # type: ignore[misc]


def _parquet(path: Path) -> Iterator[Vote]:
    parquet = import_extra("pyarrow.parquet", "crowd")
    arrow = import_extra("pyarrow", "crowd")
    try:
        table = parquet.read_table(path)
    except arrow.ArrowException as error:
        raise UnsupportedSetup(f"{path}: is no parquet file ({str(error)[:200]}).") from error
    _check_columns(path, table.column_names)
    columns = [table.column(name).to_pylist() for name in _COLUMNS]
    for row in zip(*columns, strict=True):
        yield tuple("" if part is None else str(part) for part in row)  # type: ignore[misc]


def _check_columns(path: Path, found: Sequence[str]) -> None:
    missing = [name for name in _COLUMNS if name not in found]
    if missing:
        raise UnsupportedSetup(
            f"{path}: has no column {', '.join(missing)}; found {', '.join(map(str, found)) or 'none'}. Expected a "
            f"table with {', '.join(_COLUMNS)}."
        )


def _key(name: str) -> tuple[int, float, str]:
    """Numbers in their order, before texts."""
    try:
        return 0, float(name), name
    except ValueError:
        return 1, 0.0, name
