"""Building models of timm."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn

from lightning_soup.data.transforms import check_model_name
from lightning_soup.errors import UnsupportedSetup

__all__ = ["build_timm_model", "drawn_from"]


@contextmanager
def drawn_from(seed: int | None) -> Iterator[None]:
    """Draw random numbers from a seed, and leave the run's own stream as it was; None: from the run's own."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_timm_model(
    model_name: str, pretrained: bool, model_args: dict[str, Any], **arguments: int | float | None
) -> nn.Module:
    """Build a model of timm; arguments that are None are left to the model.

    Raises:
        UnsupportedSetup: timm does not know the model or its arguments.
    """
    if ":" not in model_name:  # hf-hub:… and local-dir:… are resolved by timm
        check_model_name(model_name)
    given = {**model_args, **{name: value for name, value in arguments.items() if value is not None}}
    try:
        return timm.create_model(model_name, pretrained=pretrained, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
        raise UnsupportedSetup(
            f"timm could not build {model_name} (pretrained={pretrained}) with {given}: "
            f"{str(error).rstrip('.')}. Check img_size, in_chans, drop_path_rate and model_args: not every model takes "
            "each of them."
        ) from error
