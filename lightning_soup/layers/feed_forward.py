"""Finding the feed-forward networks of a transformer, by what they are called and by what they do."""

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.moe import RandomUniformMoE

__all__ = ["Layers", "choose", "find_feed_forwards", "some"]

Layers = str | list[int]
NAMES = ("mlp", "ffn", "feed_forward", "feedforward")
"""What blocks call their feed-forward network: ``mlp`` in timm, open_clip and torchvision."""

_SPLIT = (("intermediate", "output"), ("linear1", "linear2"))  # Hugging Face's blocks, torch's own
_TOKENS = 3


def find_feed_forwards(module: nn.Module, target: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The feed-forward networks of a model, in their order.

    Args:
        module: The model, or a LightningModule that holds it.
        target: Patterns of the modules to take (``*.visual.*.mlp``), instead of all that are called :data:`NAMES`.

    Returns:
        Path in the module -> network.

    Raises:
        UnsupportedSetup: None is found, or one cannot be shared out by tokens: it has BatchNorm or convolutions, mixes
            tokens, is used in two places, or is experts already.
    """
    found = {name: part for name, part in module.named_modules(remove_duplicate=False) if _is_meant(name, target)}
    inner = {name for name in found for other in found if name.startswith(f"{other}.")}
    found = {name: part for name, part in found.items() if name not in inner}
    if not found:
        raise UnsupportedSetup(_none_found(module, target))
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for name, part in found.items():
        _check(name, part, uses)
    return found


def choose(names: Sequence[str], layers: Layers) -> list[str]:
    """Those to replace.

    Args:
        names: Paths of all networks.
        layers: ``all``; ``every_other`` (the second, the fourth, …); ``last_3``; or numbers, from 0, negative ones from
            the end.

    Raises:
        UnsupportedSetup: It says none of these, or a number is out of range.
    """
    count = len(names)
    if layers == "all":
        return list(names)
    if layers == "every_other" and count > 1:
        return list(names[1::2])
    last = re.fullmatch(r"last_([1-9]\d*)", layers) if isinstance(layers, str) else None
    if last and int(last[1]) <= count:
        return list(names[-int(last[1]) :])
    if isinstance(layers, list) and layers and all(type(i) is int and -count <= i < count for i in layers):
        return [names[i] for i in sorted({i % count for i in layers})]
    raise UnsupportedSetup(
        f"layers={layers!r}: expected 'all', 'every_other', 'last_k', or a list of numbers from 0 to {count - 1}; the "
        f"model has {count} feed-forward networks: {some(names)}."
    )


def _is_meant(name: str, target: Sequence[str] | None) -> bool:
    if target is None:
        return name.rpartition(".")[2] in NAMES
    return any(fnmatchcase(name, pattern) for pattern in target)


def _none_found(module: nn.Module, target: Sequence[str] | None) -> str:
    kind = type(module).__name__
    if target is not None:
        named = [name for name, _ in module.named_modules() if name.rpartition(".")[2] in NAMES]
        return f"target={list(target)} matches no module of {kind}. By name there are: {some(named)}."
    if not any(True for _ in module.parameters()):
        return (
            f"{kind} has no parameters yet. If it builds its model in configure_model, call "
            "lightning_soup.layers.use_experts(self, …) at the end of configure_model, with the same options."
        )
    for part in module.modules():
        children = dict(part.named_children())
        for first, second in _SPLIT:
            if first in children and second in children:
                return (
                    f"{kind}: {type(part).__name__} has no feed-forward network of its own: it is split over {first} "
                    f"and {second}, between which the block does more. Experts need one module that is all of it."
                )
    return (
        f"{kind} has no module that is called {', '.join(NAMES)}. Name the feed-forward networks by patterns, such as "
        "target=['blocks.*.mlp']."
    )


def _check(name: str, part: nn.Module, uses: Counter[int]) -> None:
    if any(isinstance(inner, RandomUniformMoE) for inner in part.modules()):
        raise UnsupportedSetup(f"{name} is made of experts already. Add ExpertsWeightAveraging once, to a plain model.")
    for inner in part.modules():
        if isinstance(inner, _BatchNorm | _ConvNd):
            what = "BatchNorm, whose statistics" if isinstance(inner, _BatchNorm) else "a convolution, whose results"
            raise UnsupportedSetup(
                f"{name} ({type(part).__name__}) has {what} depend on which tokens come together. Leave it "
                "out (layers, target)."
            )
    linear = [inner for inner in part.modules() if isinstance(inner, nn.Linear)]
    if len(linear) < 2:
        raise UnsupportedSetup(
            f"{name} ({type(part).__name__}) has {len(linear)} Linear layers; a feed-forward network has two or more."
        )
    if any(uses[id(parameter)] > 1 for parameter in part.parameters()):
        raise UnsupportedSetup(f"{name} shares parameters with another part of the model, so it has no experts alone.")
    if not linear[0].weight.is_meta:
        _check_tokenwise(name, part, linear[0])


@torch.no_grad()
def _check_tokenwise(name: str, part: nn.Module, first: nn.Linear) -> None:
    """Make sure by trying that the network works on each token by itself."""
    weight, width = first.weight, first.in_features
    tokens = torch.linspace(-1, 1, _TOKENS * width, dtype=weight.dtype, device=weight.device).view(1, _TOKENS, width)
    modes = [(inner, inner.training) for inner in part.modules()]
    part.eval()
    try:
        together = part.forward(tokens)  # without its hooks, which will see the tokens of all experts together
        alone = torch.cat([part.forward(tokens[:, i : i + 1]) for i in range(_TOKENS)], 1)
        fits = together.shape == tokens.shape and torch.allclose(together.float(), alone.float(), rtol=1e-2, atol=1e-3)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UnsupportedSetup(
            f"{name} ({type(part).__name__}) cannot be run on tokens [1, {_TOKENS}, {width}]: {error}. Experts take "
            "the place of networks from [B, T, D] to [B, T, D]."
        ) from error
    finally:
        for inner, training in modes:
            inner.training = training
    if not fits:
        raise UnsupportedSetup(
            f"{name} ({type(part).__name__}) does not work on each token by itself, or changes its width, so "
            "its tokens cannot be shared out among experts."
        )


def some(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first few of them."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
