"""Workers of a sweep on the processes that torchrun or SLURM started: each rank trains one setting at a time.

Rank 0 hands the trainings out, one to each rank that is free, and reads what became of them from the folders, which all
machines share. Through the store go small messages only: which training, and that it ended.
"""

import contextlib
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.progress import Progress, silent
from lightning_soup.runs import sweep_workers
from lightning_soup.runs.launched import World
from lightning_soup.runs.sweep import SweepResult, run_sweep, tasks_of
from lightning_soup.runs.sweep_processes import Processes, gpus
from lightning_soup.runs.sweep_run import ERROR_FILE, Run, Task, Train, canonical, finished_run
from lightning_soup.runs.sweep_workers import Ended, pickled, threads_within

__all__ = ["run_on_ranks"]

_SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_OF_SILENCE = 60.0  # after which a rank counts as lost
_SECONDS_TO_APPEAR = 60.0  # of a file that another machine has written
# Keys: a plan and its answers, training n of a rank and its ending, a sign of life, and the end.
_PLAN, _ANSWER, _ALIVE, _END, _LEFT = "plan", "answer/{}", "alive/{}", "end", "left/{}"
_TASK, _ENDED = "task/{}/{}", "ended/{}/{}"


def run_on_ranks(
    world: World,
    settings: Sequence[Mapping[str, Any]],
    train: Train,
    folder: str | Path,
    *,
    seed: int = 0,
    fingerprint: str = "",
    spread: bool = True,
    retries: int = 0,
    progress: Progress = silent,
    afterwards: Callable[[SweepResult], None] = lambda result: None,
) -> SweepResult:
    """Train every setting on whichever rank is free: :func:`.run_sweep`, called on all ranks.

    A rank that is lost counts as a training that died; the others go on, if what started them lets them.

    Args:
        world: All ranks.
        settings: As of :func:`.run_sweep`, and so are the others.
        train: See there.
        folder: See there; on a file system that all ranks share.
        seed: See there.
        fingerprint: See there.
        spread: Let each rank see one GPU only, by its number on its machine, where there are several.
        retries: See there.
        progress: Of rank 0.
        afterwards: What rank 0 does with the runs. The others wait for it, since a launcher ends all ranks when one
            ends with an error, such as that a run failed.

    Returns:
        All runs, on all ranks.

    Raises:
        UnsupportedSetup: As of :func:`.run_sweep`, and where the ranks have not the same settings, or do not all see
            the folder.
        LightningSoupError: On the other ranks, where rank 0 ended with an error or is gone.
    """
    folder, same = Path(folder), canonical([settings, seed, fingerprint])
    if world.rank > 0:
        tasks = tasks_of(settings, folder, seed, fingerprint)
        return SweepResult(folder, follow(world, spread, same, train, folder, tasks))
    with leading(world):
        result = run_sweep(
            settings,
            train,
            folder,
            seed=seed,
            fingerprint=fingerprint,
            engine=partial(ReplicaWorkers, world, spread, same),
            retries=retries,
            progress=progress,
        )
        afterwards(result)
        sys.stdout.flush()
    return result


def _processes(world: World, train: Train, spread: bool) -> Processes:
    """The process for one training at a time of this rank, which has its own GPU where there are several."""
    seen = gpus() if spread else []
    mine = seen[world.local_rank % len(seen)] if len(seen) > 1 else None
    return Processes(pickled(train), [mine], threads_within(world.cores))


@dataclass
class _Rank:
    """What rank 0 knows of another."""

    task: Task | None = None
    given: int = 0
    life: bytes = b""
    heard: float = field(default_factory=time.monotonic)


