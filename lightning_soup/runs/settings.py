"""Settings of one training among several: hyperparameters of the module, or options of its optimizer."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer

__all__ = ["set_hyperparameters", "set_optimizer_options"]


def set_hyperparameters(module: LightningModule, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give a module other hyperparameters, and attributes of their names; the settings that it has neither of remain.

    Args:
        module: The module. What it made of a hyperparameter before stays as it is.
        settings: By name.
    """
    left = {}
    for name, value in settings.items():
        held = name in module.hparams
        if held:
            module.hparams[name] = value
        if hasattr(module, name):
            setattr(module, name, value)
        elif not held:
            left[name] = value
    return left


def set_optimizer_options(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Set options of all groups but of those that alone are without: biases often have no weight decay."""
    for name, value in options.items():
        for group in [group for group in optimizer.param_groups if group[name] != 0] or optimizer.param_groups:
            group[name] = value
