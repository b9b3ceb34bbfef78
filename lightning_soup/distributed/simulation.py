"""Replicas in one process: for worlds larger than a machine has processes, and to know what ranks must compute."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_soup.distributed.federated_sum import float_buffers
from lightning_soup.distributed.outer_step import Layout, OuterStep, Replica, mean_in_order

__all__ = ["SimulatedReplicas"]


class SimulatedReplicas:
    """Takes the outer steps of replicas that are all in this process, in their arithmetic to the last bit.

    Train the modules as you like between two calls of :meth:`average`.

    Args:
        modules: The replicas, one per rank.
        step: The outer step, such as :class:`.NoLoCoStep`.

    Raises:
        UnsupportedSetup: The outer step cannot work with so many.

    Example:
        >>> from lightning_soup.distributed.noloco import NoLoCoStep
        >>> modules = [nn.Linear(1, 1, bias=False).requires_grad_() for _ in range(4)]
        >>> replicas = SimulatedReplicas(modules, NoLoCoStep(alpha=0.0, beta=1.0))
        >>> replicas.average()  # of two each
        >>> len({module.weight.item() for module in modules})
        2
    """

    def __init__(self, modules: Sequence[nn.Module], step: OuterStep) -> None:
        step.check(len(modules))
        self.modules, self.step, self.round = list(modules), step, 0
        self._tensors = [[*_weights(module).values(), *_buffers(module).values()] for module in modules]
        self.layout = Layout.of(_weights(modules[0]), _buffers(modules[0]))
        self.replicas = [Replica(step, self.layout, self.layout.flatten(tensors)) for tensors in self._tensors]
        self.messages = self.bytes_sent = 0

    @torch.no_grad()
    def average(self) -> None:
        """One outer step of all replicas."""
        count = len(self.modules)
        vectors = [self.layout.flatten(tensors) for tensors in self._tensors]
        sent = [replica.message(vector) for replica, vector in zip(self.replicas, vectors, strict=True)]
        everyone = mean_in_order(sent) if self.step.collective else None
        for rank, (replica, vector) in enumerate(zip(self.replicas, vectors, strict=True)):
            if everyone is not None:
                received = {rank: everyone}
            else:
                received = {other: sent[other] for other in self.step.group(self.round, rank, count)}
                self.messages += len(received) - 1
                self.bytes_sent += (len(received) - 1) * vector.numel() * vector.element_size()
            self.layout.write(replica.average(vector, received, rank), self._tensors[rank])
        self.round += 1

    @torch.no_grad()
    def spread(self) -> float:
        """√(mean over replicas and weights of (mean − θ)²)."""
        vectors = torch.stack([self.layout.flatten(tensors)[: self.layout.weights] for tensors in self._tensors])
        return float((vectors.double() - vectors.double().mean(0)).square().mean().sqrt())


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    kept = float_buffers(module)
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
