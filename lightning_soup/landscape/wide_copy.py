"""A module that stands on copies of its tensors for a while, in 32 bits or more."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["on_wide_copies", "widened"]


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32 for the floating types of 16 bits or fewer; others as they are."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


@contextmanager
def on_wide_copies(module: LightningModule) -> Iterator[dict[str, Tensor]]:
    """Let a module compute with copies of its parameters and buffers for a while.

    Other parts of the program (optimizers, averages, gradients) know the module's own tensors, which nobody touches.
    Tied tensors stay tied, floating ones of 16 bits become float32, and metrics keep their own.

    Args:
        module: The module. Costs a second one in memory.

    Yields:
        The copies of floating tensors by name, parameters and buffers; parameters want a gradient as the own ones do.
    """
    of_metrics = {id(part) for owner in module.modules() if isinstance(owner, Metric) for part in owner.modules()}
    parts = [(name, part) for name, part in module.named_modules() if id(part) not in of_metrics]
    owned: list[tuple[nn.Module, str, Tensor]] = []
    copies: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    for prefix, part in parts:
        for key, own in (*part._parameters.items(), *part._buffers.items()):
            if own is None or nn.parameter.is_lazy(own):
                continue
            owned.append((part, key, own))
            if id(own) not in copies:
                copies[id(own)] = _copy(own)
                if own.is_floating_point():
                    name = f"{prefix}.{key}" if prefix else key
                    named[name.replace("_orig_mod.", "")] = copies[id(own)]
    types = [(part, part._dtype) for _, part in parts if isinstance(part, LightningModule)]
    try:
        for part, key, own in owned:
            setattr(part, key, copies[id(own)])  # not into the dictionaries: recurrent layers keep a list of their own
        for part, dtype in types:
            part._dtype = widened(dtype)  # what self.dtype says
        yield named
    finally:
        for part, key, own in owned:
            setattr(part, key, own)
        for part, dtype in types:
            part._dtype = dtype


def _copy(own: Tensor) -> Tensor:
    copied = own.detach().to(widened(own.dtype), copy=True)
    return nn.Parameter(copied, own.requires_grad) if isinstance(own, nn.Parameter) else copied
