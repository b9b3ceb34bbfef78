"""A tiny open_clip model, and images that it can learn in a second."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup.modules import CLIPClassifier
from tests.helpers.trainers import quiet_trainer

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 8},
    "text_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1},
}
COCA = {
    **TINY_CLIP,
    "custom_text": True,
    "vision_cfg": {**TINY_CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**TINY_CLIP["text_cfg"], "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 12, "width": 16, "heads": 2, "layers": 1},
}
ROWS = ["top", "middle", "bottom"]
WAYS = [("both", "text"), ("image", "trained"), ("image", "text"), ("head", "trained")]
"""All that ``train`` and ``head`` can say."""


def tiny_clip(seed: int = 0, **options: Any) -> CLIPClassifier:
    """A CLIPClassifier with random weights, for the three rows of :class:`RowData`."""
    torch.manual_seed(seed)
    defaults = {"model_config": TINY_CLIP, "classnames": ROWS, "templates": ["the {} row", "a {}"], "lr": 2e-3}
    return CLIPClassifier(**{**defaults, **options})


class RowData(LightningDataModule):
    """8×8 images with one bright row, which is the class: 48 training, 21 validation, 15 + 9 test images.

    With ``columns`` it is a bright column.
    """

    test_names = ("test", "dark")

    def __init__(
        self, class_names: list[str] | None = ROWS, channels: int = 3, size: int = 8, columns: bool = False
    ) -> None:
        super().__init__()
        if class_names is not None:
            self.class_names = class_names
        generator = torch.Generator().manual_seed(3)

        def images(count: int, factor: float = 1.0) -> TensorDataset:
            targets = torch.arange(count) % 3
            x = torch.rand(count, channels, size, size, generator=generator)
            x[torch.arange(count), :, 3 * targets] += 1.0
            return TensorDataset(factor * (x.mT if columns else x), targets)

        self.train, self.val, self.test = images(48), images(21), [images(15), images(9, 0.3)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 8)

    def test_dataloader(self) -> list[DataLoader]:
        return [DataLoader(test, 8) for test in self.test]


class Unnamed(LightningDataModule):
    """Validation images without names of their classes."""

    def val_dataloader(self):
        return DataLoader(RowData().val, 8)


def fit_clip(model: CLIPClassifier, data: LightningDataModule | None = None, **options: Any) -> Trainer:
    """Fit, two epochs unless asked for more, in the same order of batches every time."""
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(**{"max_epochs": 2, **options})
    trainer.fit(model, datamodule=data or RowData())
    return trainer


def some_images(count: int = 4) -> Tensor:
    """Noise, the same every time."""
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that are not as they were."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
