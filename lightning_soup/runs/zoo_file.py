"""Zoo files: a config of ``lightning-soup fit`` with a section ``zoo``, the grid of settings that are trained."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.landscape.phases import Thresholds
from lightning_soup.runs.sweep_file import read_yaml
from lightning_soup.runs.sweep_parameter import refuse_unknown

__all__ = ["ZOO", "Axis", "Measures", "ZooFile", "read_zoo_file"]

ZOO = "zoo"
_EXAMPLE = f"{ZOO}: {{temperature: {{data.batch_size: [8, 64]}}, load: {{model.model_args.embed_dim: [16, 64]}}}}"


@dataclass(frozen=True)
class Axis:
    """One side of the grid.

    Attributes:
        option: The config's option that differs, by dotted name.
        values: Its values.
    """

    option: str
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The last part of the option."""
        return self.option.rpartition(".")[2]


@dataclass(frozen=True)
class Measures:
    """How models and cells are measured.

    Args:
        metric: An accuracy from 0 to 1 that the validation step logs.
        loss: The loss that it logs.
        samples: Training samples that losses, curvature and curves are measured on.
        average_epochs: Δ_epochs compares the mean of so many last epochs' weights with the last epoch's.
        pairs: Pairs of seeds of a cell that are connected and compared, at most.
        curve_epochs: Passes over the samples in which a Bézier curve is bent.
        curve_lr: Its learning rate.
        curve_batch: Its batches.
        lanczos: Hessian products for λ_max at most.
        probes: Hessian products for the trace at most.

    Raises:
        UnsupportedSetup: A value is out of range.
    """

    metric: str = "val_acc"
    loss: str = "val_loss"
    samples: int = 1000
    average_epochs: int = 5
    pairs: int = 3
    curve_epochs: int = 10
    curve_lr: float = 0.05
    curve_batch: int = 64
    lanczos: int = 30
    probes: int = 30

    def __post_init__(self) -> None:
        least = {"samples": 4, "average_epochs": 1, "pairs": 1, "curve_epochs": 0, "curve_batch": 1}
        for name in ("metric", "loss"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise UnsupportedSetup(
                    f"{ZOO}.measures.{name} is {value!r}; expected the name of a metric that the validation step logs."
                )
        for name, lowest in {**least, "lanczos": 1, "probes": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise UnsupportedSetup(f"{ZOO}.measures.{name} is {value!r}; expected a whole number from {lowest} on.")
        rate = self.curve_lr
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
            raise UnsupportedSetup(f"{ZOO}.measures.curve_lr is {rate!r}; expected a number above 0.")

    def of_models(self) -> dict[str, Any]:
        """What concerns single models: where only the rest changes, none needs to be trained anew."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _OF_CELLS}


_OF_CELLS = ("pairs", "curve_epochs", "curve_lr", "curve_batch")


@dataclass(frozen=True)
class ZooFile:
    """A checked zoo file.

    Attributes:
        path: The file.
        temperature: What makes training noisy: batch size, learning rate, weight decay.
        load: How much there is to learn for the capacity: width, depth, noise in labels.
        seeds: Seeds of each cell.
        measures: How they are measured.
        thresholds: Borders of the phases; None: proposed by :func:`.calibrate` from the grid itself.
    """

    path: Path
    temperature: Axis
    load: Axis
    seeds: tuple[int, ...] = (0, 1, 2)
    measures: Measures = Measures()
    thresholds: Thresholds | None = None

    @property
    def cells(self) -> list[dict[str, Any]]:
        """What each cell changes in the config; the load changes fastest."""
        grid = itertools.product(self.temperature.values, self.load.values)
        return [{self.temperature.option: hot, self.load.option: loaded} for hot, loaded in grid]

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What each model changes in the config: those of a cell stand together."""
        return [{**cell, "seed_everything": seed} for cell in self.cells for seed in self.seeds]


def read_zoo_file(path: str | Path) -> ZooFile:
    """Read and check a zoo file.

    Raises:
        UnsupportedSetup: It cannot be read, or its section ``zoo`` is missing or wrong.
    """
    path = Path(path)
    section = read_yaml(path, "config with a section zoo").get(ZOO)
    if not isinstance(section, Mapping):
        raise UnsupportedSetup(
            f"{path}: there is no section {ZOO}, or it is no mapping. It names the grid that is trained: {_EXAMPLE}."
        )
    refuse_unknown(section, ("temperature", "load", "seeds", "measures", "thresholds"), f"{path}: {ZOO} has no option")
    thresholds = section.get("thresholds")
    axes = [_axis(path, name, section.get(name)) for name in ("temperature", "load")]
    if axes[0].option == axes[1].option:
        raise UnsupportedSetup(f"{path}: {ZOO}.temperature and {ZOO}.load are both {axes[0].option}; name two options.")
    return ZooFile(
        path,
        *axes,
        _seeds(path, section.get("seeds", 3)),
        Measures(**_options(path, "measures", section.get("measures") or {}, Measures)),
        None if thresholds is None else Thresholds(**_options(path, "thresholds", thresholds, Thresholds)),
    )


def _axis(path: Path, name: str, given: Any) -> Axis:
    pairs = list(given.items()) if isinstance(given, Mapping) else []
    if len(pairs) != 1 or not isinstance(pairs[0][0], str) or not isinstance(pairs[0][1], list) or not pairs[0][1]:
        raise UnsupportedSetup(
            f"{path}: {ZOO}.{name} is {given!r}; expected one option of the config and a list of its values, as in "
            f"{_EXAMPLE}."
        )
    option, values = pairs[0]
    if option == "seed_everything":
        raise UnsupportedSetup(f"{path}: {ZOO}.{name} is {option}, which differs within a cell; give {ZOO}.seeds.")
    if len({repr(value) for value in values}) < len(values):
        raise UnsupportedSetup(f"{path}: {ZOO}.{name} lists a value of {option} twice: {values}.")
    return Axis(option, tuple(values))


def _seeds(path: Path, given: Any) -> tuple[int, ...]:
    listed = list(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given
    fine = isinstance(listed, list) and listed and all(type(seed) is int and 0 <= seed < 2**32 for seed in listed)
    if not fine or len(set(listed)) < len(listed):
        raise UnsupportedSetup(
            f"{path}: {ZOO}.seeds is {given!r}; expected how many (3), or a list of different seeds ([0, 1, 2])."
        )
    return tuple(listed)


def _options(path: Path, name: str, given: Any, kind: type) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UnsupportedSetup(f"{path}: {ZOO}.{name} is {given!r}; expected a mapping.")
    refuse_unknown(given, [field.name for field in fields(kind)], f"{path}: {ZOO}.{name} has no option")
    return dict(given)
