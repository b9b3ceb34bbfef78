"""The files of a sparse soup: the start of each cycle, its copies, and its soups."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

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
        """Save the module's weights, on rank 0."""
        path = self.path(name)
        trainer.save_checkpoint(path, weights_only=True)
        self._known[name] = trainer.strategy.broadcast([str(path), open_checkpoint(path).digest()])

    def write_soup(self, trainer: Trainer, name: str, soup: Soup) -> None:
        """Save a soup with its provenance, on rank 0; a failure is raised on every rank."""
        path, error = self.path(name), None
        if trainer.is_global_zero:
            try:
                soup.save(path)
            except LightningSoupError as caught:
                error = caught
        error = trainer.strategy.broadcast(error)
        if error is not None:
            raise error
        self._known[name] = trainer.strategy.broadcast([str(path), open_checkpoint(path).digest()])

    def write_report(self, trainer: Trainer, masks: Masks, records: Sequence[Mapping[str, Any]], metric: str) -> None:
        """Write the masks, for :class:`.SparsityMask`, what is left of each layer, and a picture, on rank 0."""
        if trainer.is_global_zero:
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
        """Open a file of this fit.

        Raises:
            LightningSoupError: It is gone, or was written over by another fit.
        """
        path, digest = self._known[name]
        if not os.path.exists(path):
            raise LightningSoupError(
                f"{path} is gone, which this fit comes back to ({name}). Put it back, or begin the fit anew; keep the "
                "folder of SparseModelSoup with the checkpoint."
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


def start_of(cycle: int) -> str:
    """The name of the pruned weights that the copies of a cycle begin from."""
    return f"cycle={cycle}-start"


def copy_of(cycle: int, copy: int) -> str:
    """The name of a copy, numbered from 1."""
    return f"cycle={cycle}-copy={copy + 1}"


def soup_of(cycle: int) -> str:
    """The name of the soup of a cycle."""
    return f"cycle={cycle}-soup"
