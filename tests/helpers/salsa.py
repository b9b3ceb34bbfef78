"""SalsaPPO in tests: two tiny fine-tunes of one start, prompts, a reward, and a fit."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_soup.data.prompts import PromptDataModule
from lightning_soup.modules.alignment import SalsaPPO
from lightning_soup.modules.soup_reference import SoupReference
from tests.helpers.texts import sums, write_fine_tune, write_lines, write_model
from tests.helpers.trainers import quiet_trainer


def write_pair(place: Path) -> Path:
    """Folders ``a`` and ``b`` with models from one start, and ``prompts.jsonl``."""
    write_fine_tune(place / "b", write_model(place / "a"))
    write_lines(place / "prompts.jsonl", [{"prompt": line["prompt"]} for line in sums(32)])
    return place


def count_digits(sequences: Tensor, kinds: Tensor) -> Tensor:
    """A reward: tokens 29 to 38 are the digits."""
    return ((sequences >= 29) & (sequences < 39) & (kinds == 2)).sum(1).float()


def module(folder: Path, **options: Any) -> SalsaPPO:
    """From ``a``, held to the soup of ``a`` and ``b``."""
    reference = SoupReference([str(folder / "a"), str(folder / "b")])
    given = {"reward": count_digits, "reference": reference, "lr": 1e-2, "max_new_tokens": 6, "epochs": 2, **options}
    return SalsaPPO(str(folder / "a"), **given)


def data(folder: Path, **options: Any) -> PromptDataModule:
    """24 prompts for training and 8 for validation."""
    return PromptDataModule(
        str(folder / "prompts.jsonl"), str(folder / "a"), **{"batch_size": 8, "val_fraction": 0.25, **options}
    )


def fit(
    module: LightningModule,
    folder: Path,
    tmp_path: Path,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    data_options: Any = (),
    **options: Any,
) -> Trainer:
    """Train for two epochs, from seed 0."""
    seed_everything(0, verbose=False)
    trainer = quiet_trainer(callbacks=[*callbacks], default_root_dir=tmp_path, **{"max_epochs": 2, **options})
    trainer.fit(module, datamodule=data(folder, **dict(data_options)), ckpt_path=ckpt_path)
    return trainer


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
