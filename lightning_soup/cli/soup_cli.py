"""SoupCLI: LightningCLI with one more subcommand, `soup`, and short names for the classes of this package."""

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
    _InstantiatorFn,
)

import lightning_soup
from lightning_soup.cli.trainer import SoupTrainer
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.task_file import SECTION
from lightning_soup.runs.zoo_file import ZOO
from lightning_soup.weights import open_checkpoint

__all__ = ["SoupCLI"]

_FIT_ONLY = ("ckpt_path", "weights_only")
_OUR_OWN = ("soup", "inspect", "resolution")


class SoupCLI(LightningCLI):
    """`fit`, `validate`, `test`, `predict`, `soup`, `inspect`, `resolution` for any module and data of Lightning.

    The model and the data are named in the config by `class_path` and `init_args`, or by flags:
    `--model ImageClassifier --model.lr 0.001`. Modules in the current folder can be named too.

    Args:
        args: Flags in a list, or a nested mapping `{"subcommand": "fit", "fit": {...}}`; by default what the
            command line says.
        run: Run the subcommand. False only builds `trainer`, `model` and `datamodule`; there are no
            subcommands then.
        exit_on_error: Print what is wrong with the arguments and exit with code 2, as a command should. False
            raises `argparse.ArgumentError`, as a program should.
    """

    def __init__(self, args: ArgsType = None, *, run: bool = True, exit_on_error: bool = True) -> None:
        _import_short_names()
        # Abbreviated flags are off: `--trainer.max_epoch` would set max_epochs, and no typo would be found.
        parser: dict[str, Any] = {"exit_on_error": exit_on_error, "allow_abbrev": False}
        super().__init__(
            args=args,
            run=run,
            trainer_class=SoupTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            # the same command gives the same weights; ingredients need --seed_everything=1, 2, ...
            seed_everything_default=0,
            parser_kwargs={**parser, **{subcommand: dict(parser) for subcommand in self.subcommands()}},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that are subcommands, and the arguments that the CLI itself provides."""
        own = {"model", "dataloaders", "datamodule"}
        return {**LightningCLI.subcommands(), **dict.fromkeys(_OUR_OWN, own)}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Let our own take the config that a `fit` saved, with what only `fit` uses in it, and all take a task file."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in _OUR_OWN:
            for name in _FIT_ONLY:
                parser.add_argument(f"--{name}", type=Any, help="No effect here: from a config saved by fit.")
        for section, command in ((SECTION, "continual"), (ZOO, "zoo")):
            parser.add_argument(f"--{section}", type=Any, help=f"No effect here: for `lightning-soup {command}`.")
        return parser

    def before_instantiate_classes(self) -> None:
        """Take one device where the number is left open: our own evaluations are not spread over several."""
        if self.subcommand in _OUR_OWN and self.config[self.subcommand].trainer.devices == "auto":
            self.config[self.subcommand].trainer.devices = 1

    def _parse_ckpt_path(self) -> None:
        """Refuse files that are no Lightning checkpoints, such as a soup in safetensors, before they are unpickled."""
        given = self.config.get(self.config.get("subcommand") or "", Namespace()).get("ckpt_path")
        if given and Path(str(given)).is_file() and (found := open_checkpoint(str(given)).format) != "lightning":
            raise UnsupportedSetup(
                f"ckpt_path={given}: a file of weights ({found}), no Lightning checkpoint. Give it to the model, as "
                "--model.checkpoint_path, or cook soups into a .ckpt."
            )
        super()._parse_ckpt_path()

    def _add_instantiators(self) -> None:
        """Let the errors of constructors come through as they are, whatever the union a class is tried for."""
        wrapped = {LightningModule: _InstantiatorFn(self, "model"), LightningDataModule: _InstantiatorFn(self, "data")}
        for kind, instantiator in {**wrapped, object: _construct}.items():
            self.parser.add_instantiator(partial(_carry_errors, instantiator), kind, subclasses=True)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; see :class:`_Carried`."""
        try:
            super().instantiate_classes()
        except _Carried as carried:
            raise carried.error from carried.error.__cause__

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without Lightning's warning about `args` beside a command line: sweeps need just that."""
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)
        chosen = self.config.get(self.config.get("subcommand") or "", Namespace())
        given = [*(self.config.get("config") or []), *(chosen.get("config") or [])]
        self.save_config_kwargs = {"inputs": [Path(str(path)).resolve() for path in given]}


class _Carried(BaseException):
    """Takes an error past jsonargparse, which on any Exception tries the next type and in the end names none."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _carry_errors(
    instantiator: Callable[..., Any],
    kind: type,
    *args: Any,
    applied_instantiation_links: dict[str, Any],  # named, because jsonargparse passes it to those that name it
    **kwargs: Any,
) -> Any:
    try:
        return instantiator(kind, *args, applied_instantiation_links=applied_instantiation_links, **kwargs)
    except Exception as error:
        raise _Carried(error) from error


def _construct(kind: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
    return kind(*args, **kwargs)


_SAVED_BY_LIGHTNING = b"# lightning.pytorch=="  # the first line of every config that it saves


class _SaveConfig(SaveConfigCallback):
    """Saves the complete config beside the logs: over an earlier one, never over a file the user gave."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, inputs: Iterable[Path]) -> None:
        super().__init__(parser, config, overwrite=True)
        self.inputs = set(inputs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Without a logger the folder is the current one, where people keep a config.yaml of their own.
        if trainer.log_dir:
            path = Path(trainer.log_dir, self.config_filename).resolve()
            if path in self.inputs or (path.is_file() and not path.read_bytes().startswith(_SAVED_BY_LIGHTNING)):
                self.config_filename = "config.saved.yaml"
        super().setup(trainer, pl_module, stage)


def _import_short_names() -> None:
    if os.getcwd() not in sys.path:  # a console script does not look into the current folder, `python` does
        sys.path.append(os.getcwd())
    for name in lightning_soup.__all__:  # a class has a short name, as in `--model ImageClassifier`, once imported
        getattr(lightning_soup, name)
