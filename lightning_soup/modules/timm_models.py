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
    model_name: str,
    pretrained: bool,
    model_args: dict[str, Any],
    *,
    many_sizes: bool = False,
    **arguments: int | float | None,
) -> nn.Module:
    """Build a model of timm; arguments that are None are left to the model.

    Args:
        model_name: Its name.
        pretrained: With timm's own weights.
        model_args: Arguments of the model.
        many_sizes: Build it with ``dynamic_img_size``, if it knows that.
        **arguments: More of them, by name.

    Raises:
        UnsupportedSetup: timm does not know the model or its arguments.
    """
    if ":" not in model_name:  # hf-hub:… and local-dir:… are resolved by timm
        check_model_name(model_name)
    given = {**model_args, **{name: value for name, value in arguments.items() if value is not None}}
    tries = [given]
    if many_sizes and "dynamic_img_size" not in given:
        tries.insert(0, {**given, "dynamic_img_size": True})
    for place, options in enumerate(tries, 1):
        try:
            return timm.create_model(model_name, pretrained=pretrained, **options)
        except (TypeError, ValueError, RuntimeError, AssertionError, OSError) as error:
            if place < len(tries) and "dynamic_img_size" in str(error):  # as CNNs say, which need no such option
                continue
            raise UnsupportedSetup(
                f"timm could not build {model_name} (pretrained={pretrained}) with {options}: "
                f"{str(error).rstrip('.')}. Check img_size, in_chans, drop_path_rate and model_args: not every model "
                "takes each of them."
            ) from error
    raise AssertionError("one of the tries ends in a model or an error")
