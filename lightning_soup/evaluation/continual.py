"""Continual learning in numbers: Transfer, Avg, Last and Forget of a matrix of accuracies.

A[i][j] is the accuracy on task j after training the tasks 1 to i of the order. The row of the model before any training
is no part of the matrix.

Source: Zheng et al., Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models, ICCV
2023 (arXiv 2303.06628), section 4; Forget is that of its follow-ups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_soup.errors import LightningSoupError

__all__ = ["ContinualMetrics", "Matrix", "continual_metrics"]

Matrix = Sequence[Sequence[float]] | Mapping[str, Mapping[str, float]]
"""Rows of accuracies; or by name: what was trained last -> task -> accuracy."""


@dataclass(frozen=True)
class ContinualMetrics:
    """What a sequence of tasks did to a model, in the unit of the matrix.

    Attributes:
        names: The N tasks, in the order of training.
        transfer: Mean of :attr:`transfer_by_task`: what is left of the zero-shot ability. NaN with one task.
        average: Mean of the whole matrix.
        last: Mean of the last row.
        forget: Σ_j (A[N][j] − A[j][j]) / (N − 1): below 0 where tasks were forgotten. NaN with one task.
        transfer_by_task: mean_{i<j} A[i][j], for every task but the first.
        average_by_task: mean_i A[i][j].
        last_by_task: A[N][j].
        used: Of which cells each metric was made: metric -> column -> rows, all by name.
    """

    names: tuple[str, ...]
    transfer: float
    average: float
    last: float
    forget: float
    transfer_by_task: dict[str, float]
    average_by_task: dict[str, float]
    last_by_task: dict[str, float]
    used: dict[str, dict[str, tuple[str, ...]]] = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """Numbers, texts, lists and dicts, for files."""
        return {
            "order": list(self.names),
            "transfer": self.transfer,
            "average": self.average,
            "last": self.last,
            "forget": self.forget,
            "by_task": {
                "transfer": dict(self.transfer_by_task),
                "average": dict(self.average_by_task),
                "last": dict(self.last_by_task),
            },
            "rows_used_of_each_column": {
                metric: {column: list(rows) for column, rows in columns.items()}
                for metric, columns in self.used.items()
            },
        }


def continual_metrics(
    matrix: Matrix,
    names: Sequence[str],
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> ContinualMetrics:
    """Transfer, Avg, Last and Forget of a matrix of accuracies.

    Transfer is a mean of means, each task with the same weight: not the mean of all cells above the diagonal.

    Args:
        matrix: A[i][j], the accuracy on task j after training task i: numbers by row and column, or by name.
        names: The tasks in the order of training.
        rows: What the rows of the matrix are, where they are not in the order of training. More of them may be there
            than ``names`` has; they are left out.
        columns: The same for the columns.

    Raises:
        LightningSoupError: No tasks, a task that is named twice or has no row or column, rows of different lengths, or
            an accuracy that is no number.
    """
    names = tuple(names)
    if not names:
        raise LightningSoupError("continual_metrics needs the names of one task or more; got none.")
    _refuse_twice(names, "names")
    a = _by_name(matrix, names, rows, columns)
    count = len(names)
    before = {name: names[:number] for number, name in enumerate(names) if number}
    used = {
        "transfer": before,
        "average": dict.fromkeys(names, names),
        "last": dict.fromkeys(names, names[-1:]),
        "forget": {name: (name, names[-1]) for name in names[:-1]},
    }
    by_task = {
        metric: {column: _mean([a[row][column] for row in used[metric][column]]) for column in used[metric]}
        for metric in ("transfer", "average", "last")
    }
    lost = [a[names[-1]][name] - a[name][name] for name in names[:-1]]
    return ContinualMetrics(
        names=names,
        transfer=_mean(list(by_task["transfer"].values())),
        average=_mean(list(by_task["average"].values())),
        last=_mean(list(by_task["last"].values())),
        forget=sum(lost) / (count - 1) if lost else math.nan,
        transfer_by_task=by_task["transfer"],
        average_by_task=by_task["average"],
        last_by_task=by_task["last"],
        used=used,
    )


def _by_name(
    matrix: Matrix, names: tuple[str, ...], rows: Sequence[str] | None, columns: Sequence[str] | None
) -> dict[str, dict[str, float]]:
    """The cells of the named tasks, by row and column."""
    if isinstance(matrix, Mapping):
        if rows is not None or columns is not None:
            raise LightningSoupError("The matrix has names of its own; leave rows and columns out.")
        found = {row: dict(cells) for row, cells in matrix.items()}
    else:
        rows, columns = tuple(rows or names), tuple(columns or names)
        _refuse_twice(rows, "rows")
        _refuse_twice(columns, "columns")
        shape = [len(row) for row in matrix]
        if shape != [len(columns)] * len(rows):
            raise LightningSoupError(
                f"The matrix has {len(shape)} rows with {sorted(set(shape))} cells; expected {len(rows)} rows with "
                f"{len(columns)} cells, one for each of: {', '.join(columns)}. Where its order or its tasks are other "
                "than those of names, say what they are with rows and columns."
            )
        found = {row: dict(zip(columns, cells, strict=True)) for row, cells in zip(rows, matrix, strict=True)}
    for row in names:
        missing = [name for name in names if name not in found.get(row, {})]
        if missing:
            raise LightningSoupError(
                f"The matrix lacks accuracies after training {row!r}: of {', '.join(missing)}. Every task needs a row "
                "and a column."
            )
    chosen = {row: {column: float(found[row][column]) for column in names} for row in names}
    for row, cells in chosen.items():
        for column, value in cells.items():
            if not math.isfinite(value):
                raise LightningSoupError(f"The accuracy on {column!r} after training {row!r} is {value}, no number.")
    return chosen


def _refuse_twice(names: Sequence[str], what: str) -> None:
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise LightningSoupError(f"{what} has {', '.join(twice)} twice. Every task needs a name of its own.")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
