"""ReplicaStrategy on real processes: apart in training, together in checkpoints and at the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import (
    ExponentialAverage,
    ModelSoup,
    ReplicaStrategy,
    UniformSoup,
    gather_ingredients,
    open_checkpoint,
)
from lightning_soup.errors import ReplicaLost, UnreadableCheckpoint, UnsupportedSetup
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.replicas import equal, fit_replicas, weights_of
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_ranks


def _fit(world_size: int, **options: Any) -> dict[str, Any]:
    trainer = fit_replicas(world_size, **options)
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    return {
        "weights": weights_of(module),
        "batches": trainer.num_training_batches,
        "options": {name: value for name, value in optimizer.param_groups[0].items() if name != "params"},
        "hparams": dict(module.hparams),
        "draw": torch.rand(1).item(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }


def _saving(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(**{"dirpath": folder, "filename": "end", "save_weights_only": False, **options})


def _fit_and_save(world_size: int, folder: Path, **options: Any) -> dict[str, Any]:
    return _fit(world_size, callbacks=[_saving(folder)], enable_checkpointing=True, **options)


def test_replicas_train_apart_from_one_start() -> None:
    found = run_on_ranks(3, _fit, 3)
    states = [one["weights"] for one in found]
    assert not any(equal(states[0], other) for other in states[1:])
    assert len({one["draw"] for one in found}) == 3
    assert [one["batches"] for one in found] == [2, 2, 2]  # 96 samples in batches of 16, over 3 ranks
    first = run_on_ranks(3, _fit, 3)
    assert all(equal(a["weights"], b["weights"]) for a, b in zip(found, first, strict=True))  # the same again


def test_a_replica_is_what_its_data_make_of_it(tmp_path: Path) -> None:
    from tests.helpers.replicas import simulate

    class Nothing:
        """An outer step that is never due."""

        collective = False

        def check(self, world_size: int) -> None: ...

        def start(self, weights: Tensor) -> dict[str, Tensor]:
            return {}

    alone = simulate(3, Nothing(), every=1000)
    assert all(equal(one["weights"], other) for one, other in zip(run_on_ranks(3, _fit, 3), alone, strict=True))


def test_a_checkpoint_holds_every_replica(tmp_path: Path) -> None:
    found = run_on_ranks(3, _fit_and_save, 3, tmp_path)
    folder = tmp_path / "end.ckpt"
    assert sorted(path.name for path in folder.iterdir()) == [
        "replica-0-step-4.ckpt",
        "replica-1-step-4.ckpt",
        "replica-2-step-4.ckpt",
        "replicas.json",
    ]
    for rank, one in enumerate(found):
        opened = open_checkpoint(folder, which=rank)
        assert equal(dict(opened), one["weights"])
        assert TinyClassifier.load_from_checkpoint(folder / f"replica-{rank}-step-4.ckpt").hparams.lr == 0.05
    mean = open_checkpoint(folder)
    soup = UniformSoup().cook([one["weights"] for one in found]).weights()
    assert equal(dict(mean), dict(soup))
    assert equal(dict(mean), dict(open_checkpoint(folder, which="mean")))
    ingredients = gather_ingredients(tmp_path / "*.ckpt")
    assert [item.label for item in ingredients] == [f"replica-{rank}-step-4" for rank in range(3)]
    assert all(item.step == 4 for item in ingredients)


@pytest.mark.parametrize("final", ["mean", "best"])
def test_the_end_is_one_model_on_all_ranks(tmp_path: Path, final: str) -> None:
    options = {"strategy": {"final": final, "monitor": "val_loss" if final == "best" else None}}
    options["limit_val_batches"] = 1.0
    found = run_on_ranks(3, lambda: _fit_and_save(3, tmp_path, **options))
    assert all(equal(one["weights"], found[0]["weights"]) for one in found)
    replicas = [open_checkpoint(tmp_path / "end.ckpt", which=rank) for rank in range(3)]
    if final == "mean":
        assert equal(found[0]["weights"], dict(open_checkpoint(tmp_path / "end.ckpt")))
        return
    losses = []
    for replica in replicas:
        module = TinyClassifier()
        module.load_state_dict(dict(replica))
        trainer = quiet_trainer()
        losses.append(trainer.validate(module, datamodule=TinyData(), verbose=False)[0]["val_loss"])
    assert equal(found[0]["weights"], dict(replicas[min(range(3), key=losses.__getitem__)]))


def test_overrides_data_and_seeds_differ_by_rank() -> None:
    strategy = {"data": "full", "overrides": {"lr": [0.01, 0.02], "weight_decay": [0.0, 0.1]}, "seed": 7}
    found = run_on_ranks(2, lambda: _fit(2, strategy=strategy))
    assert [one["options"]["lr"] for one in found] == [0.01, 0.02]
    assert [one["hparams"]["lr"] for one in found] == [0.01, 0.02]
    assert [one["options"]["weight_decay"] for one in found] == [0.0, 0.1]
    assert [one["batches"] for one in found] == [6, 6]


class Late(TinyClassifier):
    """Makes its layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def _start(common_start: bool, make: type[LightningModule]) -> Tensor:
    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
            self.weight = pl_module.net[0].weight.clone()

    look = Look()
    fit_replicas(2, [look], {"common_start": common_start}, make, max_steps=1)
    return look.weight


