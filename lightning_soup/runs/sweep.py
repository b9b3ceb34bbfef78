"""Train one ingredient per setting: a folder each, resumable, and a failure does not stop the rest."""

import contextlib
import hashlib
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lightning_soup.errors import UnsupportedSetup, UnwritableOutput
from lightning_soup.progress import Progress, silent
from lightning_soup.runs.sweep_run import (
    ERROR_FILE,
    Run,
    Task,
    Train,
    attempt,
    canonical,
    discard_unfinished,
    empty_folder,
    failed_run,
    finished_run,
)

__all__ = ["SweepResult", "run_sweep"]

LOG_FILE = "log.txt"
_LARGEST_SEED = 2**32 - 1  # of numpy
SECONDS_TO_STOP = 5.0  # after a polite signal, before a child is killed


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
    progress: Progress = silent,
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
        fingerprint: Stands for everything else that decides the result, such as a hash of the base config.
        progress: Shows how many runs are done.

    Returns:
        All runs, those that failed included.

    Raises:
        UnsupportedSetup: No settings, `jobs` or `seed` out of range, or a `train` that cannot be sent to another
            process.
        UnwritableOutput: The folder cannot be written.
    """
    check_numbers(jobs, seed, len(settings))
    if not settings:
        raise UnsupportedSetup("no settings to train; a sweep needs at least one.")
    folder = Path(folder)
    make_folder(folder)
    tasks = []
    for index, setting in enumerate(settings):
        identity = canonical([setting, seed + index, fingerprint])
        name = f"{index:03d}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        tasks.append(Task(index, folder / name, dict(setting), seed + index))
    earlier = [run for task in tasks if (run := finished_run(task))]
    done = {run.index for run in earlier}
    todo = [task for task in tasks if task.index not in done]
    # closing: an error or Ctrl-C in the progress display must stop the children too, not wait for collection
    with contextlib.closing(_here(todo, train) if jobs == 1 else _in_processes(todo, train, jobs, spread)) as trained:
        runs = list(progress(chain(earlier, trained), "Training ingredients", total=len(tasks)))
    return SweepResult(folder, sorted(runs, key=lambda run: run.index))


def check_numbers(jobs: int, seed: int, runs: int) -> None:
    """Refuse numbers of jobs and seeds that cannot be.

    Raises:
        UnsupportedSetup: `jobs` below 1, or a seed out of the range that random generators take.
    """
    if jobs < 1:
        raise UnsupportedSetup(f"jobs is {jobs}; expected 1 or more trainings at a time.")
    if not 0 <= seed <= _LARGEST_SEED - runs:
        raise UnsupportedSetup(f"seed is {seed}; expected a number from 0 to {_LARGEST_SEED - runs}.")


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
            empty_folder(task)
            run = attempt(task, train)
        except BaseException:  # Ctrl-C, or a signal
            discard_unfinished(task)
            raise
        yield run


def _in_processes(tasks: Sequence[Task], train: Train, jobs: int, spread: bool) -> Iterator[Run]:
    """Train `jobs` at a time, each in a process of its own that is started afresh (never forked)."""
    try:
        pickled = pickle.dumps(train)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UnsupportedSetup(
            f"{train!r} cannot be sent to another process ({error}); use a top-level function or jobs=1."
        ) from error
    waiting, running = deque(tasks), dict[BaseProcess, Task]()
    threads = _share_of_cores(min(jobs, len(tasks)))
    gpus = _gpus() if spread and tasks else []
    places = deque(range(jobs))  # each training takes a place, and the GPU that belongs to it
    taken: dict[BaseProcess, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                empty_folder(task)
                gpu = gpus[places[0] % len(gpus)] if len(gpus) > 1 else None
                process = get_context("spawn").Process(target=_child, args=(pickled, task, threads, gpu))
                process.start()
                running[process], taken[process] = task, places.popleft()
            connection.wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                places.append(taken.pop(process))
                yield _outcome(running.pop(process), process.exitcode or 0)
    finally:
        _stop(list(running))
        for task in running.values():
            discard_unfinished(task)


def _child(pickled: bytes, task: Task, threads: int, gpu: str | None) -> None:
    """Body of a child process. Nothing heavy is imported before the threads and the log are set up."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(task.folder / LOG_FILE, "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    if "torch" in sys.modules:  # the user's main script imported it, and took all cores
        sys.modules["torch"].set_num_threads(threads)
    attempt(task, pickle.loads(pickled))


def _end_with_parent() -> None:
    """Without this, a killed sweep would train on, into folders that its next start empties."""
    if parent := parent_process():
        connection.wait([parent.sentinel])
        os._exit(1)


def _share_of_cores(jobs: int) -> int:
    """Threads for each of so many processes; a smaller OMP_NUM_THREADS that the user set holds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // max(1, jobs))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) > 0 else share


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch  # not needed for anything else here

    count = torch.cuda.device_count()  # does not start CUDA
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(count))) if visible is None else [name.strip() for name in visible.split(",")]
    return names[:count]  # CUDA ends its list at the first name that it does not know


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _outcome(task: Task, exit_code: int) -> Run:
    """Read from a run's folder what its process, now ended, did."""
    if run := finished_run(task):
        return run
    error_file = task.folder / ERROR_FILE
    if error_file.is_file():
        return failed_run(task, error_file.read_text())
    ending = f"ended with exit code {exit_code}"
    if exit_code < 0:
        ending = f"was killed by {signal.Signals(-exit_code).name}"
    hint = " (out of memory? try fewer jobs)" if exit_code == -signal.SIGKILL else ""
    return failed_run(task, f"The process {ending} before it finished{hint}; see {LOG_FILE}.")
