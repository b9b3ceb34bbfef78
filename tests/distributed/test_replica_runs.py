"""Replicas whose weights, checkpoints, schedules and Trainers are not the plainest ones."""

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.replicas import equal, fit_replicas, weights_of
from tests.helpers.two_ranks import run_on_ranks


class Begins(Callback):
    """What a replica begins with."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = weights_of(pl_module)


def test_weights_of_any_memory_format_begin_alike() -> None:
    class Strided(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.turned = nn.Parameter(torch.randn(4, 3).t())
            self.channels = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    def go() -> tuple[dict[str, Tensor], bool]:
        begins = Begins()
        module = fit_replicas(2, [begins], make=Strided, max_steps=1).lightning_module
        return begins.weights, module.channels.weight.is_contiguous(memory_format=torch.channels_last)

    (first, kept), (second, kept_too) = run_on_ranks(2, go)
    assert equal(first, second)
    assert kept
    assert kept_too


def test_the_best_checkpoint_has_one_path_where_metrics_differ(tmp_path: Path) -> None:
    class Own(TinyClassifier):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("own", float(self.net[0].weight.sum()))  # of each replica, not synchronised

    def go() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        warnings.filterwarnings("ignore", "It is recommended to use `self.log|Using `DistributedSampler`")
        saving = ModelCheckpoint(tmp_path, "{epoch}-{own:.4f}", monitor="own", save_top_k=2)
        options = {"callbacks": [saving], "enable_checkpointing": True, "limit_val_batches": 1, "max_epochs": 1}
        trainer = fit_replicas(2, make=Own, **options)
        trained = weights_of(trainer.lightning_module)
        nn.init.zeros_(trainer.lightning_module.net[0].weight)
        trainer.validate(datamodule=TinyData(), ckpt_path="best", verbose=False)
        return trained, weights_of(trainer.lightning_module)

    for trained, loaded in run_on_ranks(2, go):
        assert equal(trained, loaded)
