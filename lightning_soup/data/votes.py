"""Votes: who gave which item which label, read from a table and checked.

N items, W workers, C classes, V votes.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra

__all__ = ["Duplicates", "Votes", "read_votes", "row_list"]

Duplicates = Literal["error", "keep"]
COLUMNS = ("task", "worker", "label")


@dataclass(frozen=True, eq=False)
class Votes:
    """A table of votes in one order, whatever the order of the rows that it was made of.

    Workers may have voted on any number of items, one included, and items may have any number of votes from one up.
    Made by :func:`read_votes` or :meth:`of`.

    Attributes:
        items: Names of the items that have votes, sorted as texts, [N].
        workers: Names of the workers, sorted as texts, [W].
        classes: Names of all classes, in the order of their numbers, [C]; nobody need have chosen each of them.
        item: Number of the item of each vote, int64 [V], ascending.
        worker: Number of its worker, int64 [V], ascending within an item.
        label: Number of the class that was chosen, int64 [V].
        rows: Number of its row in the table, int64 [V], for messages: the only thing that follows the order of rows.
    """

    items: tuple[str, ...]
    workers: tuple[str, ...]
    classes: tuple[str, ...]
    item: np.ndarray
    worker: np.ndarray
    label: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(
        cls,
        tasks: Iterable[Any],
        workers: Iterable[Any],
        labels: Iterable[Any],
        classes: Sequence[Any] | None = None,
        duplicates: Duplicates = "error",
        place: str = "The votes",
        first_row: int = 0,
    ) -> "Votes":
        """Votes from three columns of equal length; what is in them is compared as text.

        Args:
            tasks: The item of each vote.
            workers: Who voted.
            labels: The class that was chosen.
            classes: All classes in the order of their numbers; by default those that were chosen, sorted as texts.
            duplicates: What to do about a worker who voted more than once on an item: ``error``, or ``keep``, where
                each of these votes counts.
            place: Where the columns are from, for messages.
            first_row: Number of the first row there, for messages.

        Raises:
            UnsupportedSetup: No votes, columns of unequal length, an empty cell, a label that is no class, classes that
                are fewer than two or not distinct, or a duplicate.
        """
        columns = [[_text(value) for value in _plain(column)] for column in (tasks, workers, labels)]
        if len({len(column) for column in columns}) > 1:
            lengths = ", ".join(f"{len(column)} of {name}" for name, column in zip(COLUMNS, columns, strict=True))
            raise UnsupportedSetup(f"{place}: the columns are of unequal length ({lengths}). Give one row per vote.")
        if not columns[0]:
            raise UnsupportedSetup(f"{place}: there are no votes. Expected rows of {', '.join(COLUMNS)}, one per vote.")
        for name, column in zip(COLUMNS, columns, strict=True):
            if empty := [row for row, value in enumerate(column, first_row) if not value]:
                raise UnsupportedSetup(
                    f"{place}: no {name} in {row_list(empty)}. Each vote names its task, worker and label; a vote that "
                    "is missing has no row at all."
                )
        classes = sorted(set(columns[2])) if classes is None else [_text(name) for name in classes]
        if len(classes) < 2 or len(set(classes)) < len(classes) or "" in classes:
            raise UnsupportedSetup(
                f"{place}: the classes are {_names(classes)}; expected two or more different names. Name them all, "
                "also those that nobody has chosen."
            )
        known = {name: number for number, name in enumerate(classes)}
        if unknown := [row for row, value in enumerate(columns[2], first_row) if value not in known]:
            raise UnsupportedSetup(
                f"{place}: labels outside the class list in {row_list(unknown)}, such as "
                f"{columns[2][unknown[0] - first_row]!r}; expected one of {_names(classes)}. Correct the labels or the "
                "list of classes."
            )
        items, item = _numbered(columns[0])
        names, worker = _numbered(columns[1])
        label = np.fromiter((known[value] for value in columns[2]), np.int64, len(columns[2]))
        order = np.lexsort((label, worker, item))
        item, worker, label = item[order], worker[order], label[order]
        again = np.flatnonzero((np.diff(item) == 0) & (np.diff(worker) == 0)) + 1
        if len(again) and duplicates == "error":
            at = again[0]
            rows = order[(item == item[at]) & (worker == worker[at])] + first_row
            raise UnsupportedSetup(
                f"{place}: worker {names[worker[at]]!r} voted more than once on task {items[item[at]]!r}, in "
                f"{row_list(rows)} ({len(again)} votes too many in all). Keep one vote of a worker on a task, or let "
                'each count: duplicates="keep".'
            )
        return cls(tuple(items), tuple(names), tuple(classes), item, worker, label, order + first_row)

    def __len__(self) -> int:
        """Number of votes."""
        return len(self.item)

    @cached_property
    def counts(self) -> np.ndarray:
        """n_ic: how many votes item i has for class c, float64 [N, C]."""
        return self.sum_by_choice(np.ones(len(self)))

    def sum_by_choice(self, values: np.ndarray) -> np.ndarray:
        """Sum a number per vote over the votes of an item for a class: [V] -> [N, C]."""
        shape = len(self.items), len(self.classes)
        return np.bincount(self.item * shape[1] + self.label, values, shape[0] * shape[1]).reshape(shape)

    def sum_by_item(self, values: np.ndarray) -> np.ndarray:
        """Sum a number per vote over the votes of an item: [V] -> [N]."""
        return np.bincount(self.item, values, len(self.items))

    def sum_by_worker(self, values: np.ndarray) -> np.ndarray:
        """Sum a number per vote over the votes of a worker: [V] -> [W]."""
        return np.bincount(self.worker, values, len(self.workers))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what was voted, the same for every order of the rows."""
        names = json.dumps([self.items, self.workers, self.classes]).encode()
        content = hashlib.blake2b(names, digest_size=16)
        for column in (self.item, self.worker, self.label):
            content.update(column.astype("<i8").tobytes())
        return content.hexdigest()


