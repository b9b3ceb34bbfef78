"""The files of a sparse soup: the start of each cycle, its copies, and its soups."""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_soup.errors import LightningSoupError
from lightning_soup.layers.costs import layer_costs, write_costs
from lightning_soup.layers.masks import Masks
from lightning_soup.recipes import Soup
from lightning_soup.runs.figures_sparse import curves_of, sparse_picture
from lightning_soup.runs.tracking import folder_of_run
from lightning_soup.weights.atomic import atomic_path, user_path
from lightning_soup.weights.combine import combine
from lightning_soup.weights.weights_file import WeightsFile, metric_prefixes, open_checkpoint


class CycleFiles:
    """Weights that a fit comes back to, on a disk that all ranks share; a checkpoint remembers where and what they are.

    Args:
        folder: Where new ones go.
        known: What :meth:`state` gave.
    """

    def __init__(self, folder: Path, known: dict[str, list[str]] | None = None) -> None:
        self.folder = folder
        self._known = dict(known or {})

    def state(self) -> dict[str, list[str]]:
        """Path and digest of each file, by its name."""
        return dict(self._known)

    def path(self, name: str) -> Path:
        """Where a new file of this name goes."""
        return self.folder / f"{name}.ckpt"

    def write(self, trainer: Trainer, name: str) -> None:
        """Save the module's weights, on rank 0; a failure is raised on every rank."""
        # Not by trainer.save_checkpoint: it may write later (AsyncCheckpointIO), ranks would wait for one that failed,
        # and what a module makes of its files (on_save_checkpoint) does not fit it without the way back.
        content = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        content["state_dict"] = trainer.strategy.lightning_module_state_dict()

        def save(path: Path) -> None:
            with atomic_path(path) as temporary:
                torch.save(content, temporary)

        self._write(trainer, name, save)

    def write_soup(self, trainer: Trainer, name: str, soup: Soup) -> None:
        """Save a soup with its provenance, on rank 0; a failure is raised on every rank."""
        self._write(trainer, name, soup.save)

    def _write(self, trainer: Trainer, name: str, save: Callable[[Path], object]) -> None:
        path, error, found = self.path(name), None, None
        if trainer.is_global_zero:
            try:
                save(path)
                found = [str(path.absolute()), open_checkpoint(path).digest()]
            except LightningSoupError as caught:
                error = caught
            except Exception as caught:
                error = LightningSoupError(f"{path} was not written ({type(caught).__name__}: {caught}).")
        error, found = trainer.strategy.broadcast((error, found))
        if error is not None:
            raise error
        self._known[name] = found

    def write_report(self, trainer: Trainer, masks: Masks, records: Sequence[Mapping[str, Any]], metric: str) -> None:
        """Write the masks, for :class:`.SparsityMask`, what is left of each layer, and a picture, on rank 0.

        Training is over and the soup is written: where this fails, there is a warning.
        """
        if not trainer.is_global_zero:
            return
        try:
            self._report(trainer, masks, records, metric)
        except Exception as error:
            rank_zero_warn(
                f"SparseModelSoup: the soup is in {self.folder}, but masks, layers and picture are not all there "
                f"({type(error).__name__}: {error})."
            )

    def _report(self, trainer: Trainer, masks: Masks, records: Sequence[Mapping[str, Any]], metric: str) -> None:
        with atomic_path(self.folder / "masks.pt") as temporary:
            torch.save(masks.state(), temporary)
        module = trainer.lightning_module
        example = module.example_input_array  # where there is one, operations are counted, too
        inputs = example if isinstance(example, tuple) else (example,) if isinstance(example, Tensor) else ()
        inputs = [part.to(module.device) if isinstance(part, Tensor) else part for part in inputs]
        with atomic_path(self.folder / "layers.csv") as temporary:
            write_costs(layer_costs(module, masks, *inputs), temporary)
        sparse_picture(curves_of(records), masks, metric, self.folder / "sparse_soup.png")

    def open(self, name: str) -> WeightsFile:
        """Open a file of this fit, where it was written or, if that was moved, in the present folder.

        Raises:
            LightningSoupError: It is gone, or was written over by another fit.
        """
        path, digest = self._known[name]
        moved = self.path(name)
        if not os.path.exists(path) and moved.exists() and open_checkpoint(moved).digest() == digest:
            path = str(moved.absolute())
            self._known[name] = [path, digest]
        if not os.path.exists(path):
            raise LightningSoupError(
                f"{path} is gone, which this fit comes back to ({name}). Put it back, name the folder it is in now "
                "with SparseModelSoup(dirpath=…), or begin the fit anew."
            )
        found = open_checkpoint(path)
        if found.digest() != digest:
            raise LightningSoupError(
                f"{path} was written by another fit since ({name}). Give each fit a folder of its own, by dirpath or a "
                "logger with versions, and begin this one anew."
            )
        return found

    def load(self, name: str, module: LightningModule) -> None:
        """Write the weights of a file into the module, in place."""
        combine([self.open(name).without(metric_prefixes(module))], [1.0], module)

    def remove(self, trainer: Trainer, names: list[str]) -> None:
        """Delete files, on rank 0."""
        for name in names:
            path, _ = self._known.pop(name)
            if trainer.is_global_zero and os.path.exists(path):
                os.unlink(path)
        trainer.strategy.barrier("sparse soup files")


def folder_of(trainer: Trainer, dirpath: str | None, resumed: bool, known: dict[str, list[str]]) -> Path:
    """Where the files of a fit go, the same on every rank.

    Args:
        trainer: The Trainer.
        dirpath: What the user gave. None: ``sparse_soup`` beside where ModelCheckpoint puts its own by default, in the
            run's folder. Where there is no such folder (no logger), fits get one each: ``sparse_soup-v1``.
        resumed: Whether the fit goes on from a checkpoint, whose files may be there.
        known: The files of that checkpoint.
    """
    given = user_path(dirpath) if dirpath else folder_of_run(trainer) / "sparse_soup"
    if dirpath:
        if not resumed and trainer.is_global_zero and _taken(given):
            rank_zero_warn(
                f"SparseModelSoup: {given} has files of another fit, which this one writes over. Give each fit a "
                "dirpath of its own to keep them."
            )
    elif trainer.is_global_zero:
        own = [folder for folder in (Path(path).parent for path, _ in known.values()) if folder.exists()]
        own = [folder for folder in own if folder.parent == given.absolute().parent]
        names = (given.with_name(f"{given.name}-v{number}") for number in itertools.count(1))
        given = next(
            folder for folder in itertools.chain(own[-1:], [given], names) if folder in own or not _taken(folder)
        )
    return Path(trainer.strategy.broadcast(str(given)))


def _taken(folder: Path) -> bool:
    return any(folder.glob("cycle=*.ckpt"))


def start_of(cycle: int) -> str:
    """The name of the pruned weights that the copies of a cycle begin from."""
    return f"cycle={cycle}-start"


def copy_of(cycle: int, copy: int) -> str:
    """The name of a copy, numbered from 1."""
    return f"cycle={cycle}-copy={copy + 1}"


def soup_of(cycle: int) -> str:
    """The name of the soup of a cycle."""
    return f"cycle={cycle}-soup"
