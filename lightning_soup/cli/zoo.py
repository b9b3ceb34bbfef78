"""`lightning-soup zoo`: train a grid of temperature × load × seeds, measure it, and name the phases."""

import math
import shutil
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_soup.cli.sweep import fingerprint
from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.cli.sweep_training import RunCLI, log_setting
from lightning_soup.cli.terminal import plain
from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.evaluation.loading import listed
from lightning_soup.evaluation.own_loops import no_notices
from lightning_soup.evaluation.training_evaluator import training_set
from lightning_soup.extras import import_extra
from lightning_soup.progress import rich_progress
from lightning_soup.runs.sweep import run_sweep
from lightning_soup.runs.sweep_run import Run, Trained
from lightning_soup.runs.zoo import Zoo
from lightning_soup.runs.zoo_file import ZOO, Measures, read_zoo_file
from lightning_soup.runs.zoo_measures import check_logged, measure_cell, measure_model
from lightning_soup.weights.save import save_combination, save_weights

__all__ = ["measure_seeds", "train_model", "zoo"]


def zoo(config_file: str, *, folder: str | None = None, jobs: int = 1) -> Zoo:
    """Train a grid of temperature × load × seeds, measure every model and every cell, and name the phases.

    The config is one of `lightning-soup fit` with a section more:

        zoo:
          temperature: {data.batch_size: [8, 32, 128]}         # what makes training noisy
          load: {model.model_args.embed_dim: [8, 16, 32, 64]}  # how much there is to learn for the capacity
          seeds: 3

    Further options of the section: `measures` (metric, loss, samples, average_epochs, pairs, curve_epochs, curve_lr,
    curve_batch, lanczos, probes) and `thresholds` (mc, trace, loss, similar, sharp_by); without, thresholds are
    proposed from the grid, and written down.

    Losses, curvature and curves are measured on fixed training samples: leave augmentation out. Each cell's seeds are
    averaged, and so are each model's last epochs. The layout of the folder is that of `lightning_soup.runs.zoo`; the
    table needs pyarrow (`pip install "lightning_soup[zoo]"`). The same command goes on where it was ended.

    Args:
        config_file: The config.
        folder: Where everything goes; `runs/<name of the config>` by default.
        jobs: Trainings at a time; above 1, each has its own process, a share of the cores and a log.txt.

    Returns:
        What was trained and measured.

    Raises:
        UnsupportedSetup: The config or its section is wrong; found before any training starts.
        MissingExtra: pyarrow is not installed; found then, too.
        LightningSoupError: No training finished.
    """
    import_extra("pyarrow.parquet", "zoo")
    file = read_zoo_file(config_file)
    home = Path("runs", file.path.stem) if folder is None else Path(folder)
    parsed = check_settings(file.path, file.path, file.settings)
    if any(one.get("data") is None for one in parsed):
        raise UnsupportedSetup(f"{file.path}: has no data; a zoo is measured on training and validation data.")
    trained = fingerprint(file.path, file.settings, without=ZOO)
    options = {"jobs": jobs, "progress": rich_progress}
    with no_notices(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        models = run_sweep(
            file.settings,
            partial(train_model, base=file.path, measures=file.measures, group=home.name),
            home / "models",
            title="Training models",
            fingerprint=f"{trained} {file.measures.of_models()}",
            **options,
        ).runs
        cells = _cells(models, len(file.seeds), file.cells, home)
        measured = (
            run_sweep(
                [cell for cell in cells if cell is not None],
                partial(measure_seeds, base=file.path, measures=file.measures),
                home / "cells",
                title="Measuring cells",
                fingerprint=f"{trained} {file.measures}",
                **options,
            ).runs
            if any(cells)
            else []
        )
    found = iter(measured)
    result = Zoo.of(home, file, models, [None if cell is None else next(found) for cell in cells])
    result.write()
    _print(result)
    if len(result.failed) == len(models):
        raise LightningSoupError(f"{home}: none of the {len(models)} trainings finished.")
    return result


def _cells(models: list[Run], count: int, cells: list[dict[str, Any]], home: Path) -> list[dict[str, Any] | None]:
    """What is measured of each cell: with the files of the seeds that finished; None for fewer than two.

    Files are named from the zoo's folder, so that a folder that was moved is not measured anew.
    """
    found = []
    for number, cell in enumerate(cells):
        whole = [run for run in models[number * count : (number + 1) * count] if run.error is None]
        files = [run.checkpoint.relative_to(home).as_posix() for run in whole]
        found.append(
            {**cell, "seed_everything": whole[0].setting["seed_everything"], "files": files} if len(files) > 1 else None
        )
    return found


def train_model(
    setting: Mapping[str, Any], folder: Path, seed: int, *, base: Path, measures: Measures, group: str = ""
) -> Trained:
    """Train one model of a zoo and measure it; see :func:`.run_sweep` for the first three arguments.

    Args:
        setting: What it changes in the config.
        folder: Where it goes.
        seed: Its seed, where the setting has none.
        base: The config.
        measures: How it is measured.
        group: W&B group.
    """
    model_file, average, found = folder / "model.safetensors", folder / "average.safetensors", {}

    def fit(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> None:
        log_setting(trainer, {"seed": seed, **setting})
        tail = _LastEpochs(folder / "epochs", measures.average_epochs)
        trainer.callbacks += [_Refusals(measures), tail]
        trainer.fit(model, datamodule=datamodule)
        save_weights(model, model_file)
        epochs = None
        if len(tail.files) > 1:
            save_combination(tail.files, [1 / len(tail.files)] * len(tail.files), average)
            epochs = tail.files[-1], average
        found.update(measure_model(model, datamodule, trainer, model_file, epochs, measures))

    try:
        RunCLI(base, {"seed_everything": seed, **setting}, folder, group, work=fit)
    except BaseException:  # what was not measured must not be taken for a model of the zoo
        for file in (model_file, average):
            file.unlink(missing_ok=True)
        raise
    finally:
        for extra in ("epochs", "checkpoints"):  # the weights are in model.safetensors
            shutil.rmtree(folder / extra, ignore_errors=True)
    return Trained(found, model_file)


class _Refusals(Callback):
    """Ends a training that could not be measured, at its start or first validation and not after its last epoch."""

    def __init__(self, measures: Measures) -> None:
        self.measures = measures

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training_set(listed(trainer.train_dataloader)[0], trainer.datamodule)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:  # in which some modules do not log
            figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
            check_logged(figures, self.measures.metric, self.measures.loss)


class _LastEpochs(Callback):
    """Keeps files of the weights after each of the last epochs."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.files: list[Path] = []
        self._number = 0  # not the Trainer's, since some callbacks begin at epoch 0 again

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{self._number}.safetensors"
        self._number += 1
        self.files.append(save_weights(pl_module, path))
        for old in self.files[: -self.keep]:
            old.unlink()
        self.files = self.files[-self.keep :]


def measure_seeds(setting: Mapping[str, Any], folder: Path, seed: int, *, base: Path, measures: Measures) -> Trained:
    """Measure what the seeds of a cell have in common; the result's checkpoint is their average.

    Args:
        setting: What the cell changes in the config, and ``files``, the weights of its seeds by their names in the
            zoo's folder.
        folder: Where it goes, two levels below the zoo's.
        seed: Not used: the setting has one.
        base: The config.
        measures: How it is measured.
    """
    soup, found = folder / "soup.safetensors", {}
    changes = {name: value for name, value in setting.items() if name != "files"}
    models = [folder.parents[1] / file for file in setting["files"]]
    quiet = {"trainer.logger": False, "trainer.callbacks": None, "trainer.enable_progress_bar": False}

    def measure(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> None:
        found.update(measure_cell(model, datamodule, trainer, models, soup, measures))

    RunCLI(base, {"seed_everything": seed, **changes, **quiet}, folder, "", work=measure)
    return Trained(found, soup)


def _print(result: Zoo) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("phase", "cells", "accuracy, %", "averaging epochs", "averaging seeds", title=plain(result.folder))
    for phase, told in result.by_phase().items():
        gains = (_range(told.get(name)) for name in ("delta_epochs", "delta_seeds"))
        table.add_row(phase, str(told["cells"]), _range(told.get("val_acc"), sign=""), *gains)
    Console().print(table)
    at = result.thresholds
    if at is None:
        print("No phases: too few cells to propose thresholds from. Give zoo.thresholds.")
    elif result.file.thresholds is None:
        sharp = f"a trace above {at.trace:.4g}, a connectivity beyond {at.mc:g} points, a CKA from {at.similar:.3g}"
        print(f"Borders that were proposed from this grid: {sharp}. Give zoo.thresholds for others.")
    print(f"Written: {result.folder / 'zoo.parquet'}, and pictures beside it.")
    for run in result.failed:
        print(f"failed: {run.folder}: {run.error}", file=sys.stderr)


def _range(values: list[float] | None, sign: str = "+") -> str:
    if values is None or not all(map(math.isfinite, values)):
        return "-"
    mean, low, high = (100 * value for value in values)
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
