"""A small classification problem that trains in a second, with and without BatchNorm."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class TinyClassifier(LightningModule):
    """Two linear layers on 8 features, 3 classes; logs ``val_acc`` and ``val_loss``."""

    def __init__(self, batch_norm: bool = False, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        middle = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(8, 16), middle, nn.ReLU(), nn.Linear(16, 3))
        self.val_accuracy = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.val_accuracy(logits, y)
        self.log("val_acc", self.val_accuracy)
        self.log("val_loss", loss, sync_dist=True)
        return loss

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        return self.net(batch[0] if isinstance(batch, (list, tuple)) else batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class TinyData(LightningDataModule):
    """Noisy linear classes: 96 training, 60 validation, 60 + 60 test samples."""

    test_names = ("test", "shifted")

    def __init__(self, batch_size: int = 16, noise: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        truth = torch.randn(8, 3, generator=generator)

        def split(count: int, shift: float = 0.0) -> TensorDataset:
            x = torch.randn(count, 8, generator=generator) + shift
            y = (x @ truth + noise * torch.randn(count, 3, generator=generator)).argmax(1)
            return TensorDataset(x, y)

        self.batch_size = batch_size
        self.train, self.val, self.test = split(96), split(60), [split(60), split(60, 0.5)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> list[DataLoader]:
        return [DataLoader(test, self.batch_size) for test in self.test]
