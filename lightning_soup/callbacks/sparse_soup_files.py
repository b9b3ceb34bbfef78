"""The files of a sparse soup: the start of each cycle, its copies, and its soups."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_soup.callbacks.rank_zero_files import folder_of_fit, on_rank_zero, weights_of_fit
from lightning_soup.errors import LightningSoupError
from lightning_soup.layers.costs import layer_costs, write_costs
from lightning_soup.layers.masks import Masks
from lightning_soup.recipes import Soup
from lightning_soup.runs.figures_sparse import curves_of, sparse_picture
from lightning_soup.weights.atomic import atomic_path
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
        content = weights_of_fit(trainer)

        def save(path: Path) -> None:
            with atomic_path(path) as temporary:
                torch.save(content, temporary)

        self._write(trainer, name, save)

    def write_each(self, trainer: Trainer, names: Sequence[str]) -> None:
        """Save the weights of each replica, under a name of its own; a failure on one is raised on every rank."""
        ranks, content = trainer.strategy.ranks, weights_of_fit(trainer)
        path = self.path(names[ranks.rank])

        def save() -> list[str]:
            with atomic_path(path) as temporary:
                torch.save(content, temporary)
            return [str(path.absolute()), open_checkpoint(path).digest()]

        self._known.update(zip(names, ranks.gather(ranks.agree(save)), strict=True))

    def write_soup(self, trainer: Trainer, name: str, soup: Soup) -> None:
        """Save a soup with its provenance, on rank 0; a failure is raised on every rank."""
        self._write(trainer, name, soup.save)

    def _write(self, trainer: Trainer, name: str, save: Callable[[Path], object]) -> None:
        path = self.path(name)

        def work() -> list[str]:
            save(path)
            return [str(path.absolute()), open_checkpoint(path).digest()]

        self._known[name] = on_rank_zero(trainer, work, f"{path} was not written")

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
    """Where the files of a fit go, the same on every rank; see :func:`.folder_of_fit`.

    Args:
        trainer: The Trainer.
        dirpath: What the user gave. None: ``sparse_soup`` in the run's folder.
        resumed: Whether the fit goes on from a checkpoint, whose files may be there.
        known: The files of that checkpoint.
    """
    paths = [path for path, _ in known.values()]
    return folder_of_fit(trainer, "SparseModelSoup", "sparse_soup", "cycle=*.ckpt", dirpath, resumed, paths)


def start_of(cycle: int) -> str:
    """The name of the pruned weights that the copies of a cycle begin from."""
    return f"cycle={cycle}-start"


def copy_of(cycle: int, copy: int) -> str:
    """The name of a copy, numbered from 1."""
    return f"cycle={cycle}-copy={copy + 1}"


def soup_of(cycle: int) -> str:
    """The name of the soup of a cycle."""
    return f"cycle={cycle}-soup"
