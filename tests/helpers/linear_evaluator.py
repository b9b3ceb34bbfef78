"""An evaluator small enough to check by hand: sign(θ·x) for the score, log(1 + exp(−yθ·x)) for the loss."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_soup.evaluation import Evaluator


class LinearEvaluator(Evaluator):
    """Weights are one vector ``w``, in which the output is linear."""

    metric = "val_acc"

    def __init__(self, x: Tensor, y: Tensor, mode: str = "max") -> None:
        self.x, self.y, self.mode = x, y, mode
        self.scored: list[Tensor] = []

    def score(self, weights: Mapping[str, Tensor]) -> float:
        self.scored.append(weights["w"].clone())
        return ((self.x @ weights["w"]).sign() == self.y).double().mean().item()

    def head(self) -> tuple[str, ...]:
        return ("w",)

    def batches(self, epoch: int, batch_size: int) -> Iterable[slice]:
        return [slice(start, start + batch_size) for start in range(0, len(self.x), batch_size)]

    def loss_and_grad(self, weights: Mapping[str, Tensor], batch: slice) -> tuple[float, dict[str, Tensor]]:
        w = weights["w"].clone().requires_grad_()
        loss = torch.nn.functional.softplus(-self.y[batch] * (self.x[batch] @ w)).mean()
        loss.backward()
        return loss.item(), {"w": w.grad}