def read_votes(
    source: str | Path | Mapping[str, Sequence[Any]],
    classes: Sequence[Any] | None = None,
    duplicates: Duplicates = "error",
) -> Votes:
    """Read votes: one row per vote, with the columns ``task``, ``worker`` and ``label``. Further columns are ignored.

    Args:
        source: A ``.csv`` file, ``.tsv`` (separated by tabs) or ``.parquet``; or a table in memory, a mapping from
            column to values, such as a pandas DataFrame.
        classes: All classes in the order of their numbers; by default those that were chosen, sorted as texts.
        duplicates: What to do about a worker who voted more than once on an item: see :meth:`Votes.of`.

    Raises:
        UnsupportedSetup: The file cannot be read or lacks a column, or its votes cannot be; see :meth:`Votes.of`.
        MissingExtra: A ``.parquet`` file, and pyarrow is not installed.
    """
    if duplicates not in ("error", "keep"):
        raise UnsupportedSetup(f"duplicates={duplicates!r}: expected one of error, keep.")
    if not isinstance(source, (str, Path)):
        _check_columns(source, "The table of votes")
        return Votes.of(*(source[name] for name in COLUMNS), classes, duplicates, "The table of votes")
    path = Path(source).expanduser()
    if not path.is_file():
        raise UnsupportedSetup(
            f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}. Expected a table of votes, one "
            f"file, .csv, .tsv or .parquet, with the columns {', '.join(COLUMNS)}."
        )
    kind = path.suffix.lower()
    if kind == ".parquet":
        return Votes.of(*_parquet_columns(path), classes, duplicates, str(path))
    if kind not in (".csv", ".tsv"):
        raise UnsupportedSetup(f"{path}: is neither .csv, .tsv nor .parquet. Save the table of votes as one of them.")
    columns = _csv_columns(path, "\t" if kind == ".tsv" else ",")
    return Votes.of(*columns, classes, duplicates, str(path), first_row=2)  # the heading is row 1


def _csv_columns(path: Path, delimiter: str) -> list[list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel writes a byte-order mark
        # Strict: of a quotation mark that is never closed the rest of the table would become one cell.
        lines = io.StringIO(text, newline="")
        rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnsupportedSetup(
            f"{path}: cannot be read as a table ({error}). Save it as CSV in UTF-8, with every quotation mark closed."
        ) from error
    heading, *rows = rows or [[]]
    heading = [name.strip() for name in heading]
    _check_columns(heading, str(path))
    while rows and not any(map(str.strip, rows[-1])):  # empty lines at the end
        rows.pop()
    if short := [number for number, row in enumerate(rows, 2) if len(row) != len(heading)]:
        raise UnsupportedSetup(
            f"{path}: {len(rows[short[0] - 2])} cells in {row_list(short[:1])}, but the heading has {len(heading)} "
            f"({len(short)} such rows). Give each row a cell for each column."
        )
    places = [heading.index(name) for name in COLUMNS]
    return [[row[place] for row in rows] for place in places]


def _parquet_columns(path: Path) -> list[list[Any]]:
    parquet = import_extra("pyarrow.parquet", "crowd")
    try:
        with parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            table = file.read(columns=[name for name in COLUMNS if name in found])
    except Exception as error:  # pyarrow's own kinds, which need pyarrow to be named
        raise UnsupportedSetup(f"{path}: cannot be read as Parquet ({error}). Save the table anew.") from error
    _check_columns(found, str(path))
    return [table.column(name).to_pylist() for name in COLUMNS]


def _check_columns(found: Iterable[str], place: str) -> None:
    found = list(found)
    if missing := [name for name in COLUMNS if name not in found]:
        raise UnsupportedSetup(
            f"{place}: has no column {' and no column '.join(missing)}; its columns are {_names(found)}. Expected "
            f"{', '.join(COLUMNS)}: rename them."
        )
    if twice := [name for name in COLUMNS if found.count(name) > 1]:
        raise UnsupportedSetup(
            f"{place}: has more than one column {' and more than one column '.join(twice)}; its columns are "
            f"{_names(found)}. Rename those that do not count."
        )


def _plain(column: Iterable[Any]) -> Iterable[Any]:
    """The cells of an array, a tensor or a column of a data frame as plain values of Python."""
    return column.tolist() if hasattr(column, "tolist") else column


def _text(value: Any) -> str:
    """A cell as text without spaces around it: numbers that a table reader has made floats are whole again.

    An empty cell may also be None, NaN, or pandas' NA, which is equal to nothing and unequal to nothing.
    """
    if isinstance(value, str):
        return value.strip()
    if value is None or type(value).__name__ == "NAType" or value != value:
        return ""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    return str(value)


def _numbered(column: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct texts, sorted, and the number of each cell's."""
    names = sorted(set(column))
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.fromiter((numbers[value] for value in column), np.int64, len(column))


def row_list(numbers: Sequence[int] | np.ndarray, most: int = 5) -> str:
    """Numbers of rows in ascending order, the first few of them, for messages."""
    shown = ", ".join(str(number) for number in sorted(numbers)[:most])
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _names(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(map(str, names[:most])) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
