"""Task files: a config of ``lightning-soup fit`` with a section ``continual``, the tasks that are trained in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.sweep_file import read_yaml
from lightning_soup.runs.sweep_parameter import refuse_unknown

__all__ = ["SECTION", "TaskFile", "read_task_file"]

SECTION = "continual"
_KEYS = ("tasks", "orders", "order", "pretrain", "wise_ft", "metric")
_EXAMPLE = f"{SECTION}: {{tasks: {{birds: {{data.root: birds}}, cars: {{data.root: cars}}}}}}"


@dataclass(frozen=True)
class TaskFile:
    """A checked task file.

    Attributes:
        path: The file.
        tasks: Name of a task -> what it changes in the config, by dotted name: ``{"data.style": "inverted"}``.
        orders: Name of an order -> names of tasks.
        order: The order that is trained where none is asked for.
        pretrain: What a training changes in the config whose weights are the start of the first task. None: the start
            is what the model of the config is built with.
        wise_ft: α of WiSE-FT after each task: α·end + (1 − α)·start. 1: the end.
        metric: Accuracy that the model logs when it is tested.
        seed: The config's ``seed_everything``.
    """

    path: Path
    tasks: dict[str, dict[str, Any]]
    orders: dict[str, tuple[str, ...]]
    order: tuple[str, ...]
    pretrain: dict[str, Any] | None = None
    wise_ft: float = 1.0
    metric: str = "test_acc"
    seed: int = 0

    def ordered(self, order: str | Sequence[str] | None) -> tuple[str, ...]:
        """The tasks to train.

        Args:
            order: The name of an order of the file, or names of tasks, of which some may be left out; None: the order
                that the file names.

        Raises:
            UnsupportedSetup: No such order, or no such task.
        """
        return self.order if order is None else _resolve(self.path, order, self.orders, self.tasks)


def read_task_file(path: str | Path) -> TaskFile:
    """Read and check a task file.

    Raises:
        UnsupportedSetup: It cannot be read, or its section ``continual`` is missing or wrong.
    """
    path = Path(path)
    config = read_yaml(path, "config with a section continual")
    section = config.get(SECTION)
    if not isinstance(section, Mapping):
        raise UnsupportedSetup(
            f"{path}: there is no section {SECTION}, or it is no mapping. It lists the tasks in order, with what each "
            f"changes in the config: {_EXAMPLE}."
        )
    refuse_unknown(section, _KEYS, f"{path}: {SECTION} has no option")
    tasks = section.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        raise UnsupportedSetup(f"{path}: {SECTION}.tasks is {tasks!r}; expected one task or more, as in {_EXAMPLE}.")
    tasks = {str(name): _changes(path, f"tasks.{name}", changes) for name, changes in tasks.items()}
    orders = section.get("orders") or {}
    if not isinstance(orders, Mapping):
        raise UnsupportedSetup(f"{path}: {SECTION}.orders is {orders!r}; expected lists of tasks by name.")
    orders = {str(name): _resolve(path, order, {}, tasks) for name, order in orders.items()}
    order = section.get("order")
    pretrain = section.get("pretrain")
    return TaskFile(
        path,
        tasks,
        orders,
        tuple(tasks) if order is None else _resolve(path, order, orders, tasks),
        None if pretrain is None else _changes(path, "pretrain", pretrain),
        _share(path, section.get("wise_ft", 1.0)),
        str(section.get("metric", "test_acc")),
        _seed(path, config.get("seed_everything")),
    )


def _changes(path: Path, place: str, changes: Any) -> dict[str, Any]:
    if not isinstance(changes, Mapping) or not all(isinstance(name, str) for name in changes):
        raise UnsupportedSetup(
            f"{path}: {SECTION}.{place} is {changes!r}; expected options of the config and their values, such as "
            "{data.root: birds, model.lr: 1.0e-5}."
        )
    return dict(changes)


def _resolve(
    path: Path, order: Any, orders: Mapping[str, tuple[str, ...]], tasks: Mapping[str, Any]
) -> tuple[str, ...]:
    if isinstance(order, str | int) and str(order) in orders:
        return orders[str(order)]
    if isinstance(order, str) and order.startswith("[") and order not in tasks:  # numbers, as a command line gives them
        order = [part.strip() for part in order.strip("[]").split(",")]
    names = [order] if isinstance(order, str | int) else order
    known = f"Tasks: {', '.join(tasks)}." + (f" Orders: {', '.join(orders)}." if orders else "")
    if not isinstance(names, Sequence) or not names:
        raise UnsupportedSetup(f"{path}: {order!r} is no order of tasks; expected a list of names. {known}")
    names = tuple(map(str, names))
    unknown = [name for name in names if name not in tasks]
    if unknown:
        raise UnsupportedSetup(f"{path}: there is no task {', '.join(unknown)} in {SECTION}. {known}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnsupportedSetup(f"{path}: the order names {', '.join(twice)} twice; each task is trained once.")
    return names


def _share(path: Path, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise UnsupportedSetup(
            f"{path}: {SECTION}.wise_ft is {value!r}; expected the share of the fine-tuned weights, "
            "above 0 and at most 1."
        )
    return float(value)


def _seed(path: Path, value: Any) -> int:
    if value is None or value is True:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnsupportedSetup(f"{path}: seed_everything is {value!r}; expected a number, for a run that can go on.")
    return value
