"""Files that callbacks write on rank 0 for all ranks: their folder, and failures that every rank raises."""

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_soup.errors import LightningSoupError, NonFiniteWeights
from lightning_soup.runs.tracking import folder_of_run
from lightning_soup.weights.atomic import user_path

T = TypeVar("T")


def on_rank_zero(trainer: Trainer, work: Callable[[], T], failed: str) -> T:
    """Do something on rank 0 and give every rank what came out; a failure is raised on all, so that none waits.

    Args:
        trainer: The Trainer.
        work: What rank 0 does; the result can be pickled.
        failed: What is told of an unforeseen error, before its name.

    Raises:
        LightningSoupError: The work failed.
    """
    error: LightningSoupError | None = None
    found = None
    if trainer.is_global_zero:
        try:
            found = work()
        except LightningSoupError as caught:
            error = caught
        except Exception as caught:
            error = LightningSoupError(f"{failed} ({type(caught).__name__}: {caught}).")
    error, found = trainer.strategy.broadcast((error, found))
    if error is not None:
        raise error
    return found


def weights_of_fit(trainer: Trainer) -> dict[str, Any]:
    """A Lightning checkpoint of the module's weights alone, on every rank.

    Not by ``trainer.save_checkpoint``: it may write later (AsyncCheckpointIO), ranks would wait for one that failed,
    and what a module makes of its files (``on_save_checkpoint``) does not fit it without the way back.
    """
    content = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
    content["state_dict"] = trainer.strategy.lightning_module_state_dict()
    return content


def refuse_nan(module: LightningModule, path: Path) -> None:
    """Stop before checkpoints that are of use are dropped for such that are of none.

    Raises:
        NonFiniteWeights: A parameter holds NaN.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.isnan().any():
            raise NonFiniteWeights(
                f"{path}: was not written, as the parameter {name!r} holds NaN by now. Train with a smaller lr or with "
                "clipped gradients; the checkpoints before this one are kept."
            )


def folder_of_fit(
    trainer: Trainer, owner: str, name: str, pattern: str, dirpath: str | None, resumed: bool, known: Collection[str]
) -> Path:
    """Where the files of a fit go, the same on every rank.

    Args:
        trainer: The Trainer.
        owner: The callback.
        name: Name of the folder beside where ModelCheckpoint puts its own by default, in the run's folder. Where there
            is no such folder (no logger), fits get one each: ``<name>-v1``.
        pattern: What its files are named like.
        dirpath: The folder that the user gave.
        resumed: Whether the fit goes on from a checkpoint, whose files may be there.
        known: Paths of the files of that checkpoint.
    """
    given = user_path(dirpath) if dirpath else folder_of_run(trainer) / name
    if dirpath:
        if not resumed and trainer.is_global_zero and any(given.glob(pattern)):
            rank_zero_warn(
                f"{owner}: {given} has files of another fit, which this one writes over. Give each fit a dirpath of "
                "its own to keep them."
            )
    elif trainer.is_global_zero:
        own = [folder for folder in (Path(path).parent for path in known) if folder.exists()]
        own = [folder for folder in own if folder.parent == given.absolute().parent]
        names = (given.with_name(f"{given.name}-v{number}") for number in itertools.count(1))
        given = next(
            folder
            for folder in itertools.chain(own[-1:], [given], names)
            if folder in own or not any(folder.glob(pattern))
        )
    return Path(trainer.strategy.broadcast(str(given)))
