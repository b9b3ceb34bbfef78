"""Masks: which weights of a network are there, kept outside of it."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.threads import one_thread

__all__ = ["NOT_PRUNABLE", "Masks", "masked_parameters", "prunable"]

NOT_PRUNABLE = (
    "*pos_embed*",
    "*positional_embedding*",
    "*cls_token*",
    "*class_token*",
    "*class_embedding*",
    "*reg_token*",
    "*register_tokens*",
    "*dist_token*",
    "*mask_token*",
    "*relative_position*",
    "*token_embedding*",
    "*logit_*",
)
"""Names of matrices that are no layers: embeddings, tokens, temperatures."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def prunable(
    module: nn.Module, exclude: Sequence[str] = NOT_PRUNABLE, skip_first: bool = False, skip_head: bool = False
) -> dict[str, nn.Parameter]:
    """The parameters that pruning may touch, by name: those of two dimensions or more, so neither biases nor norms.

    Names are what decides, so that attention's ``in_proj_weight`` and the projections of CLIP are among them, which
    have no layer of their own. A parameter that has two names (tied weights) comes once, by the first of them, unless
    one of them is excluded.

    Args:
        module: The network.
        exclude: Patterns of names to leave out, in place of :data:`NOT_PRUNABLE`.
        skip_first: Leave out the first of them, in order of registration: the input layer.
        skip_head: Leave out the last of them: the classifier of the usual networks.

    Raises:
        UnsupportedSetup: Nothing is left, ``exclude`` is no list, a layer is lazy and has no shape yet, two parameters
            are views of the same memory, or a weight is computed from parameters (``torch.nn.utils.parametrize``,
            weight norm) in a way that does not keep zeros.
    """
    if isinstance(exclude, str):
        raise UnsupportedSetup(f"exclude={exclude!r}: expected a list of patterns: [{exclude!r}].")
    also: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        also.setdefault(id(parameter), []).extend({name, name.replace("_orig_mod.", "")})  # of compiled parts
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
    for name in [*(names[:1] if skip_first else []), *(names[-1:] if skip_head else [])]:
        found.pop(name, None)
    if not found:
        raise UnsupportedSetup(
            f"nothing in {type(module).__name__} can be pruned: it has {len(names)} parameters of two dimensions or "
            f"more beside those in exclude={list(exclude)}, skip_first={skip_first}, skip_head={skip_head}."
        )
    _refuse_views(found)
    return found


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


