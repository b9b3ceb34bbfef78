"""Masks: which weights of a network are there, kept outside of it."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.threads import one_thread

__all__ = ["Masks", "masked_parameters"]

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
