"""BatchNorm statistics of an average: estimated anew in passes of our own, without touching weights or training."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from lightning_soup.callbacks.fit_batches import batches_of_fit
from lightning_soup.callbacks.strategies import have_one_model
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.own_loops import OwnLoops, normed


class Statistics:
    """The running statistics of a module's BatchNorm layers, live and of its average.

    Lightning's own SWA callback runs an extra training epoch for this, with an optimizer step without a backward pass.
    Here training batches go through ``validation_step`` without gradients, with only the BatchNorm layers in training
    mode, and their plain mean is taken.
    """

    def __init__(self) -> None:
        self._live: list[tuple[Tensor, Tensor]] = []
        self._average: dict[str, Tensor] = {}

    def place(self, trainer: Trainer, module: LightningModule, batches: int) -> None:
        """Put the statistics of the average into the module, whose weights are the average already.

        Args:
            trainer: The Trainer, in ``fit``. With several ranks all must take part: each goes over its share of the
                data, and all end with the mean.
            module: The module.
            batches: Training batches of each rank to estimate from; 0: those of the last estimate, where there was one.
        """
        own = _statistics(module)
        self._live = [(buffer, buffer.clone()) for buffer in own.values()]
        if batches:
            with isolate_rng(), metrics_untouched(module):
                loops = OwnLoops(module, trainer.datamodule, trainer.strategy.root_device, trainer.precision_plugin)
                with closing(batches_of_fit(trainer, "train")) as given:
                    loops.recalibrate(islice(given, batches), _frozen(trainer, module))
            for buffer in own.values():
                if have_one_model(trainer) and buffer.is_floating_point():
                    buffer.copy_(trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))
            self._average = {name: buffer.clone() for name, buffer in own.items()}
        else:
            for name, value in self._average.items():
                own[name].copy_(value)

    def put_back(self) -> None:
        """Give the live statistics back."""
        for buffer, value in self._live:
            buffer.copy_(value)
        self._live = []

    def memory(self, module: LightningModule) -> set[int]:
        """The addresses of the statistics, into which both kinds are copied in turn."""
        return {buffer.data_ptr() for buffer in _statistics(module).values()}

    def restore(self, module: LightningModule, state_dict: dict[str, Tensor]) -> None:
        """Continue with the statistics that a file holds for the average."""
        self._average = {
            name: state_dict[name].to(buffer, copy=True)
            for name, buffer in _statistics(module).items()
            if name in state_dict
        }


def check_batch_norm(module: nn.Module, owner: str) -> None:
    """Refuse to recalibrate what is not there.

    Raises:
        UnsupportedSetup: The module has no BatchNorm layer with running statistics.
    """
    if not _statistics(module):
        raise UnsupportedSetup(
            f"{owner}(buffers='recalibrate'): {type(module).__name__} has no BatchNorm layer with running statistics. "
            "Use buffers='copy'."
        )


def _frozen(trainer: Trainer, module: LightningModule) -> list[str]:
    """Layers that are in evaluation mode while the rest trains: the rest relies on their statistics."""
    training = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode if trainer.validating else {}
    return [name for name, layer in normed(module).items() if not training.get(name, layer.training)]


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{key}" if prefix else key: buffer
        for prefix, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
        for key, buffer in layer.named_buffers(recurse=False)
    }


@contextmanager
def metrics_untouched(module: nn.Module) -> Iterator[None]:
    """Give metrics their counts back: those of the training epoch go on after its validation."""
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    names = [(*metric._defaults, "_update_count", "_computed") for metric in metrics]
    kept = [{n: _copy(getattr(m, n)) for n in known} for m, known in zip(metrics, names, strict=True)]
    try:
        yield
    finally:
        for metric, values in zip(metrics, kept, strict=True):
            for name, value in values.items():
                setattr(metric, name, value)


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value
