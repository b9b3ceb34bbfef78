"""A tiny transformer that trains in a second, with four feed-forward networks called ``mlp``."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from tests.helpers.boring import TinyClassifier


class Block(nn.Module):
    """A feed-forward network with a residual; attention is left out, but tokens are mixed by their mean."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x + x.mean(1, keepdim=True)))


class TinyTransformer(TinyClassifier):
    """Reads the 8 features of :class:`.TinyData` as 8 tokens."""

    def __init__(self, depth: int = 4, lr: float = 0.01) -> None:
        LightningModule.__init__(self)
        self.lr = lr
        self.net = nn.Sequential(_Embed(), *(Block() for _ in range(depth)), _Head())
        self.val_accuracy = MulticlassAccuracy(3, average="micro")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class _Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-1) * self.positions


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(1))
