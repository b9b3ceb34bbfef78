"""Train a list of tasks in order, each from where the one before ended, and judge all tasks after each.

A run in a folder goes on where it was ended, by whatever: tasks that are trained are not trained again, and cells of
the matrix that are known are not measured again.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.evaluation.continual import ContinualMetrics, continual_metrics
from lightning_soup.progress import Progress, silent
from lightning_soup.runs.report_json import plain, versions
from lightning_soup.runs.sweep import check_numbers, make_folder
from lightning_soup.runs.sweep_run import (
    ERROR_FILE,
    Run,
    Task,
    Trained,
    attempt,
    discard_unfinished,
    empty_folder,
    finished_run,
)
from lightning_soup.weights.atomic import atomic_path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ["ContinualResult", "JudgeTask", "TrainTask", "run_continual"]

ZERO_SHOT = "zero-shot"
_ORDER_FILE, _CELLS_FILE, _RESULT_FILE = "order.json", "accuracies.json", "continual.json"
_LOCK_FILE = ".lock"


class TrainTask(Protocol):
    """Trains one task."""

    def __call__(self, name: str, start: Path, folder: Path, seed: int) -> Trained:
        """Train the task from the weights in ``start``, write only below ``folder``, and name the weights to keep."""
        ...


class JudgeTask(Protocol):
    """Measures weights on one task."""

    def __call__(self, name: str, checkpoint: Path) -> float:
        """Accuracy on the test data of the task, 0 to 1."""
        ...


@dataclass(frozen=True)
class ContinualResult:
    """The tasks that were trained, and the accuracies after each, in percent.

    Attributes:
        folder: Where everything lies.
        names: The tasks, in the order of training.
        checkpoints: The weights after each task.
        zero_shot: Accuracy of the start on each task.
        matrix: What was trained last -> task -> accuracy. The zero-shot row is no part of it.
        notes: What a reader of the numbers must know, such as the templates of each task.
    """

    folder: Path
    names: tuple[str, ...]
    checkpoints: dict[str, Path]
    zero_shot: dict[str, float]
    matrix: dict[str, dict[str, float]]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> ContinualMetrics:
        """Transfer, Avg, Last and Forget."""
        return continual_metrics(self.matrix, self.names)

    @property
    def zero_shot_metrics(self) -> ContinualMetrics:
        """The same of the start, as if no training changed anything."""
        return continual_metrics(dict.fromkeys(self.names, self.zero_shot), self.names)

    @property
    def rows(self) -> dict[str, dict[str, float]]:
        """The rows of the matrix under the zero-shot row."""
        return {ZERO_SHOT: self.zero_shot, **{f"after {name}": row for name, row in self.matrix.items()}}


def run_continual(
    names: Sequence[str],
    start: Callable[[], Path],
    train: TrainTask,
    judge: JudgeTask,
    folder: str | Path,
    *,
    seed: int = 0,
    fingerprint: str = "",
    notes: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> ContinualResult:
    """Train the tasks in order and fill the matrix of accuracies, or go on with a run that was ended.

    Writes ``matrix.csv`` (accuracies in percent) after every task, and at the end ``continual.json`` with the matrix
    and the metrics, ``heatmap.png``, ``curves.png`` and ``metrics.png``.

    Args:
        names: The tasks, in the order of training.
        start: Gives the file of the weights that the first task starts from. Called once the folder is known to belong
            to this run.
        train: Trains one task from a file of weights; those of its result are the start of the next.
        judge: Measures a file of weights on one task.
        folder: Where the run lies.
        seed: The task with index i is trained with `seed + i`.
        fingerprint: Stands for everything else that decides the result, such as a hash of the config.
        notes: What a reader of the numbers must know; goes into ``continual.json``.
        progress: Shows how many trainings and measurements are done.

    Raises:
        UnsupportedSetup: No tasks, two of one name, or a folder with a run of other tasks, of another order of them, or
            with other settings.
        LightningSoupError: A training failed.
        UnwritableOutput: The folder cannot be written.
    """
    names, folder = tuple(names), Path(folder)
    _check_names(names)
    check_numbers(1, seed, len(names))
    make_folder(folder)
    with _alone(folder):
        _claim(folder, names, seed, fingerprint)
        first = start()
        matrix: dict[str, dict[str, float]] = {}
        result = ContinualResult(folder, names, {}, _read_cells(folder), matrix, notes or {})
        steps = _steps(result, first, train, judge, seed)
        for _ in progress(steps, "Training and judging tasks", total=len(names) * (len(names) + 2)):
            pass
        _write_result(result)
    return result


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a folder that another process works in. The system lets go of the lock when a process ends, however."""
    with open(folder / _LOCK_FILE, "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UnsupportedSetup(
                    f"{folder}: another process is working in this folder. Wait for its end, or give another folder."
                ) from error
            except OSError:  # a file system without locks
                pass
        yield


