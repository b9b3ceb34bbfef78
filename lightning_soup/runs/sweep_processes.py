"""Workers of a sweep on this machine: a process for each training, a share of the cores, and a GPU of its own."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

from lightning_soup.runs import sweep_workers
from lightning_soup.runs.sweep_run import Task, Train
from lightning_soup.runs.sweep_workers import Ended, pickled, threads_within, work

__all__ = ["Processes", "cores", "gpus", "share_of_cores"]


class Processes:
    """Train `jobs` at a time, each in a process of its own that is started afresh (never forked).

    Args:
        train: Trains one task, pickled.
        places: For each training at a time what CUDA_VISIBLE_DEVICES is there; None leaves it as it is.
        threads: Threads of each.
    """

    def __init__(self, train: bytes, places: Sequence[str | None], threads: int) -> None:
        self._train, self._threads = train, threads
        self._places = deque(places)
        self._running: dict[BaseProcess, tuple[Task, str | None]] = {}

    @classmethod
    def engine(cls, jobs: int, spread: bool) -> sweep_workers.Engine:
        """So many processes, or fewer where there are fewer tasks.

        Args:
            jobs: Trainings at a time.
            spread: Let each see one GPU only, another one for each while there are enough.
        """

        def make(train: Train, folder: Path, tasks: int) -> Processes:
            count, seen = min(jobs, tasks), gpus() if spread else []
            places = [seen[place % len(seen)] if len(seen) > 1 else None for place in range(count)]
            return cls(pickled(train), places, share_of_cores(count))

        return make

    def __enter__(self) -> "Processes":
        return self

    def has_place(self) -> bool:
        """Whether fewer than `jobs` are running."""
        return bool(self._places)

    def start(self, task: Task) -> None:
        """Start a process for the task."""
        place = self._places.popleft()
        process = get_context("spawn").Process(target=_child, args=(self._train, task, self._threads, place))
        process.start()
        self._running[process] = (task, place)

    def wait(self, timeout: float | None = None) -> list[Ended]:
        """Wait for processes to end, for so many seconds at most."""
        connection.wait([process.sentinel for process in self._running], timeout)
        ended = []
        for process in [process for process in self._running if not process.is_alive()]:
            task, place = self._running.pop(process)
            self._places.append(place)
            ended.append(Ended(task, _ending(process.exitcode or 0)))
        return ended

    def __exit__(self, *error: object) -> None:
        """Terminate the processes, and kill those that do not obey."""
        for process in self._running:
            process.terminate()
        deadline = time.monotonic() + sweep_workers.SECONDS_TO_STOP
        for process in self._running:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._running.clear()


def _child(train: bytes, task: Task, threads: int, gpu: str | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(train, task, threads, gpu)


def _end_with_parent() -> None:
    """Without this, a killed sweep would train on, into folders that its next start empties."""
    if parent := parent_process():
        connection.wait([parent.sentinel])
        os._exit(1)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_of_cores(processes: int) -> int:
    """Threads for each of so many processes."""
    return threads_within(max(1, cores() // processes))


def gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch  # not needed for anything else here

    count = torch.cuda.device_count()  # does not start CUDA
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(count))) if visible is None else [name.strip() for name in visible.split(",")]
    return names[:count]  # CUDA ends its list at the first name that it does not know


def _ending(exit_code: int) -> str:
    how = f"ended with exit code {exit_code}"
    if exit_code < 0:
        how = f"was killed by {signal.Signals(-exit_code).name}"
    hint = " (out of memory? try fewer jobs)" if exit_code == -signal.SIGKILL else ""
    return f"{how} before it finished{hint}"
