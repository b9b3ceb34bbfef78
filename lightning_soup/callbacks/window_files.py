"""The last checkpoints of a fit, each in a folder with what was measured of it: adapters, or whole models."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_soup.callbacks.rank_zero_files import on_rank_zero, refuse_nan, weights_of_fit
from lightning_soup.modules.lora import config_in
from lightning_soup.recipes import Ingredient
from lightning_soup.recipes.training_record import STEP
from lightning_soup.weights.adapter_merging import METRICS_NAME, save_adapter
from lightning_soup.weights.adapters import FACTORS_A, RUN_ENTRY, adapter_in, adapter_names
from lightning_soup.weights.atomic import atomic_folder
from lightning_soup.weights.formats import ADAPTER_KEY
from lightning_soup.weights.weights_file import open_checkpoint

PATTERN = "step=*"
_WEIGHTS = "weights.ckpt"


class WindowFiles:
    """Folders ``step=<steps>`` of one fit, on a disk that all ranks share, and their metrics.

    Args:
        folder: Where they go.
        longest: How many are kept; None: all.
        state: What :meth:`state` gave, of the fit that this one goes on with.
    """

    def __init__(self, folder: Path, longest: int | None, state: Mapping[str, Any] | None = None) -> None:
        self.folder, self.longest = folder, longest
        self.kept: list[tuple[str, dict[str, float]]] = (
            [(path, dict(values)) for path, values in state["kept"]] if state else []
        )
        self.run: str | None = state["run"] if state else None

    def state(self) -> dict[str, Any]:
        """The paths, their metrics and the mark of the run, as plain values."""
        return {"kept": [[path, dict(values)] for path, values in self.kept], "run": self.run}

    def begin(self, module: LightningModule) -> None:
        """Mark the run by the factors A that it begins with, so that adapters of other runs are told from its own."""
        start = {name: value for name, value in module.state_dict().items() if any(mark in name for mark in FACTORS_A)}
        self.run = open_checkpoint(start).digest() if start else None

    def write(self, trainer: Trainer, module: LightningModule, metrics: Mapping[str, float]) -> None:
        """Save the module's adapter, or all its weights where it has none, and drop the oldest; on every rank.

        Raises:
            LightningSoupError: It cannot be written, or holds a NaN.
        """
        path = self.folder / f"step={metrics[STEP]:.0f}"
        content = weights_of_fit(trainer)
        config = config_in(module)

        def work() -> str:
            if config is not None:
                weights = open_checkpoint(content["state_dict"])
                weights.label = path.name
                mark = {} if self.run is None else {RUN_ENTRY: self.run}
                save_adapter([adapter_in(weights, config)], (1.0,), path, metadata=mark, metrics=metrics)
                return str(path.absolute())
            refuse_nan(module, path)
            with atomic_folder(path, files=(_WEIGHTS, METRICS_NAME)) as temporary:
                torch.save(content, temporary / _WEIGHTS)
                (temporary / METRICS_NAME).write_text(json.dumps(dict(metrics), indent=2) + "\n")
            return str(path.absolute())

        written = on_rank_zero(trainer, work, f"{path} was not written")
        self.kept = [(other, values) for other, values in self.kept if other != written] + [(written, dict(metrics))]
        while self.longest is not None and len(self.kept) > self.longest:
            gone, _ = self.kept.pop(0)
            if trainer.is_global_zero:
                shutil.rmtree(gone, ignore_errors=True)

    def ingredients(self) -> tuple[list[Ingredient], list[str]]:
        """The checkpoints that are there, where they were written or in the present folder, and those that are not."""
        found, gone = [], []
        for path, values in self.kept:
            places = [place for place in (Path(path), self.folder / Path(path).name) if place.exists()]
            if places:
                step = int(values[STEP])
                found.append(Ingredient(places[0], values, step, label=places[0].name))
            else:
                gone.append(path)
        return found, gone


def record_adapter(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint of the whole module how the adapter in it is configured, if there is one."""
    config = config_in(module)
    if config is not None:
        checkpoint[ADAPTER_KEY] = config


def adapter_tensors(module: LightningModule, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the adapter in a module, by PEFT's names on disk."""
    state = module.state_dict()
    return {short: state[long] for short, long in adapter_names(state, config).items()}
