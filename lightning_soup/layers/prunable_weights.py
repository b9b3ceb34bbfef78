"""Which parameters of a network pruning may touch."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_soup.errors import UnsupportedSetup

__all__ = ["NOT_PRUNABLE", "not_prunable", "prunable", "unmatched"]

NOT_PRUNABLE = (
    "*pos_embed*",
    "*positional_embedding*",
    "*position_embed*",
    "*cls_token*",
    "*class_token*",
    "*class_embedding*",
    "*reg_token*",
    "*register_tokens*",
    "*dist_token*",
    "*mask_token*",
    "*relative_position*",
    "*rel_pos_[hw]",  # these end there: layers that compute positions have weights
    "*pos_emb",
    "*_pos",
    "*token_embedding*",
    "*logit_*",
)
"""Names of matrices that are no layers: embeddings, tokens, temperatures."""


def prunable(
    module: nn.Module, exclude: Sequence[str] | None = None, skip_first: bool = False, skip_head: bool = False
) -> dict[str, nn.Parameter]:
    """The parameters that pruning may touch, by name: those of two dimensions or more, so neither biases nor norms.

    Names are what decides, so that attention's ``in_proj_weight`` and the projections of CLIP are among them, which
    have no layer of their own. A parameter that has two names (tied weights) comes once, by the first of them, unless
    one of them is excluded.

    Args:
        module: The network.
        exclude: Patterns of names to leave out, in place of those of :func:`not_prunable`.
        skip_first: Leave out the first of them, in order of registration: the input layer of the usual networks.
        skip_head: Leave out the last of them: the classifier of the usual networks.

    Raises:
        UnsupportedSetup: Nothing is left, ``exclude`` is no list, a layer is lazy and has no shape yet, two parameters
            are views of the same memory, a weight is computed from parameters (``torch.nn.utils.parametrize``, weight
            norm) in a way that does not keep zeros, or order of registration does not tell which is the first or last.
    """
    if isinstance(exclude, str):
        raise UnsupportedSetup(f"exclude={exclude!r}: expected a list of patterns: [{exclude!r}].")
    exclude = not_prunable(module) if exclude is None else exclude
    also = _all_names(module)
    left = {
        name: parameter
        for name, parameter in module.named_parameters()
        if not any(fnmatchcase(one, pattern) for one in also[id(parameter)] for pattern in exclude)
    }
    lazy = [name for name, parameter in left.items() if is_lazy(parameter)]
    if lazy:
        raise UnsupportedSetup(
            f"{lazy[0]} has no shape yet (a lazy layer), so it cannot be pruned. Run one batch through "
            f"{type(module).__name__} before the fit."
        )
    found = {
        name: parameter for name, parameter in left.items() if parameter.ndim >= 2 and parameter.is_floating_point()
    }
    _refuse_computed(module, found)
    names = list(found)
    if skip_first or skip_head:
        _refuse_other_orders(module, names, skip_first, skip_head)
    for name in [*(names[:1] if skip_first else []), *(names[-1:] if skip_head else [])]:
        found.pop(name, None)
    if not found:
        raise UnsupportedSetup(
            f"nothing in {type(module).__name__} can be pruned: it has {len(names)} parameters of two dimensions or "
            f"more beside those in exclude={list(exclude)}, skip_first={skip_first}, skip_head={skip_head}."
        )
    _refuse_views(found)
    return found


def unmatched(module: nn.Module, exclude: Sequence[str]) -> list[str]:
    """Patterns of ``exclude`` that fit no parameter; but those of :data:`NOT_PRUNABLE`, which fit where they can."""
    names = [name for names in _all_names(module).values() for name in names]
    rare = [pattern for pattern in exclude if pattern not in NOT_PRUNABLE]
    return [pattern for pattern in rare if not any(fnmatchcase(name, pattern) for name in names)]


def _all_names(module: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, with and without what compiled parts add."""
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).extend({name, name.replace("_orig_mod.", "")})
    return found


def not_prunable(module: nn.Module) -> list[str]:
    """Patterns of what is left out by default: :data:`NOT_PRUNABLE`, and the weights of embeddings by their names."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    found = {f"{name}.weight".lstrip(".") for name, part in module.named_modules() if isinstance(part, tables)}
    return [*NOT_PRUNABLE, *(escape(name) for name in sorted(found))]


def _refuse_other_orders(module: nn.Module, names: Sequence[str], skip_first: bool, skip_head: bool) -> None:
    """A module's own parameters are registered before its layers, whatever they do: the projections of CLIP, say."""
    for name in names:
        inside = name[: name.rfind(".") + 1]  # what the names of its module's parts begin with
        beside_layers = any(other.startswith(inside) and "." in other[len(inside) :] for other in names)
        if not beside_layers or isinstance(module.get_submodule(inside.rstrip(".")), nn.MultiheadAttention):
            continue  # attention does use in_proj before its layer
        if skip_first and name == names[0]:
            option, taken = "skip_first", name
        elif skip_head and names[-1].startswith(inside):
            option, taken = "skip_head", names[-1]
        else:
            continue
        raise UnsupportedSetup(
            f"{option}: by order of registration it would be {taken}, but {name} comes before the layers of its module "
            "there, wherever it is used, so the order does not tell. Name what to leave out: exclude=['…'], whose list "
            f"replaces that of embeddings and tokens ({', '.join(NOT_PRUNABLE[:2])}, …)."
        )


def _refuse_computed(module: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Weights that a network computes anew in each forward pass are not zero where their sources are."""
    for name, part in module.named_modules():
        sources: dict[str, str] = {}
        for weight, steps in getattr(part, "parametrizations", {}).items():
            if not all(isinstance(step, _SpectralNorm) for step in steps):  # which divides by a number only
                sources[f"parametrizations.{weight}."] = weight
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                sources |= {f"{hook.name}_g": hook.name, f"{hook.name}_v": hook.name}
        for source, weight in sources.items():
            prefix = f"{name}." if name else ""
            if any(found_name.startswith(prefix + source) for found_name in found):
                raise UnsupportedSetup(
                    f"{prefix}{weight} is computed from other parameters ({prefix}{source.rstrip('.')}), and would not "
                    "be zero where these are; weight norm gives NaN where a row is pruned. Make it plain before the "
                    "fit (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm), or "
                    f"leave it out: exclude=['{prefix}{source}*', …]."
                )


def _refuse_views(parameters: Mapping[str, Tensor]) -> None:
    """Weights tied by a view, such as a transposed one, would need one mask between them."""
    places: dict[tuple[Any, ...], str] = {}
    for name, parameter in parameters.items():
        memory = parameter.data_ptr() if parameter.layout == torch.strided and parameter.numel() else 0
        twin = places.setdefault((parameter.device, memory), name) if memory else name
        if twin != name:
            raise UnsupportedSetup(
                f"{twin} and {name} are different parameters in the same memory, so one cannot be pruned alone. Use "
                "one parameter under both names, or exclude one of them."
            )
