"""One run of a sweep: training it, and the record that its folder keeps."""

import contextlib
import json
import os
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_soup.errors import UnwritableOutput

__all__ = ["Run", "Task", "Train", "Trained"]

RUN_FILE = "run.json"  # what gather_ingredients looks for
ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Trained:
    """What training one setting gave.

    Args:
        metrics: The ingredient's metrics, by the names they were logged under.
        checkpoint: The file with its weights; of several checkpoints, the one to cook with.
    """

    metrics: dict[str, float]
    checkpoint: Path


class Train(Protocol):
    """Trains one setting; for `jobs` above 1 a top-level function or a partial of one, to be picklable."""

    def __call__(self, setting: dict[str, Any], folder: Path, seed: int) -> Trained:
        """Train `setting` with `seed` and write only below `folder`, which exists and is empty."""
        ...


@dataclass(frozen=True)
class Task:
    """One setting to train, with the folder and the seed that are its own."""

    index: int
    folder: Path
    setting: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Run:
    """One setting of a sweep and what became of it; `error` is None where it finished."""

    index: int
    folder: Path
    setting: dict[str, Any]
    seed: int
    metrics: dict[str, float]
    checkpoint: Path | None = None
    error: str | None = None


def canonical(value: Any) -> str:
    """A text that is the same for equal values from YAML, whatever the order and the types of keys."""

    def sortable(node: Any) -> Any:
        if isinstance(node, dict):
            items = {key: sortable(item) for key, item in node.items()}
            if all(isinstance(key, str) for key in items):
                return items
            return sorted(([repr(key), item] for key, item in items.items()), key=lambda pair: pair[0])
        return [sortable(item) for item in node] if isinstance(node, (list, tuple)) else node

    return json.dumps(sortable(value), sort_keys=True, default=str)


def attempt(task: Task, train: Train) -> Run:
    """Train and write down the result, or the traceback where it failed.

    A plain `sys.exit()` in a training is its failure. Subclasses of SystemExit are how signals ask this program to end.
    """
    try:
        trained = train(dict(task.setting), task.folder, task.seed)
        if not trained.checkpoint.is_file():
            raise FileNotFoundError(f"the checkpoint that the training named is no file: {trained.checkpoint}")
        record = {
            "status": "finished",
            "index": task.index,
            "setting": task.setting,
            "seed": task.seed,
            "metrics": {name: float(value) for name, value in trained.metrics.items()},
            "checkpoint": os.path.relpath(trained.checkpoint.resolve(), task.folder.resolve()),
        }
        from lightning_soup.weights.atomic import atomic_path  # here because it imports torch

        with atomic_path(task.folder / RUN_FILE) as path:
            path.write_text(json.dumps(record, indent=2, default=str))
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and type(error) is not SystemExit:
            raise
        return failed_run(task, "".join(traceback.format_exception(error)))
    checkpoint = task.folder / record["checkpoint"]
    return Run(task.index, task.folder, task.setting, task.seed, record["metrics"], checkpoint)


def finished_run(task: Task) -> Run | None:
    """Read the record of a complete run; None where there is none, or where its checkpoint is gone."""
    try:
        record = json.loads((task.folder / RUN_FILE).read_text())
        checkpoint = task.folder / record["checkpoint"]
        if record["status"] != "finished" or not checkpoint.is_file():
            return None
        return Run(task.index, task.folder, task.setting, task.seed, record["metrics"], checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def failed_run(task: Task, text: str) -> Run:
    """Save why a run failed in its folder; the last line stands for it in reports."""
    # What it saved must not be taken for an ingredient by a pattern over the folders of a sweep.
    shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)
    with contextlib.suppress(OSError):  # a full disk may be the very error
        (task.folder / ERROR_FILE).write_text(text)
    return Run(
        task.index,
        task.folder,
        task.setting,
        task.seed,
        {},
        error=(text.strip() or "no reason known").splitlines()[-1],
    )


def empty_folder(task: Task) -> None:
    """Make the run's folder, and remove what an earlier attempt left in it.

    Raises:
        UnwritableOutput: It cannot be removed or made.
    """
    try:
        if task.folder.exists():
            shutil.rmtree(task.folder)
        task.folder.mkdir(parents=True)
    except OSError as error:
        raise UnwritableOutput(f"{task.folder}: the run's folder cannot be emptied: {error.strerror}.") from error


def discard_unfinished(task: Task) -> None:
    """Leave nothing half-written behind: a checkpoint in there would look like an ingredient."""
    if finished_run(task) is None:
        shutil.rmtree(task.folder, ignore_errors=True)
