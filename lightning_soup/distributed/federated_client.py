"""What a client does in a round: I local steps from the global weights, with a fresh Trainer."""

import copy
import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_soup.distributed.participation_clients import Client, whole_number
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.own_loops import ctrl_c_unchanged, quiet

__all__ = ["LocalTraining", "check_trainer_options", "evaluate_locally", "train_locally"]

_QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}
_OURS = ("max_steps", "max_epochs", "min_steps", "min_epochs", "max_time", "fast_dev_run")
_KNOWN = frozenset(inspect.signature(Trainer).parameters)
_IDLE_EPOCHS = 10  # without an optimizer step; some modules take one only every few epochs of so few batches


@dataclass(frozen=True)
class LocalTraining:
    """What came of local steps.

    Attributes:
        weights: y, the module's state dict after them, on the CPU.
        metrics: What the module logged, the last values.
        examples: Size of the training data, where it is known; else 0.
    """

    weights: dict[str, Tensor]
    metrics: dict[str, float]
    examples: int


def check_trainer_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Complete the options of the clients' Trainers: one CPU, and no files, bars or validation, unless asked for.

    Each training gets copies of the callbacks, as they are here; what they collect in attributes is lost with them.

    Raises:
        UnsupportedSetup: An option that Trainer does not have or that decides how long a client trains, or several
            devices.
    """
    given = dict(options or {})
    unknown = [name for name in given if name not in _KNOWN]
    if unknown:
        raise UnsupportedSetup(f"trainer: {unknown[0]!r} is no option of Lightning's Trainer. Look at its spelling.")
    length = [name for name in _OURS if name in given]
    if length:
        raise UnsupportedSetup(
            f"trainer: {length[0]} is decided by local_steps, how many optimizer steps a client takes in a round."
        )
    devices, nodes = given.get("devices", 1), given.get("num_nodes", 1)
    one = len(devices) == 1 if isinstance(devices, (list, tuple)) else devices in (1, "1")
    if not one or nodes != 1:
        raise UnsupportedSetup(
            f"trainer: a client trains on one device, got devices={devices!r}, num_nodes={nodes!r}. Leave both at 1, "
            "or name the one device in a list."
        )
    return {**_QUIET, **given}


def train_locally(
    module: LightningModule,
    data: Any,
    weights: Mapping[str, Tensor],
    local_steps: int,
    *,
    trainer: Mapping[str, Any] | None = None,
    seed: int | None = None,
    client: Client = "this one",
) -> LocalTraining:
    """Take I optimizer steps from the global weights.

    Trainer and optimizers are new, so that no state is carried from one round or client to another.

    Args:
        module: The module; it is trained in place. Give a copy to keep yours.
        data: A LightningDataModule, or what ``Trainer.fit`` takes as training data; gone through again where it is
            shorter than the steps.
        weights: x.
        local_steps: I.
        trainer: Options of the Trainer; see :func:`check_trainer_options`.
        seed: Of torch, numpy and Python for this training; ``None``: as they are.
        client: Its name, for messages.

    Raises:
        UnsupportedSetup: An option is wrong, the weights do not fit the module, or no step was taken.
    """
    options = {**check_trainer_options(trainer), "max_steps": whole_number(local_steps, "local_steps", 1)}
    _load(module, weights, client)
    if seed is not None:
        _seed(seed)
    with _one_use(data):
        local = _trainer({**options, "max_epochs": -1}, _EndOfIdleness())
        if isinstance(data, LightningDataModule):
            local.fit(module, datamodule=data)
        else:
            local.fit(module, data)
    if not local.global_step:
        raise UnsupportedSetup(
            f"client {client!r} took none of {local_steps} local steps: its training data is empty, or the module "
            "takes no optimizer step. Leave this client out, or give it data."
        )
    # Trainer and module name each other, so they stay until Python looks for such cycles, many clients later. What is
    # large in them, beside the weights, goes now.
    module.zero_grad()
    for optimizer in local.optimizers:
        optimizer.state.clear()
    found = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    metrics = {name: float(value) for name, value in local.callback_metrics.items()}
    return LocalTraining(found, metrics, _examples(local.train_dataloader))


def evaluate_locally(
    module: LightningModule,
    data: Any,
    weights: Mapping[str, Tensor],
    *,
    trainer: Mapping[str, Any] | None = None,
    client: Client = "this one",
) -> LocalTraining:
    """Validate the global weights on a client's data.

    Args:
        module: The module; it gets the weights.
        data: A LightningDataModule, or what ``Trainer.validate`` takes.
        weights: x.
        trainer: Options of the Trainer; see :func:`check_trainer_options`.
        client: Its name, for messages.

    Returns:
        The weights as they were, what validation logged, and the number of examples; nothing is logged where a data
        module has no validation data, or the module no ``validation_step``.

    Raises:
        UnsupportedSetup: An option is wrong, or the weights do not fit the module.
    """
    options = check_trainer_options({"limit_val_batches": 1.0, **(trainer or {})})
    _load(module, weights, client)
    without = isinstance(data, LightningDataModule) and not is_overridden("val_dataloader", data)
    if without or not is_overridden("validation_step", module):
        return LocalTraining(dict(weights), {}, 0)
    with _one_use(data):
        local = _trainer(options)
        if isinstance(data, LightningDataModule):
            local.validate(module, datamodule=data, verbose=False)
        else:
            local.validate(module, data, verbose=False)
    metrics = {name: float(value) for name, value in local.callback_metrics.items()}
    return LocalTraining(dict(weights), metrics, _examples(local.val_dataloaders))


class _EndOfIdleness(Callback):
    """Ends a training that would go through its data for ever, since nothing in it takes an optimizer step."""

    def __init__(self) -> None:
        self.steps = self.epochs = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs = 0 if trainer.global_step > self.steps else self.epochs + 1
        self.steps = trainer.global_step
        if self.epochs == _IDLE_EPOCHS:
            trainer.should_stop = True


def _trainer(options: Mapping[str, Any], *more: Callback) -> Trainer:
    """A Trainer with callbacks of its own, so that no state of theirs is carried on either."""
    given = options.get("callbacks") or []
    callbacks = copy.deepcopy([given] if isinstance(given, Callback) else list(given))
    return Trainer(**{**options, "callbacks": [*callbacks, *more]})


@contextmanager
def _one_use(data: Any) -> Iterator[None]:
    """Run a Trainer without its notices, and let the data module forget it then.

    By its Trainer, every client's data module would else keep a model, its gradients and its optimizer's state.
    """
    before = getattr(data, "trainer", None)
    try:
        with quiet(), ctrl_c_unchanged():
            yield
    finally:
        if isinstance(data, LightningDataModule):
            data.trainer = before


def _load(module: LightningModule, weights: Mapping[str, Tensor], client: Client) -> None:
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UnsupportedSetup(
            f"client {client!r}: the global weights do not fit {type(module).__name__} ({error}). Build the same model "
            "on server and clients."
        ) from error


def _seed(seed: int) -> None:
    # Not seed_everything, which would leave its seed in the environment for whatever runs next.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _examples(loaders: Any) -> int:
    """Of one loader, or of all in a list or dictionary."""
    return sum(sized_len(getattr(loader, "dataset", None)) or 0 for loader in tree_leaves(loaders))