class ReplicaWorkers:
    """The workers of a sweep, as rank 0 sees them; the engine is ``partial(ReplicaWorkers, world, spread, same)``.

    Args:
        world: All ranks.
        spread: Let each see one GPU only.
        same: What must be equal on all ranks.
        train: Trains one task.
        folder: Where the folders of the tasks lie.
        tasks: How many there are.
    """

    def __init__(self, world: World, spread: bool, same: str, train: Train, folder: Path, tasks: int) -> None:
        self._store, self._folder, self._same = world.store, folder, same
        self._own = _processes(world, train, spread)
        self._others = {rank: _Rank() for rank in range(1, world.size)}

    def __enter__(self) -> "ReplicaWorkers":
        """See whether all ranks are there, with the same files and settings.

        Raises:
            UnsupportedSetup: One is not.
        """
        mark = self._folder / f".ranks-{uuid.uuid4().hex}"
        try:
            mark.touch()
            self._store.set(_PLAN, json.dumps({"mark": mark.name, "same": self._same}))
            deadline = time.monotonic() + SECONDS_OF_SILENCE
            problems = [f"rank {rank} {said}" for rank in self._others if (said := self._answer(rank, deadline))]
        finally:
            mark.unlink(missing_ok=True)
        if problems:
            raise UnsupportedSetup(
                f"engine is replicas, of which {'; '.join(problems)}. Expected the same command, in the same folder, "
                "on a file system that all machines share, with the runs below it."
            )
        self._own.__enter__()
        return self

    def _answer(self, rank: int, deadline: float) -> str:
        while not self._store.check([_ANSWER.format(rank)]):
            if self._store.check([_LEFT.format(rank)]):
                return "has ended"
            if time.monotonic() > deadline:
                return f"has not answered in {SECONDS_OF_SILENCE:g} seconds"
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return self._store.get(_ANSWER.format(rank)).decode()

    def __exit__(self, *error: object) -> None:
        """End what is running, here and on the other ranks."""
        if any(other.task for other in self._others.values()):
            end_all(self._store, list(self._others), "it was interrupted")
        self._own.__exit__()

    def has_place(self) -> bool:
        """Whether a rank is free."""
        return self._own.has_place() or any(other.task is None for other in self._others.values())

    def start(self, task: Task) -> None:
        """Give the task to a rank that is free, to this one last: it has the table to keep."""
        for rank, other in self._others.items():
            if other.task is None:
                other.task, other.heard = task, time.monotonic()
                self._store.set(_TASK.format(rank, other.given), str(task.index))
                return
        self._own.start(task)

    def wait(self) -> Sequence[Ended]:
        """Wait until a training ends, or a rank is lost."""
        while True:
            ended = list(self._own.wait(_SECONDS_BETWEEN_LOOKS))
            for rank in list(self._others):
                if found := self._look(rank):
                    ended.append(found)
            if ended:
                return ended

    def _look(self, rank: int) -> Ended | None:
        """What became of the training of a rank, if anything did; a rank that is lost, idle or not, is left out."""
        other = self._others[rank]
        task = other.task
        if task is not None and self._store.check([key := _ENDED.format(rank, other.given)]):
            other.task, other.given = None, other.given + 1
            report = json.loads(self._store.get(key))
            if report["finished"]:
                _appears(task)
            return Ended(task, report["how"], report["died"])
        life = self._store.get(key) if self._store.check([key := _ALIVE.format(rank)]) else b""
        if life != other.life:
            other.life, other.heard = life, time.monotonic()
        left = self._store.check([_LEFT.format(rank)])
        if not left and time.monotonic() - other.heard < SECONDS_OF_SILENCE:
            return None
        del self._others[rank]
        how = "has ended" if left else f"has not been heard of for {SECONDS_OF_SILENCE:g} seconds"
        return None if task is None else Ended(task, f"was lost with rank {rank}, which {how}")


def _appears(task: Task) -> None:
    """Wait for the record of a run, which a network file system may show late to other machines."""
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while finished_run(task) is None and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def leading(world: World) -> Iterator[None]:
    """Rank 0's part of a sweep: whatever ends it ends the others."""
    how = "finished"
    try:
        yield
    except BaseException as error:
        how = f"{type(error).__name__}: {error}"
        raise
    finally:
        end_all(world.store, range(1, world.size), how)


def end_all(store: Any, ranks: Sequence[int], how: str) -> None:
    """Tell the other ranks that the sweep is over, and wait until their trainings have stopped.

    Args:
        store: Where they look.
        ranks: The other ranks.
        how: ``"finished"``, or why not.
    """
    if not store.check([_END]):
        store.set(_END, how)
    deadline = time.monotonic() + 2 * sweep_workers.SECONDS_TO_STOP
    while not all(store.check([_LEFT.format(rank)]) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def follow(world: World, spread: bool, same: str, train: Train, folder: Path, tasks: Sequence[Task]) -> list[Run]:
    """Train what rank 0 hands out, until it says that the sweep is over.

    Args:
        world: All ranks, of which this one is not 0.
        spread: Let each rank see one GPU only.
        same: What must be equal on all ranks.
        train: Trains one task.
        folder: Where the folders of the tasks lie.
        tasks: All tasks of the sweep, as rank 0 has them.

    Returns:
        The runs, as rank 0 has them.

    Raises:
        LightningSoupError: Rank 0 ended with an error, or is gone.
    """
    rank, store = world.rank, world.store
    given, task, answered, signs = 0, None, False, 0
    try:
        with _processes(world, train, spread) as own:
            while not store.check([_END]):
                if not answered and store.check([_PLAN]):
                    store.set(_ANSWER.format(rank), _differs(json.loads(store.get(_PLAN)), folder, same))
                    answered = True
                if task is None and store.check([key := _TASK.format(rank, given)]):
                    task = tasks[int(store.get(key))]
                    own.start(task)
                for ended in own.wait(_SECONDS_BETWEEN_LOOKS):
                    report = {"how": ended.how, "died": ended.died, "finished": finished_run(task) is not None}
                    store.set(_ENDED.format(rank, given), json.dumps(report))
                    task, given = None, given + 1
                signs += 1
                store.set(_ALIVE.format(rank), str(signs))
        how = store.get(_END).decode()
    except RuntimeError as error:  # the store's own, where the process that holds it has ended
        raise LightningSoupError(
            f"rank {rank}: rank 0 is gone ({str(error).splitlines()[0]}). Finished runs are kept; give the command "
            "again."
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):
            store.set(_LEFT.format(rank), "")
    if how != "finished":
        raise LightningSoupError(f"rank {rank}: the sweep ended on rank 0: {how.removesuffix('.')}.")
    return [_outcome(task) for task in tasks]


def _differs(plan: Mapping[str, str], folder: Path, same: str) -> str:
    """What this rank does not have in common with rank 0; nothing where it may train."""
    if plan["same"] != same:
        return "has another version of the sweep file, of the config, or of a file that it names"
    if not (folder / plan["mark"]).is_file():
        return f"does not see the folder of the runs, {folder.resolve()}"
    return ""


def _outcome(task: Task) -> Run:
    if (run := finished_run(task)) is not None:
        return run
    try:
        text = (task.folder / ERROR_FILE).read_text().strip()
    except OSError:
        text = ""
    return Run(task.index, task.folder, task.setting, task.seed, {}, error=(text or "no reason known").splitlines()[-1])
