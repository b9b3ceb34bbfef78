"""Replicas whose weights, checkpoints, schedules and Trainers are not the plainest ones."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_soup.errors import LightningSoupError
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.replicas import equal, fit_replicas, weights_of
from tests.helpers.two_ranks import run_on_ranks


def _raised(function: Callable[[], Any]) -> str:
    try:
        function()
    except LightningSoupError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


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


def test_what_was_written_beside_a_file_that_cannot_be_is_removed(tmp_path: Path) -> None:
    class Full(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            super().save_checkpoint(checkpoint, path, storage_options)
            if os.environ["LOCAL_RANK"] == "1" and checkpoint["global_step"] == 6:
                raise OSError(28, "No space left on device", str(path))

    def go() -> str:
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        options = {"callbacks": [saving], "enable_checkpointing": True}
        return _raised(lambda: fit_replicas(2, strategy={"checkpoint_io": Full()}, **options))

    first, _ = run_on_ranks(2, go)
    assert first.startswith("UnwritableOutput: on rank 1: ")
    assert "the disk is full" in first
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]
    assert len(list((tmp_path / "epoch=0.ckpt").iterdir())) == 3


@pytest.mark.parametrize("schedule", ["LambdaLR", "ReduceLROnPlateau"])
def test_a_rate_that_a_schedule_would_set_back_is_refused(schedule: str) -> None:
    class Scheduled(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            del self.hparams["lr"]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            if schedule == "LambdaLR":
                return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]
            monitored = {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "val_loss"}
            return {"optimizer": optimizer, "lr_scheduler": monitored}

    def go() -> tuple[str, float]:
        rates = []

        class Rates(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        strategy = {"overrides": {"lr": [0.01, 0.02]}}
        options = {"strategy": strategy, "make": Scheduled, "limit_val_batches": 1}
        return _raised(lambda: fit_replicas(2, [Rates()], **options)), rates[-1:]

    found = run_on_ranks(2, go)
    if schedule == "ReduceLROnPlateau":
        assert found == [("nothing", [0.01]), ("nothing", [0.02])]
    else:
        assert all("LambdaLR would set it back" in message for message, _ in found)


@pytest.mark.parametrize("where", ["one", "all"])
def test_an_infinity_has_no_mean_unless_all_have_it(where: str) -> None:
    class Infinite(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if where == "all" or trainer.global_rank == 1:
                pl_module.net[0].bias.data[2] = float("inf")

    def go() -> str:
        return _raised(lambda: fit_replicas(2, [Infinite()], {"final": "mean"}, max_steps=1))

    first, second = run_on_ranks(2, go)
    if where == "all":
        assert first == second == "nothing"
    else:
        assert first.startswith("NonFiniteWeights: on rank 1: net.0.bias holds an infinity")
        assert second.startswith("NonFiniteWeights: net.0.bias holds an infinity")


@pytest.mark.parametrize(
    ("monitor", "batches", "message"),
    [("val_loss", 0, "there is no validation data"), ("loss", 1, "validation does not log it. Logged: val_acc")],
)
def test_a_best_that_cannot_be_chosen_is_refused_early(monitor: str, batches: int, message: str) -> None:
    steps: list[int] = []

    class Steps(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            steps.append(trainer.current_epoch)

    def go() -> tuple[str, list[int]]:
        strategy = {"final": "best", "monitor": monitor, "mode": "min"}
        options = {"limit_val_batches": batches, "max_epochs": 3}
        return _raised(lambda: fit_replicas(2, [Steps()], strategy, **options)), steps

    for text, taken in run_on_ranks(2, go):
        assert message in text
        assert taken == []


def test_the_spread_of_complex_weights_is_that_of_both_parts() -> None:
    def go() -> float:
        ranks = fit_replicas(2, max_steps=1).strategy.ranks
        return ranks.spread([torch.tensor([1.0 + 2.0j * ranks.rank, 3.0])])

    assert run_on_ranks(2, go) == [0.5, 0.5]  # of four numbers one lies 1 from its mean, √(1/4)


def test_replicas_at_different_steps_are_not_saved_together(tmp_path: Path) -> None:
    class Uneven(TinyClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            for _ in range(1 + self.global_rank):
                self.optimizers().step()

    def go() -> str:
        trainer = fit_replicas(2, make=Uneven, max_epochs=1)
        return _raised(lambda: trainer.save_checkpoint(tmp_path / "end.ckpt"))

    for message in run_on_ranks(2, go):
        assert "different numbers of optimizer steps (rank 0: 3, rank 1: 6)" in message
    assert not list(tmp_path.iterdir())
