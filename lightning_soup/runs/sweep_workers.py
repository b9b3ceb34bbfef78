"""Trainings in processes of their own: one loop for all kinds of workers, which say how to start, await and end one."""

import os
import pickle
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.sweep_run import (
    ERROR_FILE,
    Run,
    Task,
    Train,
    attempt,
    discard_unfinished,
    empty_folder,
    failed_run,
    finished_run,
)

__all__ = ["Ended", "Engine", "Workers", "train_apart"]

LOG_FILE = "log.txt"
SECONDS_TO_STOP = 5.0  # after a polite signal, before a worker is killed


@dataclass(frozen=True)
class Ended:
    """A task whose worker is done with it.

    Args:
        task: The task.
        how: What became of the worker, for the report of a run that left neither a record nor an error.
        died: Whether the worker may have been lost by no fault of the training.
    """

    task: Task
    how: str
    died: bool = True


class Workers(Protocol):
    """Processes that train one task each, and write results and errors into the tasks' folders.

    When the block that they are the context of is left, whatever is running ends, and nothing writes any more.
    """

    def __enter__(self) -> "Workers":
        """Get ready for the first task."""
        ...

    def __exit__(self, *error: object) -> None:
        """End all that is running."""
        ...

    def has_place(self) -> bool:
        """Whether one more task can be started now."""
        ...

    def start(self, task: Task) -> None:
        """Train the task, whose folder exists and is empty, by :func:`work` in another process."""
        ...

    def wait(self) -> Sequence[Ended]:
        """Wait until at least one of the started tasks has ended."""
        ...


# Makes the workers for so many tasks of a sweep whose runs go to a folder.
Engine = Callable[[Train, Path, int], Workers]


def train_apart(tasks: Sequence[Task], train: Train, folder: Path, engine: Engine, retries: int = 0) -> Iterator[Run]:
    """Train in the workers of an engine, and give the runs in the order in which they end.

    Args:
        tasks: What to train.
        train: Trains one task; picklable.
        folder: Where the folders of the tasks lie.
        engine: Makes the workers.
        retries: How often a task whose worker died is tried again, with a warning. An error that a training raised is
            its result.
    """
    if not tasks:
        return
    waiting, running, deaths = deque(tasks), dict[int, Task](), Counter[int]()
    try:
        with engine(train, folder, len(tasks)) as workers:
            while waiting or running:
                while waiting and workers.has_place():
                    task = waiting.popleft()
                    if run := finished_run(task):  # by another sweep, since this one began
                        yield run
                        continue
                    running[task.index] = task  # first, so that an interruption in between removes the folder
                    empty_folder(task)
                    workers.start(task)
                for ended in workers.wait() if running else ():
                    task, died = ended.task, _has_died(ended)
                    deaths[task.index] += died
                    if died and deaths[task.index] <= retries:
                        warnings.warn(  # of this attempt nothing else is left
                            f"{task.folder}: the process {ended.how}; retry {deaths[task.index]} of {retries}.",
                            stacklevel=1,
                        )
                        discard_unfinished(task)
                        waiting.append(running.pop(task.index))
                    else:
                        run = _outcome(ended, deaths[task.index])
                        del running[task.index]
                        yield run
    finally:
        for task in running.values():
            discard_unfinished(task)


def pickled(train: Train) -> bytes:
    """Pickle a `train` for another process.

    Raises:
        UnsupportedSetup: It cannot be pickled.
    """
    try:
        return pickle.dumps(train)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UnsupportedSetup(
            f"{train!r} cannot be sent to another process ({error}); use a top-level function or jobs=1."
        ) from error


def work(train: bytes, task: Task, threads: int, gpus: str | None) -> None:
    """Body of a worker. Nothing heavy is imported before the threads and the log are set up.

    Args:
        train: A pickled `train`.
        task: What it is called with.
        threads: Threads of the training.
        gpus: Takes the place of CUDA_VISIBLE_DEVICES; None leaves that as it is.
    """
    with open(task.folder / LOG_FILE, "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    if "torch" in sys.modules:  # the user's main script imported it, and took all cores
        sys.modules["torch"].set_num_threads(threads)
    attempt(task, pickle.loads(train))


def threads_within(share: int) -> int:
    """Threads of a worker that is given so many cores; a smaller OMP_NUM_THREADS that the user set holds."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) > 0 else share


def _has_died(ended: Ended) -> bool:
    return ended.died and finished_run(ended.task) is None and not (ended.task.folder / ERROR_FILE).is_file()


def _outcome(ended: Ended, deaths: int) -> Run:
    """Read from a run's folder what its worker, now ended, did."""
    if run := finished_run(ended.task):
        return run
    error_file = ended.task.folder / ERROR_FILE
    if error_file.is_file():
        return failed_run(ended.task, error_file.read_text())
    times = f", after {deaths - 1} that died before it" if deaths > 1 else ""
    return failed_run(ended.task, f"The process {ended.how}{times}; see {LOG_FILE}.")