@pytest.mark.parametrize("make", [Late, TinyClassifier])
def test_replicas_may_begin_apart(make: type[LightningModule]) -> None:
    first, second = run_on_ranks(2, _start, False, make)
    assert not torch.equal(first, second)
    first, second = run_on_ranks(2, _start, True, make)
    assert torch.equal(first, second)


class Fixed(TinyClassifier):
    """Has the same weights whenever it is made."""

    def __init__(self, batch_norm: bool = False, lr: float = 0.05) -> None:
        super().__init__(batch_norm, lr)
        torch.manual_seed(0)
        self.net[0].reset_parameters()
        self.net[3].reset_parameters()


class Unkept(TinyClassifier):
    """Does not say what it was made with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._hparams.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_metrics_are_over_all_replicas(tmp_path: Path) -> None:
    class Logs(TinyClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("rank", float(self.global_rank))

    class Keep:
        """A logger in memory."""

        def __init__(self) -> None:
            self.found: dict[str, float] = {}

    def go() -> dict[str, float]:
        from lightning.pytorch.loggers import CSVLogger

        logger = CSVLogger(tmp_path)
        kept: dict[str, float] = {}
        logger.log_metrics = lambda metrics, step=None: kept.update(metrics)
        fit_replicas(2, make=Logs, logger=logger, limit_val_batches=1.0)
        return kept

    first, _ = run_on_ranks(2, go)
    assert first["rank/replicas_mean"] == 0.5
    assert (first["rank/replicas_min"], first["rank/replicas_max"]) == (0, 1)
    assert first["replicas/spread"] > 0
    assert "val_loss/replicas_mean" not in first  # logged with sync_dist


def test_resumed_replicas_go_on_bit_for_bit(tmp_path: Path) -> None:
    class Dropped(TinyClassifier):
        def __init__(self) -> None:
            super().__init__(batch_norm=True)
            self.net.append(nn.Dropout(0.3))

    def go(epochs: int, folder: str, ckpt_path: str | None = None) -> dict[str, Any]:
        saving = _saving(tmp_path / folder)
        return _fit(
            3, make=Dropped, callbacks=[saving], enable_checkpointing=True, max_epochs=epochs, ckpt_path=ckpt_path
        )

    whole = run_on_ranks(3, go, 4, "whole")
    run_on_ranks(3, go, 2, "half")
    resumed = run_on_ranks(3, go, 4, "half", str(tmp_path / "half" / "end.ckpt"))
    assert all(equal(a["weights"], b["weights"]) for a, b in zip(whole, resumed, strict=True))


def test_a_file_of_one_model_begins_all_replicas(tmp_path: Path) -> None:
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(TinyClassifier(), datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    expected = weights_of(trainer.lightning_module)

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
            self.weights = weights_of(pl_module)

    def go() -> dict[str, Tensor]:
        look = Look()
        fit_replicas(2, [look], ckpt_path=str(tmp_path / "one.ckpt"))
        return look.weights

    assert all(equal(found, expected) for found in run_on_ranks(2, go))


def _raised(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except (UnsupportedSetup, UnreadableCheckpoint, ReplicaLost) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _resume(world_size: int, path: Path) -> str:
    return _raised(lambda: fit_replicas(world_size, ckpt_path=str(path), max_epochs=4))


def test_checkpoints_that_cannot_be_resumed_are_refused_on_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(2, _fit_and_save, 2, tmp_path)
    folder = tmp_path / "end.ckpt"
    for message in run_on_ranks(3, _resume, 3, folder):
        assert "holds 2 replicas, but 3 are being trained" in message
    manifest = (folder / "replicas.json").read_text()
    content = json.loads(manifest)
    content["replicas"][1]["step"] = 5
    (folder / "replicas.json").write_text(json.dumps(content))
    for message in run_on_ranks(2, _resume, 2, folder):
        assert "the file of rank 1 (replica-1-step-6.ckpt) is of step 5" in message
    (folder / "replicas.json").write_text(manifest)
    file = folder / "replica-1-step-6.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    first, second = run_on_ranks(2, _resume, 2, folder)
    assert first.startswith("UnreadableCheckpoint: on rank 1: ")
    assert "replica-1-step-6.ckpt: its bytes are not those that were written" in first
    assert "its bytes are not those" in second
    file.unlink()
    for message in run_on_ranks(2, _resume, 2, folder):
        assert "replica-1-step-6.ckpt: is missing" in message


def test_a_folder_that_was_being_overwritten_keeps_its_last_whole_set(tmp_path: Path) -> None:
    class Interrupted(Callback):
        """Saves, trains on, and is stopped after its file and before the manifest."""

        def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                from lightning_soup.weights.replica_folder import ReplicaManifest

                ReplicaManifest.write = lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    run_on_ranks(2, lambda: fit_replicas(2, [Interrupted()]).current_epoch, may_die=True)
    folder = tmp_path / "last.ckpt"
    assert len(list(folder.glob("replica-*"))) == 4
    assert open_checkpoint(folder).metadata["global_step"] == 3
    assert all("nothing" in message for message in run_on_ranks(2, _resume, 2, folder))
    run_on_ranks(2, lambda: fit_replicas(2, [_Save(folder)]).current_epoch)
    assert sorted(path.name for path in folder.glob("replica-*")) == [f"replica-{r}-step-6-1.ckpt" for r in (0, 1)]


class _Save(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)
        trainer.save_checkpoint(self.path)  # the same step again


class Uneven(TinyData):
    def train_dataloader(self) -> DataLoader:
        count = 32 + 16 * self.trainer.global_rank
        return DataLoader(TensorDataset(*self.train[:count]), 16)


def test_unequal_numbers_of_batches_are_refused() -> None:
    def go() -> str:
        trainer = quiet_trainer(
            devices=2, strategy=ReplicaStrategy(timeout=60), use_distributed_sampler=False, max_epochs=1
        )
        return _raised(lambda: trainer.fit(TinyClassifier(), datamodule=Uneven()))

    for message in run_on_ranks(2, go):
        assert "different numbers of training batches (rank 0: 2, rank 1: 3)" in message


@pytest.mark.parametrize(
    ("options", "strategy", "message"),
    [
        ({"sync_batchnorm": True}, {}, "sync_batchnorm"),
        ({}, {"overrides": {"lr": [0.1]}}, "1 values for 2 replicas"),
        ({}, {"overrides": {"size": [1, 2]}}, "no hyperparameter 'size'"),
        ({"make": lambda: Fixed()}, {"common_start": False}, "same weights, also when made anew"),
        ({"make": lambda: Unkept(16)}, {"common_start": False}, "cannot be made anew"),
        ({"callbacks": [ModelSoup()]}, {}, "ModelSoup does not work with ReplicaStrategy"),
    ],
)
def test_what_replicas_cannot_have_is_refused(options: dict, strategy: dict, message: str) -> None:
    found = run_on_ranks(2, lambda: _raised(lambda: fit_replicas(2, strategy=strategy, **options)))
    assert all(message in one for one in found), found


@pytest.mark.parametrize(
    "options",
    [
        {"data": "half"},
        {"final": "worst"},
        {"final": "best"},
        {"monitor": "val_loss"},
        {"timeout": 0.0},
        {"patience": float("inf")},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedSetup, match=r"ReplicaStrategy\("):
        ReplicaStrategy(**options)


def test_averages_are_each_replicas_own(tmp_path: Path) -> None:
    def go() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        average = ExponentialAverage(decay=0.5)
        trainer = fit_replicas(2, [average, _saving(tmp_path)], enable_checkpointing=True)
        path = tmp_path / "end.ckpt"
        return dict(open_checkpoint(path, which=trainer.global_rank)), weights_of(trainer.lightning_module)

    (first, _), (second, _) = run_on_ranks(2, go)
    assert not equal(first, second)
    mean = open_checkpoint(tmp_path / "end.ckpt")
    name = "net.0.weight"
    assert torch.allclose(mean[name], (first[name] + second[name]) / 2, atol=1e-6)


@pytest.mark.slow
def test_a_rank_that_sleeps_past_the_timeout_is_named() -> None:
    class Sleeps(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_rank == 1 and trainer.global_step == 1:
                import time

                time.sleep(8)

    def go() -> str:
        strategy = {"timeout": 3.0, "final": "mean"}
        return _raised(lambda: fit_replicas(3, [Sleeps()], strategy, max_steps=4))

    first, _, third = run_on_ranks(3, go, may_die=True)
    for message in (first, third):
        assert message.startswith("ReplicaLost: ")
        assert "did not answer within 3 s" in message
    assert "rank 1 at step 0" in first  # posted at most once a second
    assert "rank 1 at step 0" in third or "Rank 0, which holds the store" in third  # which may have ended by then


def test_by_name_from_the_registry() -> None:
    import lightning_soup.distributed  # noqa: F401

    def go() -> str:
        trainer = quiet_trainer(devices=2, strategy="replicas", max_steps=1, limit_val_batches=0)
        trainer.fit(TinyClassifier(), datamodule=TinyData())
        return type(trainer.strategy).__name__

    assert run_on_ranks(2, go) == ["ReplicaStrategy"] * 2


@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_options_survive_yaml(tmp_path: Path) -> None:
    from lightning.pytorch.cli import LightningCLI

    options = {"data": "full", "overrides": {"lr": [0.1, 0.2], "weight_decay": [0, 0.1]}, "seed": 3, "timeout": 60.0}
    options |= {"final": "best", "monitor": "val_loss", "start_method": "fork", "patience": 5.0, "common_start": False}
    node = {"class_path": "lightning_soup.ReplicaStrategy", "init_args": options}

    def cli(arguments: Any) -> Any:
        fixed = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
        trainer = {"logger": False, "accelerator": "cpu", "devices": 2}
        return LightningCLI(TinyClassifier, TinyData, args=arguments, trainer_defaults=trainer, **fixed)

    first = cli({"trainer": {"strategy": node}})
    (tmp_path / "saved.yaml").write_text(first.parser.dump(first.config, skip_none=False))
    for built in (first, cli(["--config", str(tmp_path / "saved.yaml")])):
        strategy = built.trainer.strategy
        assert isinstance(strategy, ReplicaStrategy)
        assert (strategy.overrides, strategy.monitor, strategy.mode) == (options["overrides"], "val_loss", "min")
        assert (strategy._timeout.total_seconds(), strategy.patience, strategy.seed) == (60.0, 5.0, 3)
        assert (strategy.data, strategy.final, strategy.common_start) == ("full", "best", False)
