"""Networks pruned 2 of 4, in the form that GPUs multiply faster."""

import torch
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.masks import Masks, masked_parameters

__all__ = ["to_semi_structured_"]


def to_semi_structured_(module: nn.Module, masks: Masks) -> list[str]:
    """Put the 2:4 weights of linear layers into torch's semi-structured form, in place, for inference.

    The module is not for training or saving any more; keep the dense file.

    Args:
        module: A network in float16, bfloat16 or int8 on a CUDA device of compute capability 8.0 or later.
        masks: Its masks, made with the selection ``2:4``.

    Returns:
        The names of the weights that were put into that form: those of linear layers, masked two in each four.

    Raises:
        UnsupportedSetup: The device cannot, no weight is masked so, or they are masks of another model.
    """
    names = {id(parameter): name for name, parameter in masked_parameters(module, masks).items()}
    linear = [part for part in module.modules() if _is_linear(part) and id(part.weight) in names]
    layers = {names[id(part.weight)]: part for part in linear}
    found = [name for name in layers if _two_of_four(masks[name])]
    if not found:
        raise UnsupportedSetup("no linear layer has a mask of two in each four inputs. Prune with selection='2:4'.")
    device = layers[found[0]].weight.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UnsupportedSetup(
            f"{device} has no semi-structured products: they need a CUDA device of compute capability 8.0 or later. "
            "Elsewhere the dense weights with their zeros do the same."
        )
    for name in found:
        weight = torch.sparse.to_sparse_semi_structured(layers[name].weight.detach())
        layers[name].weight = nn.Parameter(weight, requires_grad=False)
    return found


def _is_linear(part: nn.Module) -> bool:
    return type(part) is nn.Linear  # subclasses may use their weight in other ways


def _two_of_four(mask: torch.Tensor) -> bool:
    return mask.ndim == 2 and mask.shape[1] % 4 == 0 and bool((mask.unflatten(1, (-1, 4)).sum(-1) <= 2).all())
