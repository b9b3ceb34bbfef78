"""`lightning-soup continual`: train a list of tasks in order, each from the weights of the one before."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_soup.cli.sweep import fingerprint, train_once
from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.cli.sweep_training import RunCLI, train_setting
from lightning_soup.cli.terminal import plain
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.own_loops import no_notices
from lightning_soup.progress import progress_lines, rich_progress
from lightning_soup.runs.continual import ContinualResult, run_continual
from lightning_soup.runs.sweep import check_numbers
from lightning_soup.runs.sweep_run import RUN_FILE, Trained
from lightning_soup.runs.task_file import TaskFile, read_task_file
from lightning_soup.runs.tracking import log_continual
from lightning_soup.weights import open_checkpoint, save_weights
from lightning_soup.weights.save import save_combination

__all__ = ["continual"]


def continual(
    config_file: str,
    *,
    folder: str | None = None,
    order: list[str] | str | None = None,
    start: str | None = None,
    seed: int | None = None,
) -> ContinualResult:
    """Train a list of tasks in order, each from the weights of the one before, and judge all tasks after each.

    The config is one of `lightning-soup fit` with a section more:

        continual:
          tasks:
            birds: {data.root: birds, model.templates: ["a photo of a {}, a type of bird."]}
            cars: {data.root: cars}

    Each task changes some options of the config. Further options of the section: `order` (the names of tasks in the
    order to train them; by default as they are listed), `orders` (several such lists by name), `pretrain` (what a
    training changes whose weights the first task starts from; by default the start is what the model is built with),
    `wise_ft` (α of an interpolation with the task's start after each task), `metric` (`test_acc`).

    The model needs an option `checkpoint_path`. Where the training has a live average (WeightEnsemble), the average is
    what is judged and what the next task starts from. A model with an option `teacher` that is not set gets the first
    start as its teacher, in every task.

    The same command goes on where it was ended: tasks that are trained are not trained again. Written to the folder:
    matrix.csv after every task, and continual.json, heatmap.png, curves.png and metrics.png at the end.

    Args:
        config_file: The config.
        folder: Where everything goes; `runs/<name of the config>` by default.
        order: The name of an order in the config, or names of tasks: `[birds, cars]`.
        start: Checkpoint that the first task starts from, instead of the config's start.
        seed: Seed of the first task, each further one takes the next; by default the config's seed_everything.

    Returns:
        The accuracies after each task, and the metrics.

    Raises:
        UnsupportedSetup: The config, a task or the order is wrong, or the folder holds another run; found before any
            task is trained.
        LightningSoupError: A training failed.
    """
    file = read_task_file(config_file)
    names = file.ordered(order)
    given = None if start is None else open_checkpoint(start)
    seed = file.seed if seed is None else seed
    check_numbers(1, seed, len(names))
    home = Path("runs", file.path.stem) if folder is None else Path(folder)
    settings = [file.tasks[name] for name in names]
    every = check_settings(file.path, file.path, [*settings, *([] if file.pretrain is None else [file.pretrain])])
    parsed, options = every[0], {name: _options(file, one) for name, one in zip(names, every, strict=False)}
    sequence = _Sequence(file, names, home, seed, options, given and str(given.path))
    bar = parsed.trainer.enable_progress_bar is not False  # Lightning's own is on the screen then
    with no_notices(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        result = run_continual(
            names,
            sequence.start,
            sequence.train,
            sequence.judge,
            home,
            seed=seed,
            fingerprint=fingerprint(file.path, settings) + (f" {given.digest()}" if given else ""),
            notes={"config": str(file.path), "model": parsed.model.as_dict(), "tasks": file.tasks},
            progress=progress_lines if bar else rich_progress,
        )
    _print(result)
    if parsed.trainer.logger:
        sequence.log(result)
    return result


def _options(file: TaskFile, parsed: Namespace) -> Mapping[str, Any]:
    """The options of the model, which must be able to start from a checkpoint."""
    options = parsed.model.get("init_args") or Namespace()
    if "checkpoint_path" not in options:
        raise UnsupportedSetup(
            f"{file.path}: {parsed.model.class_path} has no option checkpoint_path, but every task starts from the "
            "weights of the one before. Take ZSCL, CLIPClassifier or ImageClassifier, or give your model that option."
        )
    return options.as_dict()


@dataclass
class _Sequence:
    """What the runner asks for: the start, one training, one measurement; all by the config and a task's changes."""

    file: TaskFile
    names: Sequence[str]
    home: Path
    seed: int
    options: Mapping[str, Mapping[str, Any]]
    given: str | None
    first: Path | None = field(default=None, init=False)

    def start(self) -> Path:
        """The file with the weights that the first task starts from."""
        if not any(self.home.rglob(RUN_FILE)):
            for name in self.names:
                self._rehearse(name)
        if self.given is None and self.file.pretrain is not None:
            self.first = train_once(self.file.path, self.file.pretrain, self.home / "pretrain", self.seed)
            return self.first
        self.first = self.home / "start.safetensors"
        if not self.first.exists():
            name = self.names[0]
            # A given file may name its tensors otherwise; a copy as the model names them can be interpolated with.
            changes = {**self.file.tasks[name], **({} if self.given is None else self._from(name, Path(self.given)))}
            self._run(changes, lambda _, model, __: save_weights(model, self.first))
        return self.first

    def _rehearse(self, name: str) -> None:
        """Train a task for no step and test one batch, so that what cannot be is found before any training."""
        with TemporaryDirectory() as scratch:
            file = Path(scratch, "random.safetensors")
            off = {"model.pretrained": self._off(name)} if "pretrained" in self.options[name] else {}
            self._run({**self.file.tasks[name], **off}, lambda _, model, __: save_weights(model, file))
            setting = {**self._setting(name, file, teacher=file), "trainer.max_steps": 0, "trainer.max_epochs": -1}
            self._run({**setting, "trainer.num_sanity_val_steps": 0}, _fit)
            self.judge(name, file, {"trainer.limit_test_batches": 1})

    def _setting(self, name: str, start: Path, teacher: Path) -> dict[str, Any]:
        setting = {**self.file.tasks[name], **self._from(name, start)}
        if self.options[name].get("teacher", "") is None:
            setting.setdefault("model.teacher", str(teacher))
        return setting

    def train(self, name: str, start: Path, folder: Path, seed: int) -> Trained:
        """Train a task from a file of weights."""
        setting = self._setting(name, start, self.first)
        trained = train_setting(setting, folder, seed, base=self.file.path, group=self.home.name)
        alpha = self.file.wise_ft
        if alpha == 1:
            return trained
        path = trained.checkpoint.with_name("wise_ft.safetensors")
        save_combination([trained.checkpoint, start], [alpha, 1 - alpha], path)
        return Trained(trained.metrics, path)

    def judge(self, name: str, checkpoint: Path, options: Mapping[str, Any] | None = None) -> float:
        """Accuracy of a file of weights on the test data of a task."""
        found: dict[str, Any] = {}

        def test(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> None:
            trainer.test(model, datamodule=datamodule, verbose=False)
            found.update(trainer.callback_metrics)

        self._run({**self.file.tasks[name], **self._from(name, checkpoint), **(options or {})}, test)
        metric = self.file.metric
        if metric not in found:
            raise UnsupportedSetup(
                f"{self.file.path}: continual.metric is {metric!r}, but testing the task {name!r} logged "
                f"{', '.join(sorted(found)) or 'nothing'}."
            )
        value = float(found[metric])
        if not 0 <= value <= 1:
            raise UnsupportedSetup(
                f"{self.file.path}: continual.metric is {metric!r}, which is {value:.4g} on {name!r}; expected "
                "an accuracy from 0 to 1."
            )
        return value

    def log(self, result: ContinualResult) -> None:
        """Log the result to the loggers that the config names."""
        changes = {**self.file.tasks[self.names[0]], "trainer.callbacks": None}
        RunCLI(
            self.file.path,
            {"seed_everything": self.seed, **changes},
            self.home,
            self.home.name,
            work=lambda trainer, *_: log_continual(trainer.loggers, result),
        )

    def _from(self, name: str, checkpoint: Path) -> dict[str, Any]:
        """The options by which a model starts from a file."""
        changes: dict[str, Any] = {"model.checkpoint_path": str(checkpoint)}
        if "pretrained" in self.options[name]:
            changes["model.pretrained"] = self._off(name)
        return changes

    def _off(self, name: str) -> bool | None:
        """The value that switches off ``pretrained``, which is a tag or a flag."""
        return False if isinstance(self.options[name]["pretrained"], bool) else None

    def _run(self, setting: Mapping[str, Any], work: Any) -> None:
        """Build trainer, model and data of a setting, and do something that leaves no trace with them."""
        quiet = {"trainer.logger": False, "trainer.callbacks": None, "trainer.enable_progress_bar": False}
        with TemporaryDirectory() as scratch:
            RunCLI(self.file.path, {"seed_everything": self.seed, **setting, **quiet}, Path(scratch), "", work=work)


def _fit(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> None:
    trainer.fit(model, datamodule=datamodule)


def _print(result: ContinualResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("accuracy, %", *map(plain, result.names), title=plain(result.folder))
    for label, row in result.rows.items():
        table.add_row(plain(label), *(f"{row[name]:.1f}" for name in result.names))
    numbers = Table("", "Transfer", "Avg", "Last", "Forget")
    for label, found in {"zero-shot": result.zero_shot_metrics, "after training": result.metrics}.items():
        values = (found.transfer, found.average, found.last, found.forget)
        numbers.add_row(label, *("-" if math.isnan(value) else f"{value:.1f}" for value in values))
    Console().print(table, numbers, f"Written: {plain(result.folder / 'continual.json')} and pictures beside it.")
