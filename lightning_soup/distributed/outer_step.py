"""What replicas do with each other's weights, as arithmetic on flat vectors: the same on ranks and in one process."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup

__all__ = ["Layout", "OuterStep", "Replica"]


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a replica lie in a flat vector: first its weights, then its floating-point buffers.

    Attributes:
        names: Of the tensors, in their order.
        shapes: Of the tensors; complex ones have a last dimension of 2.
        weights: How many elements the weights have together.
        dtype: Of the vector: float32, or float64 where a tensor is so.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    weights: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> "Layout":
        """The layout of these tensors."""
        tensors = [*_real(weights.values()), *_real(buffers.values())]
        dtype = torch.float32
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        count = sum(tensor.numel() for tensor in _real(weights.values()))
        return cls((*weights, *buffers), tuple(tensor.shape for tensor in tensors), count, dtype)

    @torch.no_grad()
    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The vector of these tensors."""
        return torch.cat([tensor.detach().reshape(-1).to(self.dtype) for tensor in _real(tensors)])

    @torch.no_grad()
    def write(self, vector: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy a vector into tensors, in place, each rounded once to its own type."""
        torch._foreach_copy_([tensor.detach() for tensor in _real(tensors)], list(self.views(vector).values()))

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector, or of the weights alone, by name; they share its memory."""
        found, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            if start == len(vector) and shape.numel():
                break
            found[name] = vector[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return found

    def check(self, vector: Tensor, owner: str) -> None:
        """Refuse NaN and infinities before others get them.

        Raises:
            NonFiniteWeights: The first tensor that holds one is named.
        """
        if vector.sum().isfinite() or vector.isfinite().all():  # a sum can overflow
            return
        name = next(name for name, part in self.views(vector).items() if not part.isfinite().all())
        raise NonFiniteWeights(
            f"{owner}: {name} holds NaN or an infinite value, which was not sent to others. Train with a smaller lr or "
            "with clipped gradients, or warm up; the last checkpoint is unharmed."
        )


class OuterStep(ABC):
    """What a replica sends, to whom, and what it makes of what it gets."""

    collective: ClassVar[bool] = False
    """Whether all replicas need but the mean of all messages, which an all-reduce brings."""

    @abstractmethod
    def check(self, world_size: int) -> None:
        """Refuse what cannot work with so many replicas.

        Raises:
            UnsupportedSetup: Before training.
        """

    @abstractmethod
    def group(self, round_: int, rank: int, world_size: int) -> tuple[int, ...]:
        """The ranks whose messages a replica averages, itself among them, in order; who is in whose is mutual.

        Args:
            round_: Number of the outer step, from 0.
            rank: The replica.
            world_size: How many there are.
        """

    @abstractmethod
    def start(self, weights: Tensor) -> dict[str, Tensor]:
        """The state in the beginning."""

    @abstractmethod
    def message(self, weights: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """What a replica sends: a vector as long as its weights."""

    @abstractmethod
    def update(
        self, weights: Tensor, state: dict[str, Tensor], messages: Sequence[Tensor], own: int, layout: Layout
    ) -> Tensor:
        """The new weights; the state is changed.

        Args:
            weights: θ.
            state: The replica's.
            messages: Of the group, in the order of ranks; or their mean alone.
            own: Which of them is the replica's own.
            layout: Where tensors lie in the weights.
        """


class Replica:
    """The state of one replica under an outer step.

    Args:
        step: The outer step.
        layout: Of the replica's vectors.
        vector: Where it begins.
    """

    def __init__(self, step: OuterStep, layout: Layout, vector: Tensor) -> None:
        self.step, self.layout = step, layout
        self.state = step.start(vector[: layout.weights])

    @torch.no_grad()
    def message(self, vector: Tensor) -> Tensor:
        """What it sends: the message of its weights, and its buffers as they are."""
        weights, buffers = vector[: self.layout.weights], vector[self.layout.weights :]
        return torch.cat([self.step.message(weights, self.state), buffers])

    @torch.no_grad()
    def average(self, vector: Tensor, messages: Mapping[int, Tensor], rank: int) -> Tensor:
        """Its new vector; buffers (BatchNorm's statistics) become the mean of the group's.

        Args:
            vector: Its present one.
            messages: By rank, its own among them; or a mean of all by its own rank.
            rank: Its rank.
        """
        count, order = self.layout.weights, sorted(messages)
        weights = self.step.update(
            vector[:count],
            self.state,
            [messages[r][:count] for r in order],
            order.index(rank),
            self.layout,
        )
        return torch.cat([weights, mean_in_order([messages[r][count:] for r in order])])


def mean_in_order(vectors: Sequence[Tensor]) -> Tensor:
    """The mean, added in the order given, so that all who add the same vectors get the same bits."""
    total = vectors[0].clone()
    for vector in vectors[1:]:
        total += vector
    return total.div_(len(vectors)) if len(vectors) > 1 else total


def check_number(owner: str, option: str, value: float, low: float, high: float, closed: bool = False) -> None:
    """Refuse a number that is not between two others.

    Raises:
        UnsupportedSetup: It is not.
    """
    if not (low < value < high or (closed and value in (low, high))):
        raise UnsupportedSetup(f"{owner}({option}={value}): expected a number from {low:g} to {high:g}.")


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
