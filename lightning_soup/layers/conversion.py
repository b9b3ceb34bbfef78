"""A model's feed-forward networks into experts, and experts back into plain networks."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.experts import mean_of
from lightning_soup.layers.feed_forward import Layers, choose, find_feed_forwards, some
from lightning_soup.layers.moe import RandomUniformMoE

__all__ = ["convert_to_dense", "dense_state", "experts_of", "replace_networks", "unwrapped", "use_experts"]


def use_experts(
    module: nn.Module,
    num_experts: int = 4,
    layers: Layers = "every_other",
    init: Literal["copy", "independent"] = "copy",
    target: Sequence[str] | None = None,
    scope: Literal["tokens", "positions"] = "tokens",
) -> list[str]:
    """Replace feed-forward networks of a model by experts, in place.

    :class:`.ExpertsWeightAveraging` does this by itself. Call it at the end of ``configure_model`` where the model is
    built there, or for a training loop of your own.

    Args:
        module: The model, or a LightningModule that holds it.
        num_experts: N.
        layers: Which networks; see :func:`.choose`. Of these, a frozen one (no parameter has ``requires_grad``) is left
            as it is: experts that nothing moves would only cost memory.
        init: As of :meth:`.RandomUniformMoE.from_dense`.
        target: As of :func:`.find_feed_forwards`.
        scope: As of :class:`.RandomUniformMoE`.

    Returns:
        Paths of the networks that were replaced.

    Raises:
        UnsupportedSetup: None is found, one cannot be replaced, or all are frozen. The model is as it was then.
    """
    return replace_networks(module, num_experts, layers, init, target, scope)[0]


def replace_networks(
    module: nn.Module,
    num_experts: int,
    layers: Layers,
    init: Literal["copy", "independent"],
    target: Sequence[str] | None,
    scope: Literal["tokens", "positions"],
) -> tuple[list[str], list[str]]:
    """As :func:`use_experts`; gives the paths of the networks that were replaced, and of those left as frozen."""
    found = find_feed_forwards(module, target)
    chosen = choose(list(found), layers)
    frozen = [name for name in chosen if not any(p.requires_grad for p in found[name].parameters())]
    trained = [name for name in chosen if name not in frozen]
    if not trained:
        raise UnsupportedSetup(
            f"layers={layers!r}: all of these feed-forward networks are frozen ({some(frozen)}), so there is nothing "
            "to train as experts. Choose others (layers, target), or unfreeze them before the fit."
        )
    made = {name: RandomUniformMoE.from_dense(found[name], num_experts, init, scope) for name in trained}
    for name, experts in made.items():
        _put(module, name, experts)
    return trained, frozen


def experts_of(module: nn.Module) -> dict[str, RandomUniformMoE]:
    """The layers of experts in a model, by path, without the prefixes of wrappers."""
    return {unwrapped(name): part for name, part in module.named_modules() if isinstance(part, RandomUniformMoE)}


def convert_to_dense(module: nn.Module) -> list[str]:
    """Replace all experts by the network with their mean weights, in place.

    Class, names, types and devices are those of the network before; the parameters are those of the first expert.

    Args:
        module: The model, or a LightningModule that holds it.

    Returns:
        Paths of the networks.
    """
    found = {name: part for name, part in module.named_modules() if isinstance(part, RandomUniformMoE)}
    for name, experts in found.items():
        _put(module, name, experts.to_dense())
    return list(found)


@torch.no_grad()
def dense_state(state: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Any]:
    """The state dict of the plain model, from one with experts.

    Args:
        state: The state dict with experts.
        layers: Paths of the layers of experts, without the prefixes of wrappers.
    """
    dense: dict[str, Any] = {}
    groups: dict[str, list[Tensor]] = {}
    found = re.compile(f"({'|'.join(map(_pattern, layers))})experts\\.\\d+\\.(.+)") if layers else None
    for name, value in state.items():
        match = found and found.fullmatch(name)
        if not match:
            dense[name] = value
            continue
        target = f"{match[1]}{match[2]}"
        dense.setdefault(target, None)  # where it stood before: the order of keys is the plain model's
        groups.setdefault(target, []).append(value)
    for name, tensors in groups.items():
        dense[name] = mean_of(tensors) if tensors[0].is_floating_point() else tensors[0].clone()
    return dense


def _pattern(layer: str) -> str:
    """Matches the keys of a layer, also where it or what holds it is compiled."""
    wrapped = "(?:_orig_mod\\.)*"
    return wrapped + "".join(f"{re.escape(part)}\\.{wrapped}" for part in layer.split("."))


def unwrapped(name: str) -> str:
    """A path without what compiling and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    path, _, key = name.rpartition(".")
    module.get_submodule(path)._modules[key] = part  # also in a Sequential or ModuleList, whose keys are numbers
