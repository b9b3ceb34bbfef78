"""Workers of a sweep on a Ray cluster: a task for each training, on whichever node has the CPUs and GPUs for it."""

import contextlib
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.runs import sweep_workers
from lightning_soup.runs.ray_cluster import ADDRESSES, Pulse, connected, enough_room, is_address
from lightning_soup.runs.ray_files import NOT_SHARED, Place, refuse_unshared
from lightning_soup.runs.sweep_run import Task, Train
from lightning_soup.runs.sweep_workers import Ended, pickled, threads_within, work

__all__ = ["RayCluster"]

_SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class RayCluster:
    """Engine of a sweep that trains on a Ray cluster, whose nodes share the files of this machine.

    Each training is a Ray task with a process of its own; Ray decides how many run at a time, and where.

    Args:
        address: A cluster that exists, "auto" for the one of this machine. None starts one on this machine, and stops
            it at the end.
        num_cpus: CPUs of a training, which has as many threads.
        num_gpus: GPUs of a training; a fraction shares one. None is 1 where a node has any, else 0, which hides them.
        same: Called here and on the nodes of a cluster that exists. Nothing is trained where the results differ.

    Raises:
        UnsupportedSetup: A number or the address is none that Ray takes.
    """

    address: str | None = None
    num_cpus: float = 1
    num_gpus: float | None = None
    same: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        if self.address is not None and not is_address(self.address):
            raise UnsupportedSetup(f"address is {self.address!r}; expected {ADDRESSES}.")
        if not (0 < self.num_cpus <= 1 or (self.num_cpus > 1 and float(self.num_cpus).is_integer())):
            raise UnsupportedSetup(f"num_cpus is {self.num_cpus}; expected a whole number of CPUs or a part of one.")
        if self.num_gpus is not None and not 0 <= self.num_gpus <= 1:
            raise UnsupportedSetup(
                f"num_gpus is {self.num_gpus}; expected 1, a part of 1, or 0: a training of a sweep has one device."
            )

    def __call__(self, train: Train, folder: Path, tasks: int) -> "RayTasks":
        """The workers; Ray queues as many tasks as there are."""
        return RayTasks(self, pickled(train), folder)


class RayTasks:
    """The workers of a sweep, while it is connected to a cluster.

    Args:
        cluster: Where, and what each needs.
        train: The pickled `train`.
        folder: Where the folders of the tasks lie.
    """

    def __init__(self, cluster: RayCluster, train: bytes, folder: Path) -> None:
        self._cluster, self._train, self._folder = cluster, train, folder
        self._place = Place.here()
        self._threads = threads_within(max(1, int(cluster.num_cpus)))
        # Futures, because ray.wait and ray.get turn the exception of a signal's handler into an exit with status 1.
        self._running: dict[futures.Future[str | None], tuple[Task, Any]] = {}
        self._connection = contextlib.ExitStack()
        self._ray: ModuleType
        self._pulse: Pulse
        self._remote: Any
        self._gpus: str | None = None

    def __enter__(self) -> "RayTasks":
        """Connect, and see whether the cluster can do what is asked."""
        cluster = self._cluster
        with contextlib.ExitStack() as stack:
            self._ray = stack.enter_context(connected(cluster.address))
            nodes, num_gpus = enough_room(self._ray, cluster.address, cluster.num_cpus, cluster.num_gpus)
            if cluster.address is not None:
                refuse_unshared(self._ray, cluster.address, nodes, self._folder, self._place, cluster.same)
            self._pulse = Pulse(self._ray)
            self._gpus = None if num_gpus else ""
            # Ray's retries would find what the first attempt left; a second call, the state that a training left.
            options = {"num_cpus": cluster.num_cpus, "num_gpus": num_gpus, "max_retries": 0, "max_calls": 1}
            self._remote = self._ray.remote(**options)(_train)
            self._connection = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Interrupt the trainings, end those that do not obey, and disconnect."""
        with self._connection, contextlib.suppress(ConnectionError, self._ray.exceptions.RayError):
            left = set(self._running)
            for force in (False, True):
                for future in left:
                    if self._ray.is_initialized():  # where ray:// has lost its cluster, Ray would start another here
                        self._ray.cancel(self._running[future][1], force=force)
                left = futures.wait(left, timeout=sweep_workers.SECONDS_TO_STOP).not_done
        if self._running:
            time.sleep(1)  # a task that is ended by force counts as ended before its process is gone
        self._running.clear()

    def has_place(self) -> bool:
        """Always: Ray queues what it cannot start yet, and a cluster that can grow grows by its queue."""
        return True

    def start(self, task: Task) -> None:
        """Hand the task to Ray."""
        (task.folder / self._place.mark).touch()
        ref = self._remote.remote(self._train, task, self._place, self._threads, self._gpus)
        self._running[ref.future()] = (task, ref)

    def wait(self) -> Sequence[Ended]:
        """Wait for a task to end.

        Raises:
            LightningSoupError: The cluster is gone.
            UnsupportedSetup: A node does not see the folder of its task.
        """
        errors = self._ray.exceptions
        try:
            while not (
                done := futures.wait(self._running, _SECONDS_BETWEEN_LOOKS, return_when=futures.FIRST_COMPLETED).done
            ):
                self._pulse.feel()
            return [self._ended(future) for future in done]
        except (ConnectionError, errors.RaySystemError, errors.LocalRayletDiedError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise LightningSoupError(
                f"the connection to the Ray cluster was lost: {reason}. Finished runs are kept; give the command again."
            ) from error

    def _ended(self, future: "futures.Future[str | None]") -> Ended:
        task, errors = self._running[future][0], self._ray.exceptions
        ended = Ended(task, "ended before it finished")
        try:
            if blind := future.result():
                folder = task.folder.resolve()
                raise UnsupportedSetup(
                    f"{blind}: this node of the Ray cluster does not see {folder} as this machine made it. "
                    f"{NOT_SHARED} If another sweep trains the same runs, let that end first."
                )
        except errors.RayTaskError as error:
            ended = Ended(task, f"ended by {str(error).strip().splitlines()[-1].rstrip('.')}", died=False)
        except errors.OutOfMemoryError:
            ended = Ended(
                task, "was ended by Ray, whose node ran out of memory (a larger num_cpus trains fewer at a time)"
            )
        except (errors.RaySystemError, errors.LocalRayletDiedError):  # all further tasks would end so, too
            raise
        except errors.RayError as error:
            ended = Ended(task, f"died before it finished ({_first_sentence(error)})")
        del self._running[future]
        return ended


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.partition(". ")[0].rstrip(".") or type(error).__name__


def _train(train: bytes, task: Task, place: Place, threads: int, gpus: str | None) -> str | None:
    """Body of the Ray task.

    Returns:
        The name of this node where it does not see the folder of the task.
    """
    try:
        place.enter()
        (task.folder / place.mark).unlink()
    except OSError:
        return socket.gethostname()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray's handler would make a failed training of a lost node
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - Ray's own may write to another file
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        work(train, task, threads, gpus)
    except Exception:
        traceback.print_exc()  # to the log
        raise
    return None
