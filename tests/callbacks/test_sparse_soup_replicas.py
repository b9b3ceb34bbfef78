"""SparseModelSoup with a process for each copy: the soups of one device."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_soup import GreedySoup, ReplicaStrategy, SparseModelSoup
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.replicas import equal, weights_of
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_ranks

SMALL = {"sparsity": 0.8, "cycles": 2, "copies": 3, "retrain_epochs": 1, "dense_epochs": 1, "monitor": "val_loss"}


class Dropped(TinyClassifier):
    """Draws random numbers in each step."""

    def __init__(self, batch_norm: bool = False, lr: float = 0.05) -> None:
        super().__init__(batch_norm, lr)
        self.net.append(nn.Dropout(0.2))


def _fit(
    folder: Path, copies: int, strategy: dict[str, Any] | None, ckpt_path: str | None = None, **options: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seed_everything(5, verbose=False)
    module = Dropped()
    soup = SparseModelSoup(**{**SMALL, "copies": copies, "dirpath": str(folder / "soups"), **options})
    devices = {"devices": copies, "strategy": ReplicaStrategy(**strategy)} if strategy is not None else {}
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = quiet_trainer(max_epochs=-1, callbacks=[soup, saving], enable_checkpointing=True, **devices)
    trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt_path)
    return weights_of(module), soup.records


FULL = {"data": "full", "timeout": 60.0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recipe": GreedySoup(), "vary": {"lr_max": [0.02, 0.05, 0.1], "weight_decay": [0.0, 0.01, 0.1]}},
        {"dense_epochs": 0, "schedule": "clr", "cycles": 1},
    ],
)
def test_copies_side_by_side_make_the_soups_of_copies_in_turn(tmp_path: Path, options: dict[str, Any]) -> None:
    weights, records = _fit(tmp_path / "turn", 3, None, **options)
    found = run_on_ranks(3, lambda: _fit(tmp_path / "side", 3, FULL, **options))
    for one, told in found:
        assert equal(one, weights)
        assert [record["sparsity"] for record in told] == [record["sparsity"] for record in records]
        assert [record["copies"] for record in told] == [pytest.approx(record["copies"]) for record in records]
        assert [record["soup"] for record in told] == [pytest.approx(record["soup"]) for record in records]
    names = sorted(path.name for path in (tmp_path / "turn" / "soups").glob("*.ckpt"))
    assert sorted(path.name for path in (tmp_path / "side" / "soups").glob("*.ckpt")) == names
    assert sum(int(weights[name].count_nonzero()) for name in ("net.0.weight", "net.3.weight")) == round(176 * 0.2)


def test_a_resumed_fit_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {"retrain_epochs": 2}
    whole = run_on_ranks(3, lambda: _fit(tmp_path, 3, FULL, **options))
    for epoch in (1, 2, 3):
        path = str(tmp_path / f"epoch={epoch}.ckpt")
        resumed = run_on_ranks(3, lambda path=path: _fit(tmp_path, 3, FULL, path, **options))
        assert all(equal(one, other) for (one, _), (other, _) in zip(whole, resumed, strict=True)), epoch
        assert [one[1] for one in resumed] == [one[1] for one in whole]


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ({"data": "full"}, {"copies": 4}, "4 copies on 3 processes"),
        ({"data": "shard"}, {}, "data='full'"),
        ({"data": "full"}, {"vary": {"retrain_epochs": [1, 2, 1]}}, "together"),
        ({"data": "full", "overrides": {"lr": [1, 2, 3]}}, {}, "Use vary"),
        ({"data": "full", "final": "best", "monitor": "val_loss"}, {}, "ends with the soup"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, strategy: dict, options: dict, message: str) -> None:
    def go() -> str:
        copies = options.get("copies", 3)
        try:
            soup = SparseModelSoup(**{**SMALL, "copies": copies, "dirpath": str(tmp_path), **options})
            trainer = quiet_trainer(max_epochs=-1, callbacks=[soup], devices=3, strategy=ReplicaStrategy(**strategy))
            trainer.fit(Dropped(), datamodule=TinyData())
        except UnsupportedSetup as error:
            return str(error)
        return "nothing"

    found = run_on_ranks(3, go)
    assert all(message in text for text in found), found
