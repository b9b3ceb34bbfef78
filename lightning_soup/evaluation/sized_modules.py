"""Letting a module take images of another size for a while."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.evaluation.image_sizes import timm_at_size

__all__ = ["Clock", "at_size", "rehearse", "vision_model"]


def vision_model(module: LightningModule) -> nn.Module:
    """The network that sees the images: the module's ``model``, or the module itself."""
    model = getattr(module, "model", None)
    return model if isinstance(model, nn.Module) else module


@contextmanager
def at_size(module: LightningModule, size: tuple[int, int]) -> Iterator[nn.Module]:
    """Let a module take images of another size, and give it its own network back afterwards.

    Raises:
        UnsupportedSetup: Its network cannot.
    """
    own = vision_model(module)
    if own is module:
        yield module
        return
    changed = module.model_at_size(size) if hasattr(module, "model_at_size") else timm_at_size(own, size)
    module.model = changed
    try:
        yield changed
    finally:
        module.model = own


class Clock:
    """How long a network has worked.

    Attributes:
        seconds: In all.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, *networks: nn.Module) -> Iterator[None]:
        """Count the time that networks take within the block, on a GPU until it has ended its work.

        Of a network within another one the time counts once.
        """
        began: list[float] = []

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            began.append(_now(inputs))

        def after(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
            start = began.pop()
            if not began:
                self.seconds += _now(inputs) - start

        hooks = [network.register_forward_pre_hook(before) for network in networks]
        hooks += [network.register_forward_hook(after) for network in networks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _now(inputs: tuple[Any, ...]) -> float:
    if inputs and isinstance(inputs[0], torch.Tensor) and inputs[0].is_cuda:
        torch.cuda.synchronize(inputs[0].device)
    return time.perf_counter()


def rehearse(
    module: LightningModule, size: tuple[int, int], channels: int, judge: Callable[[torch.Tensor], Any] | None = None
) -> None:
    """See that a module takes images of a size, by one black image.

    Args:
        module: The module.
        size: Height and width.
        channels: Of the images.
        judge: What is done with the image; by default it is given to the module.

    Raises:
        UnsupportedSetup: It does not.
    """
    # module.dtype does not know of bfloat16()
    dtype = next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), module.dtype)
    image = torch.zeros(1, channels, *size, device=module.device, dtype=dtype)
    modes = [(part, part.training) for part in module.modules()]
    try:
        with at_size(module, size), torch.no_grad():
            module.eval()
            (judge or module)(image)
    except LightningSoupError:
        raise
    except Exception as error:  # whatever a network makes of a size that it cannot have
        network = vision_model(module)
        unseen = ", or name its network 'model', of which a copy is brought to each size" if network is module else ""
        raise UnsupportedSetup(
            f"{type(network).__name__} cannot take images of {size[0]}×{size[1]} with {channels} "
            f"channels: {str(error).rstrip('.')}. Choose sizes that its patches and windows divide, or build it with "
            f"dynamic_img_size=True{unseen}."
        ) from error
    finally:
        for part, training in modes:
            part.training = training
