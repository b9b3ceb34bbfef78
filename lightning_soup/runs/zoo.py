"""A zoo: models over a grid of temperature and load, what was measured of them, and the phases that this tells.

Layout of the folder of a zoo::

    zoo.parquet                 a row for each model, with what was measured of it and of its cell (COLUMNS)
    zoo.json                    the grid, how it was measured, the thresholds of the phases, a summary by phase
    phases.png, measures.png    pictures of the grid
    models/<run>/model.safetensors      the weights that training left, beside run.json and config.yaml
    models/<run>/average.safetensors    the mean of the last epochs' weights
    cells/<run>/soup.safetensors        the plain average of a cell's seeds

Source: Schürholt et al., A Model Zoo on Phase Transitions in Neural Networks (arXiv 2504.18072); phases by Yang et al.,
NeurIPS 2021 (arXiv 2107.11228).
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.extras import import_extra
from lightning_soup.landscape.phases import Cell, Phase, Thresholds, assign, calibrate
from lightning_soup.runs.sweep_run import Run
from lightning_soup.runs.zoo_file import ZooFile
from lightning_soup.weights.atomic import atomic_path

__all__ = ["COLUMNS", "Zoo", "ZooCell", "read_zoo"]

_OF_MODELS = ("train_loss", "train_acc", "majority", "val_loss", "val_acc")
_OF_MODELS += ("lambda_max", "trace", "trace_error", "delta_epochs")
_OF_CELLS = ("mc", "line", "barrier", "cka", "distance", "delta_seeds")

COLUMNS = {
    "cell": "number of the cell; the load changes fastest",
    "temperature": "value of the temperature-like option, as JSON",
    "load": "value of the load-like option, as JSON",
    "seed": "seed of the training",
    "model": "file of the weights, from the zoo's folder; empty where training failed",
    "average": "file of the mean of the last epochs' weights; empty where there is none",
    "soup": "file of the plain average of the cell's seeds; empty where there is none",
    "train_loss": "mean loss on the fixed training samples",
    "train_acc": "accuracy there, 0 to 1",
    "majority": "share of the most common class there",
    "val_loss": "mean loss on the validation data",
    "val_acc": "accuracy there, 0 to 1",
    "lambda_max": "largest eigenvalue of the Hessian of the training loss",
    "trace": "trace of that Hessian; may be below 0",
    "trace_error": "standard error of the trace",
    "delta_epochs": "accuracy of the mean of the last epochs' weights minus that of the last",
    "cell_mc": "mode connectivity on a Bézier curve, points of training error, mean over pairs of the cell's seeds",
    "cell_line": "mode connectivity on the straight line, likewise",
    "cell_barrier": "barrier of the training loss on the straight line, likewise",
    "cell_cka": "CKA of the validation logits, likewise",
    "cell_distance": "distance of the weights, likewise",
    "cell_delta_seeds": "accuracy of the average of the cell's seeds minus their mean accuracy",
    "phase": "I, II, III, IV-A, IV-B or undetermined, by the thresholds in zoo.json",
}
"""Columns of ``zoo.parquet``."""


@dataclass(frozen=True)
class ZooCell:
    """What was measured of one setting.

    Attributes:
        temperature: Value of the temperature-like option.
        load: Value of the load-like option.
        models: Of each seed that finished what was measured.
        shared: What was measured of its seeds together; empty where fewer than two finished.
        phase: Its phase.
    """

    temperature: Any
    load: Any
    models: tuple[Mapping[str, float], ...]
    shared: Mapping[str, float]
    phase: Phase = "undetermined"

    def mean(self, name: str) -> float:
        """The mean over seeds of what was measured of models, or what was measured of all; NaN where it was not."""
        if name in _OF_CELLS:
            return self.shared.get(name, math.nan)
        values = [model[name] for model in self.models if name in model]
        return sum(values) / len(values) if values else math.nan

    def figures(self) -> Cell:
        """What decides the phase."""
        return Cell(
            self.mean("train_loss"),
            self.mean("trace"),
            self.mean("mc"),
            self.mean("cka"),
            len(self.models),
            100 * self.mean("train_acc"),
            100 * self.mean("majority"),
        )


@dataclass(frozen=True)
class Zoo:
    """A zoo that was trained and measured.

    Attributes:
        folder: Where it lies.
        file: What was asked for.
        cells: Its cells; the load changes fastest.
        thresholds: The borders of the phases; None: too few cells to propose any, and no phases.
        models: The trainings, those of a cell together.
        soups: The measurement of each cell; None where there was nothing to measure.
    """

    folder: Path
    file: ZooFile
    cells: tuple[ZooCell, ...]
    thresholds: Thresholds | None
    models: tuple[Run, ...]
    soups: tuple[Run | None, ...]

    @classmethod
    def of(cls, folder: Path, file: ZooFile, models: Sequence[Run], soups: Sequence[Run | None]) -> "Zoo":
        """Put a zoo together from its trainings and measurements, and name the phases.

        Args:
            folder: Where it lies.
            file: What was asked for.
            models: The trainings, in the order of ``file.settings``.
            soups: The measurement of each cell.
        """
        count = len(file.seeds)
        cells = []
        for number, cell in enumerate(file.cells):
            runs = models[number * count : (number + 1) * count]
            whole = tuple(run.metrics for run in runs if run.error is None)
            shared = soups[number].metrics if soups[number] is not None and soups[number].error is None else {}
            cells.append(ZooCell(*cell.values(), whole, shared))
        figures = [cell.figures() for cell in cells]
        thresholds = file.thresholds
        if thresholds is None:
            try:
                thresholds = calibrate(figures)
            except UnsupportedSetup:  # too few cells for a border
                thresholds = None
        if thresholds is not None:
            named = zip(cells, figures, strict=True)
            cells = [ZooCell(c.temperature, c.load, c.models, c.shared, assign(f, thresholds)) for c, f in named]
        return cls(folder, file, tuple(cells), thresholds, tuple(models), tuple(soups))

    @property
    def failed(self) -> list[Run]:
        """Trainings and measurements that failed."""
        return [run for run in (*self.models, *self.soups) if run is not None and run.error is not None]

    def by_phase(self) -> dict[str, dict[str, Any]]:
        """Of each phase that occurs: how many cells, and mean, least and largest accuracy and gains of averaging."""
        found: dict[str, dict[str, Any]] = {}
        for phase in get_args(Phase):
            cells = [cell for cell in self.cells if cell.phase == phase]
            if not cells:
                continue
            found[phase] = {"cells": len(cells)}
            for name in ("val_acc", "delta_epochs", "delta_seeds"):
                values = [value for cell in cells if math.isfinite(value := cell.mean(name))]
                if values:
                    found[phase][name] = [sum(values) / len(values), min(values), max(values)]
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A row for each model; see :data:`COLUMNS`."""
        count, rows = len(self.file.seeds), []
        for index, run in enumerate(self.models):
            number = index // count
            cell, soup = self.cells[number], self.soups[number]
            whole = run.error is None and run.checkpoint is not None
            average = run.folder / "average.safetensors"
            there = soup is not None and soup.error is None
            rows.append(
                {
                    "cell": number,
                    "temperature": json.dumps(cell.temperature, default=str),
                    "load": json.dumps(cell.load, default=str),
                    "seed": self.file.seeds[index % count],
                    "model": self._relative(run.checkpoint) if whole else "",
                    "average": self._relative(average) if whole and average.is_file() else "",
                    "soup": self._relative(soup.checkpoint) if there else "",
                    **{name: float(run.metrics.get(name, math.nan)) for name in _OF_MODELS},
                    **{f"cell_{name}": float(cell.mean(name)) for name in _OF_CELLS},
                    "phase": cell.phase,
                }
            )
        return rows

    def _relative(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def write(self) -> None:
        """Write the table, the summary and the pictures into the folder.

        Raises:
            MissingExtra: pyarrow is not installed.
        """
        from lightning_soup.runs.figures_zoo import zoo_pictures  # here since it imports matplotlib

        arrow, parquet = import_extra("pyarrow", "zoo"), import_extra("pyarrow.parquet", "zoo")
        rows = self.rows()
        table = arrow.table({name: [row[name] for row in rows] for name in COLUMNS})
        with atomic_path(self.folder / "zoo.parquet") as path:
            parquet.write_table(table, path)
        told = {
            "temperature": asdict(self.file.temperature),
            "load": asdict(self.file.load),
            "seeds": list(self.file.seeds),
            "measures": asdict(self.file.measures),
            "thresholds": None if self.thresholds is None else asdict(self.thresholds),
            "calibrated": self.file.thresholds is None and self.thresholds is not None,
            "columns": COLUMNS,
            "phases": self.by_phase(),
        }
        with atomic_path(self.folder / "zoo.json") as path:
            path.write_text(json.dumps(told, indent=2, default=str))
        for picture in zoo_pictures(self):
            with atomic_path(self.folder / f"{picture.name}.png") as path:
                path.write_bytes(picture.png)


def read_zoo(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a zoo's table, with the values of its options as they were in the config.

    Raises:
        UnsupportedSetup: There is no table.
        MissingExtra: pyarrow is not installed.
    """
    path = Path(folder).expanduser() / "zoo.parquet"
    arrow, parquet = import_extra("pyarrow", "zoo"), import_extra("pyarrow.parquet", "zoo")
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise UnsupportedSetup(
            f"{path}: cannot be read as the table of a zoo ({str(error)[:200]}). Expected the folder that "
            "lightning-soup zoo wrote."
        ) from error
    for row in rows:
        row["temperature"], row["load"] = json.loads(row["temperature"]), json.loads(row["load"])
    return rows
