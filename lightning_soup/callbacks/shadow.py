"""The averaged tensors: one running mean, or the mean of the latest k; updated in one fused operation.

Both work on *local* tensors: of a sharded parameter each rank averages its own shard, so no update communicates.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_soup.threads import one_thread

# Adding several float32 tensors in one pass costs less than one pass each; more at once spill the cache.
_SMALL = torch.float32


class Shadow(ABC):
    """Averages of a fixed list of live tensors.

    Attributes:
        tensors: The average, one tensor for each live tensor, in float32 (float64 for 64-bit tensors). While the
            average stands in the module, tensors whose storage was exchanged hold the live values instead.
    """

    tensors: list[Tensor]
    window: int | None = None  # samples in the mean, where it forgets all others

    @abstractmethod
    def absorb(self, live: Sequence[Tensor], share: float) -> None:
        """Take a sample of the live tensors; ``share`` is its weight in a running mean."""

    @abstractmethod
    def grow(self, live: Tensor) -> None:
        """Average one tensor more, as if it had always had this value."""

    @abstractmethod
    def settle(self) -> None:
        """Make ``tensors`` current, where that is left until it is asked for."""

    @abstractmethod
    def state(self) -> list[list[Tensor]]:
        """Everything to save: one or more samples, each as long as ``tensors``."""

    @abstractmethod
    def restore(self, samples: Sequence[Sequence[Tensor]]) -> None:
        """Continue from what :meth:`state` gave, already placed and in the right types."""

    def edit(self, change: Callable[[list[Tensor]], None]) -> None:
        """Change all that is kept, in place: each list of :meth:`state`."""
        for sample in self.state():
            change(sample)


class RunningMean(Shadow):
    """``s ← s + share·(θ − s)``: memory of the averaged tensors once, one pass over them for an update."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.tensors = []
        self.device = device

    def absorb(self, live: Sequence[Tensor], share: float) -> None:
        """Update in place. A share of 1 copies."""
        if not self.tensors:
            self.tensors = [new_shadow(tensor, self.device_of(tensor)) for tensor in live]
            return
        lerp(self.tensors, live, share)

    def device_of(self, live: Tensor) -> torch.device:
        """Where the average of a tensor is kept."""
        return self.device or live.device

    def settle(self) -> None:
        """A running mean is current at all times."""

    def grow(self, live: Tensor) -> None:
        """Start the new average at the present value."""
        self.tensors.append(new_shadow(live, self.device_of(live)))

    def state(self) -> list[list[Tensor]]:
        """The mean itself."""
        return [self.tensors]

    def restore(self, samples: Sequence[Sequence[Tensor]]) -> None:
        """Continue from a mean."""
        self.tensors = list(samples[0])


class LatestMean(RunningMean):
    """The plain mean of the latest k samples, which are all kept."""

    def __init__(self, k: int, device: torch.device | None = None) -> None:
        super().__init__(device)
        self.k = k
        self.samples: list[list[Tensor]] = []
        self._stale = True

    def absorb(self, live: Sequence[Tensor], share: float) -> None:
        """Keep a sample; the oldest one gives its memory."""
        if len(self.samples) == self.k:
            oldest = self.samples.pop(0)
            with one_thread(oldest):
                torch._foreach_copy_(oldest, list(live))
            self.samples.append(oldest)
        else:
            self.samples.append([new_shadow(tensor, self.device_of(tensor)) for tensor in live])
        self._stale, self.window = True, len(self.samples)

    def grow(self, live: Tensor) -> None:
        """The new tensor had this value in every sample."""
        for sample in self.samples:
            sample.append(new_shadow(live, self.device_of(live)))
        self._stale = True
        self.tensors = []

    def edit(self, change: Callable[[list[Tensor]], None]) -> None:
        """The mean is formed anew."""
        super().edit(change)
        self._stale = True

    def settle(self) -> None:
        """Form the mean: once after any number of samples, since only validation and files need it."""
        if not self._stale or not self.samples:
            return
        if not self.tensors:
            with torch.inference_mode(False):  # where a file is written in inference mode; see Group.place
                self.tensors = [torch.empty_like(tensor) for tensor in self.samples[0]]
        with one_thread(self.tensors):
            torch._foreach_copy_(self.tensors, self.samples[0])
            for count, sample in enumerate(self.samples[1:], start=2):
                torch._foreach_lerp_(self.tensors, sample, 1 / count)
        self._stale = False

    def state(self) -> list[list[Tensor]]:
        """The samples, oldest first."""
        return self.samples

    def restore(self, samples: Sequence[Sequence[Tensor]]) -> None:
        """Continue from these samples."""
        self.samples, self.tensors, self._stale = [list(sample) for sample in samples[-self.k :]], [], True
        self.window = len(self.samples)


def shadow_dtype(dtype: torch.dtype) -> torch.dtype:
    """Averages are kept in float32 at least: sums in 16 bit lose what they are to add."""
    return torch.promote_types(dtype, _SMALL)


def new_shadow(live: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor in the type of its average, never a view of it."""
    return live.detach().to(device=device, dtype=shadow_dtype(live.dtype), copy=True)


@torch.no_grad()
def lerp(averages: list[Tensor], live: Sequence[Tensor], share: float) -> None:
    """``a ← a + share·(θ − a)`` for all tensors, fused where type and device agree."""
    alike = [a.dtype == b.dtype and a.device == b.device for a, b in zip(averages, live, strict=True)]
    with one_thread(averages):
        if all(alike):
            torch._foreach_lerp_(averages, list(live), share)
            return
        for average, tensor, same in zip(averages, live, alike, strict=True):
            # One tensor at a time: the converted copy of a whole model would double the memory.
            average.lerp_(tensor if same else tensor.to(average), share)