class Masks(Mapping[str, Tensor]):
    """For tensors by name, which elements are kept (True) and which are pruned (False), on the tensors' devices.

    They are not edited: what is applied is remembered in another form. :func:`.prune_` makes new ones.

    Args:
        kept: Boolean tensors.

    Raises:
        TypeError: A tensor is of another type.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        self._kept = dict(kept)
        for name, mask in self._kept.items():
            if mask.dtype != torch.bool:
                raise TypeError(f"the mask of {name} is {mask.dtype}: expected bool.")
        self._words: dict[tuple[str, int, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and other processes make words of their own."""
        return {**self.__dict__, "_words": {}}

    @classmethod
    def full(cls, tensors: Mapping[str, Tensor]) -> "Masks":
        """Nothing is pruned yet."""
        return cls({n: torch.ones(t.shape, dtype=torch.bool, device=t.device) for n, t in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        """Whether the same elements of the same tensors are pruned."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(self[n], other[n].to(self[n].device)) for n in self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, {self.pruned:,} of {self.size:,} pruned)"

    @property
    def size(self) -> int:
        """N: how many elements there are."""
        return sum(mask.numel() for mask in self._kept.values())

    @property
    def pruned(self) -> int:
        """How many are pruned, counted from the masks, not from zeros in weights."""
        return sum(pruned_in(mask) for mask in self._kept.values())

    @property
    def sparsity(self) -> float:
        """The share that is pruned; 0 of nothing."""
        return self.pruned / max(self.size, 1)

    def check(self, tensors: Mapping[str, Tensor], owner: str) -> None:
        """Refuse masks of another model.

        Args:
            tensors: What they should fit, by name.
            owner: Whose masks they are, for the message.

        Raises:
            UnsupportedSetup: Names or shapes differ.
        """
        wrong = [
            f"{name}: mask {tuple(self[name].shape) if name in self else 'missing'}, weights "
            f"{tuple(tensors[name].shape) if name in tensors else 'missing'}"
            for name in [*tensors, *(n for n in self if n not in tensors)]
            if name not in self or name not in tensors or self[name].shape != tensors[name].shape
        ]
        if wrong:
            raise UnsupportedSetup(
                f"{owner} holds the masks of another model, or of other options (exclude, skip_first, skip_head). "
                f"{len(wrong)} tensors differ: {'; '.join(wrong[:10])}. Use the settings it was made with."
            )

    @torch.no_grad()
    def apply_(self, tensors: Mapping[str, Tensor], once: bool = False) -> None:
        """Make what is pruned exactly +0, in place, whatever is there: −0, NaN or infinity.

        The bits of each element are and-ed with ones or zeros, at the cost of one read and one write. Names that have
        no mask are left alone.

        Args:
            tensors: Weights, gradients or moments, by the names of the weights; of the weights' shapes.
            once: The masks are not going to be applied again, so that nothing is remembered for it, which takes as much
                memory as the weights.

        Raises:
            UnsupportedSetup: A tensor has another shape than its mask.
        """
        masked = {name: tensor.detach() for name, tensor in tensors.items() if name in self}
        with one_thread(list(masked.values())):
            for name, tensor in masked.items():
                word = self._word(name, tensor, once)
                tensor.view(word.dtype).bitwise_and_(word)

    def _word(self, name: str, like: Tensor, once: bool) -> Tensor:
        """The mask in whole words of this type's width: −1, all ones, where kept."""
        mask, key = self._kept[name], (name, like.element_size(), like.device)
        if mask.shape != like.shape:
            shapes = f"{tuple(mask.shape)}, the tensor {tuple(like.shape)}"
            raise UnsupportedSetup(f"the mask of {name} is {shapes}: expected the same. Make masks of this model.")
        if key in self._words:
            return self._words[key]
        word = torch.empty_like(like, dtype=_WORDS[like.element_size()]).copy_(mask).neg_()  # in the same layout
        if not once:
            self._words[key] = word
        return word

    def state(self) -> dict[str, Any]:
        """For files: one bit an element, and the shapes."""
        bits = {name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in self.items()}
        return {"bits": bits, "shapes": {name: list(mask.shape) for name, mask in self.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], devices: Mapping[str, torch.device] | None = None) -> "Masks":
        """Read what :meth:`state` gave.

        Args:
            state: It.
            devices: Where each mask goes; the CPU where nothing is said.

        Raises:
            UnsupportedSetup: It is not of that form.
        """
        kept = {}
        if not all(isinstance(state.get(key), Mapping) for key in ("bits", "shapes")):
            raise UnsupportedSetup(
                f"the masks are damaged: expected bits and shapes, found {', '.join(state) or 'none'}. "
                "Take another copy of the file or checkpoint."
            )
        for name, shape in state["shapes"].items():
            bits, count = state["bits"].get(name), int(np.prod(shape))
            if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or len(bits) != -(-count // 8):
                raise UnsupportedSetup(
                    f"the mask of {name} is damaged: expected {-(-count // 8)} bytes for {shape}. Take another copy of "
                    "the file or checkpoint."
                )
            mask = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count)).bool().reshape(shape)
            kept[name] = mask.to((devices or {}).get(name, torch.device("cpu")))
        return cls(kept)


def masked_parameters(module: nn.Module, masks: Masks) -> dict[str, nn.Parameter]:
    """The parameters that masks lie over, by the names of the masks: without the prefixes of wrappers.

    Raises:
        UnsupportedSetup: They are masks of another model.
    """
    own = {name.replace("_orig_mod.", ""): parameter for name, parameter in module.named_parameters()}
    # Files and masks are without a "module." before all names, be it DDP's or an attribute that has this name.
    while not masks.keys() <= own.keys() and any(name.startswith("module.") for name in own):
        own = {name.removeprefix("module."): parameter for name, parameter in own.items()}
    found = {name: own[name] for name in masks if name in own}
    masks.check(found, f"what is given for {type(module).__name__}")
    return found


def pruned_in(mask: Tensor) -> int:
    """How many elements a mask prunes."""
    return mask.numel() - int(torch.count_nonzero(mask))
