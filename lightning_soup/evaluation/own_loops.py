"""Passes over batches that the Trainer's loops do not offer: gradients on validation data, logits, BatchNorm.

The module runs in evaluation mode and logs nothing; it and its Trainer are left as they were.
"""

import logging
import signal
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from lightning_soup.errors import RecipeError
from lightning_soup.evaluation.outcomes import Outcome
from lightning_soup.evaluation.robustness import Classes
from lightning_soup.weights.weights_file import clean_names, metric_prefixes, module_tensors


@dataclass(frozen=True)
class OwnLoops:
    """A module, the data module whose transfer hooks apply to its batches, and where and how precisely to run.

    Args:
        module: The module; it is left on the device.
        datamodule: Its data module, if there is one.
        device: The device to run on.
        precision: The Trainer's precision plugin: inputs are converted and casts apply as in its own loops.
        trainer: What the module sees as its Trainer; by default the one that it is attached to.
    """

    module: LightningModule
    datamodule: LightningDataModule | None
    device: torch.device
    precision: Precision
    trainer: Trainer | None = None

    def loss_and_grad(self, batch: Any, dataloader_idx: int = 0) -> tuple[float, dict[str, Tensor]]:
        """The loss that ``validation_step`` returns, and its gradient for every floating parameter, frozen ones too."""
        module = self.module
        metrics = metric_prefixes(module)  # networks inside metrics are no part of the model
        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        try:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(parameter.is_floating_point() and not name.startswith(metrics))
            with self.apart(), torch.enable_grad():
                module.zero_grad(set_to_none=True)
                result = self.validation_step(batch, dataloader_idx)
                loss = loss_of(result)
                if loss is None or loss.grad_fn is None:
                    raise RecipeError(
                        f"{type(module).__name__}.validation_step returned {type(result).__name__}, which has no "
                        "gradient. Let it return the loss, so that coefficients can be learned."
                    )
                loss.backward()
                gradient = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            return loss.item(), self._as_in_files(gradient)
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
            with self.apart(), torch.no_grad():
                logits = self._predict(batch)
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(logits, Tensor):
            return ()
        same = [name for name, o in outputs.items() if o.data_ptr() == logits.data_ptr() and o.shape == logits.shape]
        found = [f"{name}.{part}" for name in same[-1:] for part, _ in layers[name].named_parameters(recurse=False)]
        return tuple(clean_names(found, "head").values())

    def outcome(self, batches: Iterable[Any], groups: Tensor | None = None, classes: Classes | None = None) -> Outcome:
        """Logits and targets of all batches; see :class:`.Outcome` for ``groups`` and ``classes``."""
        with self.apart(), torch.inference_mode():
            parts = [(_targets(batch).cpu(), self._logits(batch).float().cpu()) for batch in batches]
            if not parts:
                raise RecipeError("a loader gave no batches (drop_last?), so there is nothing to evaluate.")
            targets, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return Outcome(logits.clone(), targets.clone(), groups, classes)

    def recalibrate(self, batches: Iterable[Any], frozen: Collection[str] = ()) -> dict[str, Tensor]:
        """Replace BatchNorm statistics by their plain mean over batches, and count them; nothing else changes.

        Batches go through ``validation_step``, or where there is none through ``predict_step`` or the module. A layer
        that they do not reach keeps the statistics it has.

        Args:
            batches: To estimate on.
            frozen: Names of layers that keep their statistics.

        Returns:
            The statistics by name; empty where there is no such BatchNorm.
        """
        named = {name: part for name, part in normed(self.module).items() if name not in frozen}
        layers = list(dict.fromkeys(named.values()))
        momenta = [layer.momentum for layer in layers]
        before = [[buffer.clone() for buffer in layer.buffers(recurse=False)] for layer in layers]
        step = self.validation_step if is_overridden("validation_step", self.module) else self._predict
        try:
            with self.apart(), torch.no_grad():
                for layer in layers:
                    layer.reset_running_stats()
                    layer.momentum = None  # torch's way to ask for a plain mean
                    layer.train()
                for batch in batches if layers else ():
                    step(batch)
                for layer, kept in zip(layers, before, strict=True):
                    if not layer.num_batches_tracked:
                        for buffer, value in zip(layer.buffers(recurse=False), kept, strict=True):
                            buffer.copy_(value)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
        found = {f"{name}.{key}": value for name, layer in named.items() for key, value in layer.named_buffers()}
        return self._as_in_files(found)

    def _as_in_files(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under their names in files: without the prefixes of wrappers."""
        names = clean_names(module_tensors(self.module), type(self.module).__name__)
        return {names[name]: value for name, value in tensors.items() if name in names}

    def placed(self, batch: Any) -> Any:
        """The batch after the transfer hooks of the data module or module, on the module's device."""
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
            given = self.datamodule is not None and is_overridden(hook, self.datamodule)
            arguments = (self.module.device, 0) if hook == "transfer_batch_to_device" else (0,)
            batch = getattr(self.datamodule if given else self.module, hook)(batch, *arguments)
        return batch

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The module in evaluation mode on the device; it has a Trainer to ask, but nothing that it logs gets there."""
        module, attached = self.module, self.module._trainer
        trainer = self.trainer or attached
        modes = [(part, part.training) for part in module.modules()]
        module.trainer = trainer
        module.eval()
        module.to(self.device)
        try:
            with quiet(), nullcontext() if trainer is None else hidden(trainer), _silent(module):
                yield
        finally:
            module.trainer = attached
            for part, training in modes:
                part.training = training
            for part in module.modules():
                if isinstance(part, Metric):  # what these loops counted is no part of the next validation
                    part.reset()

    def validation_step(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """What the module's ``validation_step`` returns for a batch, placed and converted as the Trainer does."""
        batch = self.precision.convert_input(self.placed(batch))
        step = self.module.validation_step
        with self.precision.forward_context():
            return step(batch, *_indices(step, dataloader_idx))

    def _predict(self, batch: Any) -> Any:
        """What ``predict_step`` returns, or the module itself where it is not written: for the inputs of a pair."""
        batch = self.precision.convert_input(self.placed(batch))
        step = self.module.predict_step
        with self.precision.forward_context():
            if is_overridden("predict_step", self.module):
                return step(batch, *_indices(step, 0))
            if not is_overridden("forward", self.module):
                raise RecipeError(
                    f"{type(self.module).__name__} has neither predict_step nor forward, so it gives no logits. Add a "
                    "predict_step that returns logits [batch, classes]; a soup can go without its report "
                    "(--report=false)."
                )
            return self.module(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def _logits(self, batch: Any) -> Tensor:
        logits = self._predict(batch)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            name = type(self.module).__name__
            raise RecipeError(
                f"{name}.predict_step must return logits [batch, classes], got {type(logits).__name__}. Change it; a "
                "soup can go without its report (--report=false)."
            )
        return logits


def loss_of(result: Any) -> Tensor | None:
    """The loss in what a step returned; ``None`` where there is none."""
    loss = result.get("loss") if isinstance(result, Mapping) else result
    return loss if isinstance(loss, Tensor) else None


def normed(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that have BatchNorm statistics, by every name that they have."""
    parts = module.named_modules(remove_duplicate=False)
    return {name: part for name, part in parts if isinstance(part, _BatchNorm) and part.track_running_stats}


def _indices(step: Callable[..., Any], dataloader_idx: int) -> list[int]:
    """The indices that a step takes after the batch, as Lightning's own loops pass them."""
    taken = [0] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else []
    last = is_param_in_hook_signature(step, "dataloader_idx", explicit=True, min_args=3)
    return [*taken, dataloader_idx] if last else taken


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Let ``self.log`` do nothing."""
    parts = [part for part in module.modules() if isinstance(part, LightningModule)]
    kept = [part.__dict__.get("log") for part in parts]
    for part in parts:
        part.__dict__["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        for part, own in zip(parts, kept, strict=True):
            del part.__dict__["log"]
            if own is not None:
                part.__dict__["log"] = own


@contextmanager
def hidden(trainer: Trainer) -> Iterator[None]:
    """Keep a Trainer's callbacks and loggers from seeing candidates: they are no part of anyone's training."""
    callbacks, loggers = trainer.callbacks, trainer.loggers
    trainer.callbacks, trainer.loggers = [], [DummyLogger() for _ in loggers]  # modules may use self.logger
    try:
        yield
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers


@contextmanager
def ctrl_c_unchanged() -> Iterator[None]:
    """Undo what Trainer makes of Ctrl-C: an exit with status 1, and no further Ctrl-C in this process."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            if handler is not None:  # one that was not set in Python cannot be set again
                signal.signal(signal.SIGINT, handler)
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
            f"expected batches (inputs, targets) of tensors, got {type(batch).__name__}. Change the loader; a soup can "
            "go without its report (--report=false)."
        )
    return batch[1]