def _steps(result: ContinualResult, start: Path, train: TrainTask, judge: JudgeTask, seed: int) -> Iterator[None]:
    """Every training and every measurement, with a pause after each."""
    yield from _judge_all(result, result.zero_shot, result.folder, start, judge)
    anew = False
    for index, name in enumerate(result.names):
        task = Task(index, result.folder / f"{index:02d}-{_file_name(name)}", {"task": name}, seed + index)
        # What was trained from weights that are gone now is of no use either.
        run = None if anew else finished_run(task)
        if run is None:
            anew = True
            run = _train(task, start, train)
        yield
        start = result.checkpoints[name] = run.checkpoint
        result.matrix[name] = _read_cells(task.folder)
        yield from _judge_all(result, result.matrix[name], task.folder, start, judge)


def _train(task: Task, start: Path, train: TrainTask) -> Run:
    name = task.setting["task"]
    try:
        empty_folder(task)
        run = attempt(task, lambda _, folder, seed: train(name, start, folder, seed))
    except BaseException:  # Ctrl-C, or a signal
        discard_unfinished(task)
        raise
    if run.error is not None:
        why, where = run.error.rstrip("."), task.folder / ERROR_FILE
        raise LightningSoupError(
            f"Training task {name!r} failed: {why}. The whole message is in {where}. "
            "Once its cause is removed, the same command goes on from here."
        )
    return run


def _judge_all(
    result: ContinualResult, cells: dict[str, float], folder: Path, checkpoint: Path, judge: JudgeTask
) -> Iterator[None]:
    """Measure a file of weights on every task that it is not yet measured on."""
    for name in result.names:
        if name not in cells:
            cells[name] = 100 * judge(name, checkpoint)
            with atomic_path(folder / _CELLS_FILE) as path:
                path.write_text(json.dumps(cells, indent=1))
        yield
    with atomic_path(result.folder / "matrix.csv") as path:
        path.write_text(_table(result))


def _read_cells(folder: Path) -> dict[str, float]:
    """The accuracies that a folder keeps; nothing where there are none, or a half of them."""
    try:
        return {name: float(value) for name, value in json.loads((folder / _CELLS_FILE).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise UnsupportedSetup("no tasks to train; a continual run needs at least one.")
    files = [_file_name(name).lower() for name in names]
    keys = [re.sub(r"[^\w.-]+", "_", name) for name in names]  # what trackers call them
    pairs = zip(names, files, keys, strict=True)
    twice = sorted({name for name, file, key in pairs if files.count(file) > 1 or keys.count(key) > 1})
    if twice or "" in files:
        raise UnsupportedSetup(
            f"The names of the tasks collide: {', '.join(twice or names)}. Each needs a name of its own, of letters "
            "and digits."
        )


def _claim(folder: Path, names: Sequence[str], seed: int, fingerprint: str) -> None:
    """Write down what the folder is about, or make sure that it is about the same."""
    ours = {"order": list(names), "seed": seed, "fingerprint": fingerprint}
    path = folder / _ORDER_FILE
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(ours, indent=1))
        return
    try:
        theirs = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UnsupportedSetup(f"{path}: not the record of a continual run ({error}). Give another folder.") from error
    if theirs == ours:
        return
    if theirs.get("order") != ours["order"]:
        before = map(str, theirs["order"]) if isinstance(theirs.get("order"), list) else ["?"]
        raise UnsupportedSetup(
            f"{folder} holds a run of the tasks {', '.join(before)}; now the order is "
            f"{', '.join(names)}. Every task starts from the weights of the one before, so this cannot go on there. "
            "Give the order of the first time, or another folder."
        )
    what = "seed" if theirs.get("seed") != seed else "config, or with other files that it names"
    raise UnsupportedSetup(
        f"{folder} holds a run with another {what}. Give what it was started with, or another folder."
    )


def _write_result(result: ContinualResult) -> None:
    from lightning_soup.runs.figures_continual import draw_continual

    content = {
        "unit": "accuracy in percent",
        "metrics": result.metrics.plain(),
        "zero_shot_metrics": {key: getattr(result.zero_shot_metrics, key) for key in ("transfer", "average", "last")},
        "zero_shot": result.zero_shot,
        "matrix": result.matrix,
        "checkpoints": {name: str(path.relative_to(result.folder)) for name, path in result.checkpoints.items()},
        "notes": dict(result.notes),
        "versions": versions(),
    }
    pictures = {f"{picture.name}.png": picture.png for picture in draw_continual(result)}
    text = json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, data in {**pictures, _RESULT_FILE: text.encode()}.items():
        with atomic_path(result.folder / name, size=len(data)) as path:
            path.write_bytes(data)


def _table(result: ContinualResult) -> str:
    """The matrix under its zero-shot row, as far as it is known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["accuracy, %", *result.names])
    for label, row in result.rows.items():
        writer.writerow([label, *(f"{row[name]:.4f}" if name in row else "" for name in result.names)])
    return text.getvalue()


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")
