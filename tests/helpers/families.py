"""Trained members on the small classification problem, some good and some that know nothing."""

import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_soup.modules.families import Family
from tests.helpers.boring import TinyData


class Counted(nn.Module):
    """A network that counts the samples it has seen."""

    def __init__(self, hidden: int = 8, outputs: int = 3, batch_norm: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(8, hidden), norm, nn.ReLU(), nn.Linear(hidden, outputs))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x)


def trained(seed: int, hidden: int = 8, steps: int = 60, batch_norm: bool = False) -> Counted:
    """A member by itself, trained on half of the training data."""
    torch.manual_seed(seed)
    network = Counted(hidden, batch_norm=batch_norm)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    x, y = (tensor[::2] for tensor in TinyData().train.tensors)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    network.seen = 0
    return network.eval()


def three_families(batch_norm: bool = False) -> list[Family]:
    """Good, less good, and random."""
    return [
        Family(name="good", modules=[trained(seed, batch_norm=batch_norm) for seed in (0, 1)]),
        Family(name="small", modules=[trained(2, hidden=2, steps=40)]),
        Family(name="random", modules=[trained(seed, steps=0) for seed in (3, 4, 5)]),
    ]


class HeldOutData(LightningDataModule):
    """The data of the small problem, where validation is what no member has learned from."""

    class_names = ("a", "b", "c")
    num_classes = 3
    test_names = ("test", "shifted")

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.data = TinyData(batch_size)

    def train_dataloader(self) -> DataLoader:
        return self.data.train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return self.data.val_dataloader()

    def test_dataloader(self) -> list[DataLoader]:
        return self.data.test_dataloader()
