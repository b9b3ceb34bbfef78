"""What a client does in a round: I local steps from the global weights, with a fresh Trainer."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_soup.distributed.participation_clients import Client, whole_number
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.own_loops import quiet

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

    Raises:
        UnsupportedSetup: An option that decides how long a client trains, or several devices.
    """
    given = dict(options or {})
    length = [name for name in _OURS if name in given]
    if length:
        raise UnsupportedSetup(
            f"trainer: {length[0]} is decided by local_steps, how many optimizer steps a client takes in a round."
        )
    if given.get("devices", 1) not in (1, "1") or given.get("num_nodes", 1) != 1:
        raise UnsupportedSetup("trainer: a client trains on one device. Leave devices and num_nodes at 1.")
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
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise UnsupportedSetup(
            f"client {client!r}: the global weights do not fit {type(module).__name__} ({error}). Build the same model "
            "on server and clients."
        ) from error
    if seed is not None:
        _seed(seed)
    with quiet():
        local = Trainer(**options, max_epochs=-1)
        if isinstance(data, LightningDataModule):
            local.fit(module, datamodule=data)
        else:
            local.fit(module, data)
    if not local.global_step:
        raise UnsupportedSetup(
            f"client {client!r} took none of {local_steps} local steps: its training data is empty, or the module "
            "takes no optimizer step. Leave this client out, or give it data."
        )
    found = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    metrics = {name: float(value) for name, value in local.callback_metrics.items()}
    return LocalTraining(found, metrics, _examples(local.train_dataloader))


def evaluate_locally(
    module: LightningModule, data: Any, weights: Mapping[str, Tensor], *, trainer: Mapping[str, Any] | None = None
) -> LocalTraining:
    """Validate the global weights on a client's data.

    Args:
        module: The module; it gets the weights.
        data: A LightningDataModule, or what ``Trainer.validate`` takes.
        weights: x.
        trainer: Options of the Trainer; see :func:`check_trainer_options`.

    Returns:
        The weights as they were, what validation logged, and the number of examples; nothing is logged where a data
        module has no validation data.
    """
    options = {**check_trainer_options(trainer), "limit_val_batches": 1.0}
    module.load_state_dict(dict(weights))
    if isinstance(data, LightningDataModule) and not is_overridden("val_dataloader", data):
        return LocalTraining(dict(weights), {}, 0)
    with quiet():
        local = Trainer(**options)
        if isinstance(data, LightningDataModule):
            local.validate(module, datamodule=data, verbose=False)
        else:
            local.validate(module, data, verbose=False)
    metrics = {name: float(value) for name, value in local.callback_metrics.items()}
    loaders = local.val_dataloaders
    return LocalTraining(
        dict(weights), metrics, sum(map(_examples, loaders if isinstance(loaders, list) else [loaders]))
    )


def _seed(seed: int) -> None:
    # Not seed_everything, which would leave its seed in the environment for whatever runs next.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _examples(loader: Any) -> int:
    return sized_len(getattr(loader, "dataset", None)) or 0
