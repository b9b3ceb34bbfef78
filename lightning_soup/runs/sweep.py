"""Train one ingredient per setting: a folder each, resumable, and a failure does not stop the rest."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_soup.errors import UnsupportedSetup, UnwritableOutput
from lightning_soup.progress import Progress, silent
from lightning_soup.runs.sweep_processes import Processes
from lightning_soup.runs.sweep_run import (
    Run,
    Task,
    Train,
    attempt,
    canonical,
    discard_unfinished,
    empty_folder,
    finished_run,
)
from lightning_soup.runs.sweep_workers import Engine, train_apart

__all__ = ["SweepResult", "run_sweep", "tasks_of"]

_LARGEST_SEED = 2**32 - 1  # of numpy


@dataclass(frozen=True)
class SweepResult:
    """The runs of one sweep, in the order of its settings."""

    folder: Path
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        """The runs that left an ingredient."""
        return [run for run in self.runs if run.error is None]

    @property
    def failed(self) -> list[Run]:
        """The runs that did not; each has `error`, and the traceback in `error.txt` of its folder."""
        return [run for run in self.runs if run.error is not None]

    @property
    def checkpoints(self) -> list[Path]:
        """The files of the ingredients."""
        return [run.checkpoint for run in self.runs if run.checkpoint is not None]


def run_sweep(
    settings: Sequence[Mapping[str, Any]],
    train: Train,
    folder: str | Path,
    *,
    seed: int = 0,
    jobs: int = 1,
    fingerprint: str = "",
    spread: bool = True,
    engine: Engine | None = None,
    retries: int = 0,
    progress: Progress = silent,
    title: str = "Training ingredients",
) -> SweepResult:
    """Train every setting, each in its own folder `<index>-<hash of setting, seed and fingerprint>`.

    A run that finished earlier with the same hash is not repeated; one that failed or was cut short starts
    again from an empty folder. `run.json` (setting, seed, metrics, checkpoint) is written last and
    atomically, so a folder that has it is complete. Runs of other sweeps in the same folder are left alone
    and not reported.

    Args:
        settings: What to train, for example :meth:`.SweepFile.settings`.
        train: Trains one setting.
        folder: Where the runs' folders go.
        seed: The run with index i is trained with `seed + i`.
        jobs: Trainings at a time. 1 trains in this process. More gives each setting a process of its own, its
            share of the cores, and `log.txt` for what it prints.
        spread: With several jobs, let each see one GPU only, another one for each while there are enough. Those that
            CUDA_VISIBLE_DEVICES hides are not used.
        engine: Makes the processes that train; in place of `jobs` and `spread`. What it is does not show in the runs: a
            sweep goes on with another engine where it was interrupted.
        retries: How often a run is tried again whose process died, by a lost machine or for want of memory. One that
            raised an error is not, before the next call.
        fingerprint: Stands for everything else that decides the result, such as a hash of the base config.
        progress: Shows how many runs are done.
        title: What it says they are.

    Returns:
        All runs, those that failed included.

    Raises:
        UnsupportedSetup: No settings, `jobs`, `seed` or `retries` out of range, a `train` that cannot be sent to
            another process, or an engine that cannot work.
        UnwritableOutput: The folder cannot be written.
    """
    check_numbers(jobs, seed, len(settings))
    if engine is None and jobs > 1:
        engine = Processes.engine(jobs, spread)
    check_retries(retries, apart=engine is not None)
    if not settings:
        raise UnsupportedSetup("no settings to train; a sweep needs at least one.")
    folder = Path(folder)
    make_folder(folder)
    tasks = tasks_of(settings, folder, seed, fingerprint)
    earlier = [run for task in tasks if (run := finished_run(task))]
    done = {run.index for run in earlier}
    todo = [task for task in tasks if task.index not in done]
    # closing: an error or Ctrl-C in the progress display must stop the children too, not wait for collection
    runs_of_todo = _here(todo, train) if engine is None else train_apart(todo, train, folder, engine, retries)
    with contextlib.closing(runs_of_todo) as trained:
        runs = list(progress(chain(earlier, trained), title, total=len(tasks)))
    return SweepResult(folder, sorted(runs, key=lambda run: run.index))


def tasks_of(settings: Sequence[Mapping[str, Any]], folder: Path, seed: int, fingerprint: str) -> list[Task]:
    """The task of each setting, as :func:`run_sweep` names and seeds it."""
    tasks = []
    for index, setting in enumerate(settings):
        identity = canonical([setting, seed + index, fingerprint])
        name = f"{index:03d}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        tasks.append(Task(index, folder / name, dict(setting), seed + index))
    return tasks


def check_numbers(jobs: int, seed: int, runs: int) -> None:
    """Refuse numbers of jobs and seeds that cannot be.

    Raises:
        UnsupportedSetup: `jobs` below 1, or a seed out of the range that random generators take.
    """
    if jobs < 1:
        raise UnsupportedSetup(f"jobs is {jobs}; expected 1 or more trainings at a time.")
    if not 0 <= seed <= _LARGEST_SEED - runs:
        raise UnsupportedSetup(f"seed is {seed}; expected a number from 0 to {_LARGEST_SEED - runs}.")


def check_retries(retries: int, *, apart: bool) -> None:
    """Refuse a number of retries that cannot be.

    Raises:
        UnsupportedSetup: `retries` is below 0, or the trainings have no processes of their own that could die.
    """
    if retries < 0:
        raise UnsupportedSetup(
            f"retries is {retries}; expected 0 or more further attempts of a run whose process died."
        )
    if retries and not apart:
        raise UnsupportedSetup(
            f"retries is {retries} with jobs 1, where a training that dies takes the sweep along; expected 0. "
            "Set jobs to 2 or more, or engine to ray or replicas, for trainings in processes of their own."
        )


def make_folder(folder: Path) -> None:
    """Make the folder of many trainings.

    Raises:
        UnwritableOutput: It cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableOutput(f"{folder}: this folder cannot be created: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UnwritableOutput(f"{folder}: no permission to write; give another folder.")


def _here(tasks: Sequence[Task], train: Train) -> Iterator[Run]:
    """Train one after the other in this process."""
    for task in tasks:
        try:
            run = finished_run(task)  # by another sweep, since this one began
            if run is None:
                empty_folder(task)
                run = attempt(task, train)
        except BaseException:  # Ctrl-C, or a signal
            discard_unfinished(task)
            raise
        yield run
