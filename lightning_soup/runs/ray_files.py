"""Whether the nodes of a Ray cluster have the files of this machine, which a sweep's trainings read and write."""

import contextlib
import importlib
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_soup.errors import UnsupportedSetup

__all__ = ["NOT_SHARED", "Place", "refuse_unshared"]

NOT_SHARED = (
    "Expected the current folder and the folder of the runs on a file system that all nodes have under the same path. "
    "Give the command in such a folder, with the runs below it, or train on this machine: engine local."
)
_SECONDS_TO_LOOK = 300.0  # the first import of torch from a network file system may take a minute


@dataclass(frozen=True)
class Place:
    """Where the command was given, for a process of another machine to take up.

    Args:
        cwd: Its current folder.
        path: Where it imports from.
        environment: What decides where W&B logs; not its key, which is the nodes' own.
        mark: Name of a file that only this command has written.
    """

    cwd: str
    path: tuple[str, ...]
    environment: dict[str, str]
    mark: str = field(default_factory=lambda: f".ray-{uuid.uuid4().hex}")

    @classmethod
    def here(cls) -> "Place":
        """The place of this process."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if name.startswith("WANDB_") and not name.endswith("_API_KEY")
        }
        return cls(os.getcwd(), tuple(path or os.getcwd() for path in sys.path), environment)

    def enter(self) -> None:
        """Make it the place of this process: relative paths and imports of modules then mean the same.

        Raises:
            OSError: There is no such folder on this machine.
        """
        os.chdir(self.cwd)
        sys.path += [path for path in self.path if path not in sys.path]
        os.environ.update(self.environment)


def refuse_unshared(
    ray: ModuleType,
    address: str,
    nodes: Sequence[Mapping[str, Any]],
    folder: Path,
    place: Place,
    same: Callable[[], Any] | None,
) -> None:
    """Look from every node at the folder of the runs, the current folder and the files that trainings start from.

    Raises:
        UnsupportedSetup: A node does not see what this machine sees.
    """
    strategy = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    here = None if same is None else same()
    mark = folder / place.mark
    problems = []
    try:
        mark.touch()
        looks = [
            ray.remote(num_cpus=0, max_calls=1, scheduling_strategy=strategy(node["NodeID"], soft=False))(look).remote(
                folder, place, same, here
            )
            for node in nodes
        ]
        for node, found in zip(nodes, looks, strict=True):
            try:
                problem = found.future().result(_SECONDS_TO_LOOK)
            except futures.TimeoutError:
                problem = f"did not answer in {_SECONDS_TO_LOOK:g} seconds"
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                problem = f"cannot start a training: {lines[-1]}"
            if problem:
                problems.append(f"{node['NodeManagerHostname']} {problem}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            mark.unlink()
    if problems:
        raise UnsupportedSetup(f"address is {address!r}, a cluster of which {'; '.join(problems)}. {NOT_SHARED}")


def look(folder: Path, place: Place, same: Callable[[], Any] | None, expected: Any) -> str | None:
    """What is wrong with the files of the node that this runs on; None where nothing is."""
    try:
        place.enter()
    except OSError as error:
        return f"does not have the current folder {place.cwd}: {error.strerror}"
    if not (folder / place.mark).is_file():
        return f"does not see the folder of the runs, {Path(place.cwd, folder)}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"may not write to the folder of the runs, {Path(place.cwd, folder)}"
    if same is not None and same() != expected:
        return "has another version of the config, or of a file that it names"
    return None
