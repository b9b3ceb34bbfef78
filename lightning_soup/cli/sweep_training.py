"""Training one setting of a sweep: the base config plus the setting's flags, in a folder of its own."""

import gc
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation.own_loops import ctrl_c_unchanged
from lightning_soup.recipes.ingredient import saves_between_validations
from lightning_soup.runs.sweep_run import Trained

__all__ = ["RunCLI", "flags", "log_setting", "train_setting"]

Work = Callable[[Trainer, LightningModule, LightningDataModule | None], Any]


def flags(setting: Mapping[str, Any]) -> list[str]:
    """Write a setting as the flags W&B's agent would pass to `lightning-soup fit`: `--model.lr=0.001`."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for name, value in setting.items()
    ]


def train_setting(setting: Mapping[str, Any], folder: Path, seed: int, *, base: str | Path, group: str = "") -> Trained:
    """Train a base config with a setting's values, as `lightning-soup fit` would, inside one folder.

    The ingredient is the checkpoint that the base config's first ModelCheckpoint calls its best, else its
    last; without a ModelCheckpoint the last weights are saved. Where the base config leaves the number of
    devices open, the training takes one.

    Args:
        setting: Values by dotted name, with or without `init_args`: `model.lr` or `model.init_args.lr`.
        folder: Everything the run writes goes here: logs, `checkpoints/`, `config.yaml`.
        seed: Takes the place of the base config's `seed_everything`; a setting may hold its own.
        base: The config file that `lightning-soup fit --config` takes.
        group: W&B group of the run, where the base config has a WandbLogger.

    Returns:
        The last logged metrics and the checkpoint. Where the checkpoint is not the last one, the metric that
        ModelCheckpoint monitored is that of the checkpoint; it is left out where files are saved between validations.

    Raises:
        LightningSoupError: The training saved no checkpoint.
    """

    def fit(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> None:
        log_setting(trainer, {"seed": seed, **setting})
        trainer.fit(model, datamodule=datamodule)

    try:
        cli = RunCLI(base, {"seed_everything": seed, **setting}, folder, group, work=fit)
        checkpoint = cli.trainer.checkpoint_callback
        path = checkpoint.best_model_path or checkpoint.last_model_path
        if not path:
            raise LightningSoupError(
                f"{base}: the training saved no checkpoint, so there is no ingredient. Let ModelCheckpoint "
                "save at least once (save_top_k, every_n_epochs); without it the last weights are saved."
            )
        metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
        if checkpoint.monitor is not None and saves_between_validations(checkpoint.state_key):
            metrics.pop(checkpoint.monitor, None)  # that of these very weights is not known
        elif checkpoint.best_model_score is not None:
            metrics[checkpoint.monitor] = float(checkpoint.best_model_score)
        return Trained(metrics, Path(path))
    finally:
        cli = checkpoint = None  # a Trainer keeps its module alive, in cycles
        gc.collect()


def log_setting(trainer: Trainer, setting: Mapping[str, Any]) -> None:
    """Log a setting to W&B, whose tables and plots are over logged hyperparameters."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(dict(setting))


class RunCLI(SoupCLI):
    """`lightning-soup fit` for one run of many in a program: it shares no file and no logger with the others.

    Args:
        base: Config file of the run.
        setting: Values that replace the config's.
        folder: Takes logs, checkpoints and the saved config.
        group: W&B group of the run.
        work: What to do with the trainer, the model and the data instead of `fit`.
    """

    def __init__(self, base: str | Path, setting: Mapping[str, Any], folder: Path, group: str, *, work: Work) -> None:
        self.folder, self.group, self.work = folder, group, work
        super().__init__(["fit", "--config", str(base), *flags(setting)], exit_on_error=False)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit`: building the parsers of all would take longer than a small model's epoch."""
        return {"fit": SoupCLI.subcommands()["fit"]}

    def before_instantiate_classes(self) -> None:
        """Point everything that writes files or logs into the run's own folder."""
        trainer = self.config.fit.trainer
        trainer.default_root_dir = str(self.folder)
        if trainer.devices == "auto":
            trainer.devices = 1
        trainer.enable_checkpointing = True
        callbacks = _nodes(trainer.callbacks)
        savers = [node for node in callbacks if _is_a(node, ModelCheckpoint)]
        if not savers:
            options = Namespace(save_weights_only=True, save_on_train_epoch_end=True)
            savers = [Namespace(class_path="lightning.pytorch.callbacks.ModelCheckpoint", init_args=options)]
            callbacks += savers
        for node in savers:
            node.init_args.dirpath = str(self.folder / "checkpoints")
        trainer.callbacks = callbacks
        for node in _nodes(trainer.logger):
            options = node.get("init_args") or Namespace()
            if "save_dir" in options:
                options.save_dir = str(self.folder)
            if _is_a(node, WandbLogger):  # with an id, all runs of the sweep would continue one W&B run
                options.dir = options.id = options.version = None
                options.name = options.get("name") or self.folder.name
                options.group = options.get("group") or self.group or None

    def fit(self, model: LightningModule, datamodule: LightningDataModule | None = None, **_: Any) -> None:
        """Do the work, and close the W&B run: the next logger of this program would continue an open one."""
        exit_code = 1
        try:
            with ctrl_c_unchanged():
                self.work(self.trainer, model, datamodule)
            exit_code = 0
        finally:
            if any(isinstance(logger, WandbLogger) for logger in self.trainer.loggers):
                import wandb

                wandb.finish(exit_code=exit_code)


def _nodes(value: Any) -> list[Namespace]:
    """The config nodes of one class or a list of them; none for None, True and False."""
    return [node for node in (value if isinstance(value, list) else [value]) if isinstance(node, Namespace)]


def _is_a(node: Namespace, parent: type) -> bool:
    module, _, name = node.class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return isinstance(found, type) and issubclass(found, parent)
