"""Passes over batches that the Trainer's loops do not offer: gradients on validation data, logits, BatchNorm.

The module runs in evaluation mode without its Trainer, so that ``self.log`` does nothing, and is left as it was.
"""

import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.outcomes import Outcome
from lightning_soup.weights.weights_file import clean_names


@dataclass(frozen=True)
class OwnLoops:
    """A module, the data module whose transfer hooks apply to its batches, and where and how precisely to run.

    Args:
        module: The module; it is left on the device.
        datamodule: Its data module, if there is one.
        device: The device to run on.
        precision: The Trainer's precision plugin: inputs are converted and casts apply as in its own loops.
    """

    module: LightningModule
    datamodule: LightningDataModule | None
    device: torch.device
    precision: Precision

    def loss_and_grad(self, batch: Any) -> tuple[float, dict[str, Tensor]]:
        """The loss that ``validation_step`` returns, and its gradient for every floating parameter, frozen ones too."""
        module = self.module
        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.is_floating_point())
            with self.detached(), torch.enable_grad():
                module.zero_grad(set_to_none=True)
                result = self._validation_step(batch)
                loss = result.get("loss") if isinstance(result, Mapping) else result
                if not isinstance(loss, Tensor) or loss.grad_fn is None:
                    raise RecipeError(
                        f"{type(module).__name__}.validation_step returned {type(result).__name__}, which has no "
                        "gradient. Let it return the loss, so that coefficients can be learned."
                    )
                loss.backward()
                gradient = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            names = clean_names(gradient, type(module).__name__)
            return loss.item(), {names[name]: value for name, value in gradient.items()}
        finally:
            module.zero_grad(set_to_none=True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def head(self, batch: Any) -> tuple[str, ...]:
        """Weight and bias of the linear layer whose output ``predict_step`` returns; nothing where there is none."""
        outputs: dict[str, Tensor] = {}
        layers = {name: layer for name, layer in self.module.named_modules() if isinstance(layer, nn.Linear)}
        hooks = [
            layer.register_forward_hook(lambda _layer, _inputs, output, name=name: outputs.__setitem__(name, output))
            for name, layer in layers.items()
        ]
        try:
            with self.detached(), torch.no_grad():
                logits = self._predict(batch)
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(logits, Tensor):
            return ()
        same = [name for name, o in outputs.items() if o.data_ptr() == logits.data_ptr() and o.shape == logits.shape]
        found = [f"{name}.{part}" for name in same[-1:] for part, _ in layers[name].named_parameters(recurse=False)]
        return tuple(clean_names(found, "head").values())

    def outcome(self, batches: Iterable[Any], groups: Tensor | None = None) -> Outcome:
        """Logits and targets of all batches; ``groups`` tells which rows stem from one image."""
        with self.detached(), torch.inference_mode():
            parts = [(self._logits(batch).float().cpu(), _targets(batch).cpu()) for batch in batches]
            if not parts:
                raise RecipeError("a test loader gave no batches (drop_last?), so there is nothing to report.")
            logits, targets = (torch.cat(column) for column in zip(*parts, strict=True))
        return Outcome(logits.clone(), targets.clone(), groups)

    def recalibrate(self, batches: Iterable[Any]) -> None:
        """Replace BatchNorm statistics by their plain mean over batches, and count them; nothing else changes."""
        layers = [p for p in self.module.modules() if isinstance(p, _BatchNorm) and p.track_running_stats]
        momenta = [layer.momentum for layer in layers]
        try:
            with self.detached(), torch.no_grad():
                for layer in layers:
                    layer.reset_running_stats()
                    layer.momentum = None  # torch's way to ask for a plain mean
                    layer.train()
                for batch in batches if layers else ():
                    self._validation_step(batch)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum

    def placed(self, batch: Any) -> Any:
        """The batch after the transfer hooks of the data module or module, on the module's device."""
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            given = self.datamodule is not None and is_overridden(hook, self.datamodule)
            arguments = (self.module.device, 0) if hook == "transfer_batch_to_device" else (0,)
            batch = getattr(self.datamodule if given else self.module, hook)(batch, *arguments)
        return batch

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The module in evaluation mode on the device, without a Trainer."""
        module, trainer = self.module, self.module._trainer
        modes = [(part, part.training) for part in module.modules()]
        module._trainer = None
        module.eval()
        module.to(self.device)
        try:
            with quiet():
                yield
        finally:
            module._trainer = trainer
            for part, training in modes:
                part.training = training
            for part in module.modules():
                if isinstance(part, Metric):  # what these loops counted is no part of the next validation
                    part.reset()

    def _validation_step(self, batch: Any) -> Any:
        arguments: list[Any] = [self.precision.convert_input(self.placed(batch)), 0]
        parameters = inspect.signature(self.module.validation_step).parameters
        if "dataloader_idx" in parameters:
            arguments.append(0)
        with self.precision.forward_context():
            return self.module.validation_step(*arguments)

    def _predict(self, batch: Any) -> Any:
        """What ``predict_step`` returns, or the module itself where it is not written: for the inputs of a pair."""
        batch = self.precision.convert_input(self.placed(batch))
        with self.precision.forward_context():
            if is_overridden("predict_step", self.module):
                return self.module.predict_step(batch, 0)
            return self.module(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def _logits(self, batch: Any) -> Tensor:
        logits = self._predict(batch)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            name = type(self.module).__name__
            raise RecipeError(
                f"{name}.predict_step must return logits [batch, classes] for a report. Change it, or go without "
                "(--report=false)."
            )
        return logits


@contextmanager
def ctrl_c_unchanged() -> Iterator[None]:
    """Undo what Trainer makes of Ctrl-C: an exit with status 1."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise


@contextmanager
def no_notices() -> Iterator[None]:
    """Keep back Lightning's lines on seeds, devices and tips, which would repeat for every Trainer of many."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back Lightning's notices and warnings, which would repeat for every candidate."""
    with no_notices(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*self.log.*trainer. reference is not registered.*")
        yield


def _targets(batch: Any) -> Tensor:
    if not isinstance(batch, (list, tuple)) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise RecipeError(
            f"a report needs batches (inputs, targets), got {type(batch).__name__}. "
            "Change the test loader, or go without (--report=false)."
        )
    return batch[1]
