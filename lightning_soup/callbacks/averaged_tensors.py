"""The averaged tensors of a module, and how their averages get into it and out again."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_soup.callbacks.shadow import Shadow
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.layers.masks import Masks


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a module. Looked up at each use: another tensor may stand there by then.

    Attributes:
        name: Its name without the prefixes of wrappers.
        prefix: The path of the module that holds it.
        owner: That module.
        key: Its name in the owner.
        is_buffer: A buffer; else a parameter.
        shape: Its shape when averaging began; of a sharded one, the whole.
    """

    name: str
    prefix: str
    owner: nn.Module
    key: str
    is_buffer: bool
    shape: torch.Size

    @property
    def tensor(self) -> Tensor:
        """What stands there now; a sharded tensor as it is.

        Raises:
            UnsupportedSetup: It is gone, or has another shape.
        """
        found = (self.owner._buffers if self.is_buffer else self.owner._parameters).get(self.key)
        if found is None or found.shape != self.shape:
            now = "gone" if found is None else f"of shape {list(found.shape)}"
            raise UnsupportedSetup(
                f"{self.name} had the shape {list(self.shape)} when averaging began and is now {now}. An average over "
                f"different shapes has no meaning: leave it out with exclude=[{self.name!r}], or change it before fit."
            )
        return found

    def found_in(self, module: nn.Module) -> Tensor | None:
        """What stands there now, whatever its shape, also where the owner was exchanged for another module."""
        owner = _at(module, self.prefix)
        return None if owner is None else (owner._buffers if self.is_buffer else owner._parameters).get(self.key)

    @property
    def local(self) -> Tensor:
        """What stands there now; of a sharded tensor the shard of this rank. Shares its memory."""
        tensor = self.tensor.detach()
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class Group:
    """Tensors that one optimizer moves, their averages, and how far they have come.

    Several optimizers may step at different rates, so each has its own count and its own mean.

    Attributes:
        optimizer: Index in ``trainer.optimizers``.
        slots: The tensors.
        shadow: Their averages.
        steps: Real optimizer steps so far.
        since: Those of them after ``start``.
        ticks: How often ``every`` had passed at the last sample, where it is counted in epochs or fractions.
        absorbed: Terms in the mean.
        concentration: Σ of the squared weights of the terms; its inverse is the effective number of terms.
        fresh: Whether a step has been taken since the last sample.
    """

    optimizer: int
    slots: list[Slot]
    shadow: Shadow
    steps: int = 0
    since: int = 0
    ticks: int = 0
    absorbed: int = 0
    concentration: float = 0.0
    fresh: bool = False
    _copied: dict[int, Tensor] = field(default_factory=dict)
    _were_copied: set[int] = field(default_factory=set)
    _placed: bool = False

    COUNTERS: ClassVar = ("steps", "since", "ticks", "absorbed", "concentration", "fresh")

    def absorb(self, share: float) -> None:
        """Take the present weights as a sample; a share of 1 starts the mean anew."""
        self.shadow.absorb([slot.local for slot in self.slots], share)
        self.concentration = (1 - share) ** 2 * self.concentration + share**2
        self.absorbed += 1
        self.fresh = False

    def follow(self, module: nn.Module) -> None:
        """Look the owners up again: a layer may have been exchanged for another one."""
        owners = {slot.prefix: slot.owner for slot in self.slots}
        moved = {prefix: _at(module, prefix) for prefix, owner in owners.items() if _at(module, prefix) is not owner}
        if moved:
            self.slots = [
                replace(slot, owner=moved[slot.prefix] or nn.Module()) if slot.prefix in moved else slot
                for slot in self.slots
            ]

    def grow(self, slots: Sequence[Slot]) -> None:
        """Average more tensors, which had their present values at all samples before."""
        for slot in slots:
            if self.absorbed:
                self.shadow.grow(slot.local)
            self.slots.append(slot)

    def prune(self, masks: Masks, tensors: Mapping[str, Tensor]) -> None:
        """Make what is pruned zero in the average, as it is in the weights."""
        theirs = {id(tensor): name for name, tensor in tensors.items()}  # names can differ by the prefix of a wrapper
        names = [theirs.get(id(slot.tensor), "") for slot in self.slots]
        self.shadow.edit(lambda sample: masks.apply_(dict(zip(names, sample, strict=False))))  # empty before the first

    @torch.no_grad()
    def place(self, exchange: bool, briefly: bool = False, check: bool = True, again: bool = False) -> None:
        """Put the average into the module.

        Storage is exchanged where that is safe, which takes microseconds and no memory; else values are copied and the
        live ones kept aside in their own type.

        Args:
            exchange: Whether storage may be exchanged at all.
            briefly: Nothing is computed before :meth:`put_back`, so others may hold the live storage.
            check: Look for NaN first, which takes a pass over the average.
            again: Right after :meth:`put_back`: exchange and copy what was exchanged and copied before, since somebody
                may hold either memory.

        Raises:
            NonFiniteWeights: The average has a NaN or an infinite value.
        """
        self.shadow.settle()
        averages = self.shadow.tensors
        if check:
            self._check_finite(averages)
        memory = [slot.local.data_ptr() for slot in self.slots]
        alone = Counter(memory)
        with torch.inference_mode(False):  # a tensor made in inference mode could never be updated again
            for number, (slot, average) in enumerate(zip(self.slots, averages, strict=True)):
                tensor = slot.tensor
                lone = alone[memory[number]] == 1 and (briefly or not _is_held(tensor))
                if again:
                    lone = number not in self._were_copied
                if exchange and lone and _exchangeable(tensor, average):
                    averages[number], tensor.data = tensor.data, average
                else:
                    local = slot.local
                    self._copied[number] = local.clone()
                    local.copy_(average)
        self._placed = True

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo :meth:`place`: the very tensors that were there before."""
        if not self._placed:
            return
        averages = self.shadow.tensors
        with torch.inference_mode(False):
            for number, slot in reversed(list(enumerate(self.slots))):
                if number in self._copied:
                    slot.local.copy_(self._copied[number])
                else:
                    averages[number], slot.tensor.data = slot.tensor.data, averages[number]
        self._were_copied = set(self._copied)
        self._copied, self._placed = {}, False

    @property
    def copied_slots(self) -> list[Slot]:
        """Those whose values stand in the memory of the live ones now."""
        return [self.slots[number] for number in self._copied]

    def pairs(self) -> Iterator[tuple[Slot, Tensor, Tensor]]:
        """Each slot with its live values and its average, wherever they are."""
        self.shadow.settle()
        for number, (slot, kept) in enumerate(zip(self.slots, self.shadow.tensors, strict=True)):
            if not self._placed:
                yield slot, slot.local, kept
            elif number in self._copied:
                yield slot, self._copied[number], kept
            else:
                yield slot, kept, slot.local

    def _check_finite(self, averages: Sequence[Tensor]) -> None:
        # A sum is finite unless one of its terms is not, or it overflows: only then look closer.
        for slot, average in zip(self.slots, averages, strict=True):
            if not average.sum().isfinite() and not average.isfinite().all():
                raise NonFiniteWeights(
                    f"the average of {slot.name} has a NaN or an infinite value after {self.absorbed} samples: "
                    "training has diverged. Lower the learning rate or clip gradients; the last checkpoint is unharmed."
                )


def reshard(module: nn.Module) -> None:
    """Let FSDP2 put its shards back: after a forward pass the outermost module may hold gathered parameters."""
    for part in module.modules():
        if any(base.__name__ == "FSDPModule" for base in type(part).__mro__):
            part.reshard()


def is_captured(module: nn.Module, device: torch.device) -> bool:
    """Whether compiled code may have recorded the addresses of parameters, as CUDA graphs do."""
    if device.type != "cuda":
        return False
    return any(
        getattr(part, "_compiled_call_impl", None) is not None or type(part).__name__ == "OptimizedModule"
        for part in module.modules()
    )


def _is_held(tensor: Tensor) -> bool:
    """Whether something else refers to the tensor's memory, which would not follow an exchange."""
    count = getattr(torch._C, "_storage_Use_Count", None)  # what CUDA graph trees ask, too
    return count is not None and count(tensor.untyped_storage()._cdata) > 2  # the tensor, and the object asked


def _exchangeable(tensor: Tensor, average: Tensor) -> bool:
    """Whether two tensors can trade storage: alike in all, and neither a view of something larger nor a shard."""
    return (
        not is_traceable_wrapper_subclass(tensor)
        and tensor.dtype == average.dtype
        and tensor.device == average.device
        and tensor.stride() == average.stride()
        and tensor.numel() > 0
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _at(module: nn.Module, prefix: str) -> nn.Module | None:
    """The module at a path; ``get_submodule`` does the same three times slower, and this runs at each sample."""
    found: nn.Module | None = module
    for part in prefix.split(".") if prefix else ():
        found = found._modules.get(part) if found is not None else None
    return found
