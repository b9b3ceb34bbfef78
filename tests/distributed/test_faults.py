"""Processes that die, sleep or come too late, while replicas train."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_soup import DiLoCo, GossipAveraging, NoLoCo, open_checkpoint
from lightning_soup.distributed.noloco import random_groups
from lightning_soup.distributed.ranks import Ranks
from lightning_soup.errors import ReplicaLost
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.replicas import equal, fit_replicas, weights_of
from tests.helpers.two_ranks import run_on_ranks

pytestmark = pytest.mark.slow  # seconds of patience each, which a busy machine must not use up

ROUNDS = 6
VICTIM = 2


class Dies(Callback):
    """Kills a rank before an outer step, or in the middle of its exchange."""

    def __init__(self, rank: int, step: int, in_exchange: bool = False) -> None:
        self.rank, self.step, self.in_exchange = rank, step, in_exchange

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if not self.in_exchange:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.batch_isend_irecv = lambda ops: os.kill(os.getpid(), signal.SIGKILL)


class Sleeps(Callback):
    def __init__(self, rank: int, step: int, seconds: float) -> None:
        self.rank, self.step, self.seconds = rank, step, seconds

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            time.sleep(self.seconds)


class Peers(Callback):
    """With how many others each outer step was taken."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.found += [float(value) for name, value in trainer.logged_metrics.items() if name.endswith("/peers")]
        trainer._logger_connector._logged_metrics.clear()


def _go(
    make: Callable[[], Callback], fault: Callback, patience: float | None = 2.0, final: str = "all", **options: Any
) -> dict[str, Any] | str:
    warnings.filterwarnings("ignore", "rank .* (is gone|died)|GossipAveraging: all")
    peers = Peers()
    strategy = {"patience": patience, "timeout": 10.0, "final": final}
    try:
        trainer = fit_replicas(4, [make(), peers, fault], strategy, max_steps=ROUNDS, max_epochs=-1, **options)
    except ReplicaLost as error:
        return f"ReplicaLost: {error}"
    return {
        "weights": weights_of(trainer.lightning_module),
        "steps": trainer.global_step,
        "peers": peers.found,
        "members": trainer.strategy.ranks.members,
    }


@pytest.mark.parametrize("in_exchange", [False, True])
def test_survivors_of_a_killed_rank_go_on(in_exchange: bool) -> None:
    found = run_on_ranks(4, _go, lambda: NoLoCo(every=1), Dies(VICTIM, 2, in_exchange), may_die=True)
    assert found[VICTIM] is None
    survivors = [found[rank] for rank in range(4) if rank != VICTIM]
    assert [one["steps"] for one in survivors] == [ROUNDS] * 3
    for rank, one in enumerate(found):
        if rank == VICTIM:
            continue
        for round_, count in enumerate(one["peers"]):
            group = next(group for group in random_groups(round_, 4, 2) if rank in group)
            assert count == (0 if VICTIM in group and round_ >= 2 else 1), (rank, round_)
        assert all(value.isfinite().all() for value in one["weights"].values())


def test_survivors_end_with_their_mean_and_save_it(tmp_path: Path) -> None:
    class Saves(Dies):
        def on_train_end(self, trainer: Any, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "survivors.ckpt")

    found = run_on_ranks(4, _go, lambda: NoLoCo(every=1), Saves(VICTIM, 2), 2.0, "mean", may_die=True)
    survivors = [found[rank] for rank in range(4) if rank != VICTIM]
    assert all(one["members"] == (0, 1, 3) for one in survivors)
    assert all(equal(one["weights"], survivors[0]["weights"]) for one in survivors)
    mean = open_checkpoint(tmp_path / "survivors.ckpt")
    assert equal(dict(mean), survivors[0]["weights"])
    assert len(list((tmp_path / "survivors.ckpt").glob("replica-*"))) == 3


@pytest.mark.parametrize("make", [lambda: DiLoCo(every=1), lambda: GossipAveraging("complete")])
def test_all_reduces_and_gossip_go_on_without_the_dead(make: Callable[[], Callback]) -> None:
    found = run_on_ranks(4, _go, make, Dies(VICTIM, 2), may_die=True)
    for rank in (0, 1, 3):
        assert found[rank]["steps"] == ROUNDS
    if isinstance(make(), DiLoCo):
        assert equal(found[0]["weights"], found[3]["weights"])
    else:
        assert found[0]["peers"] == [3, 3, 2, 2, 2, 2]


def test_validation_and_metrics_go_on_without_the_dead() -> None:
    options = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    found = run_on_ranks(4, lambda: _go(lambda: NoLoCo(every=1), Dies(VICTIM, 2), **options), may_die=True)
    assert not [found[rank] for rank in (0, 1, 3) if isinstance(found[rank], str)]
    assert [found[rank]["steps"] for rank in (0, 1, 3)] == [ROUNDS] * 3


def test_the_best_is_still_saved_after_a_death(tmp_path: Path) -> None:
    class Improves(TinyClassifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("falls", 10.0 - self.current_epoch, sync_dist=True)

    def go() -> str:
        warnings.filterwarnings("ignore", "rank .* is gone")
        saving = ModelCheckpoint(tmp_path, "{epoch}", monitor="falls", save_top_k=1)
        options = {"max_epochs": 3, "limit_val_batches": 1, "enable_checkpointing": True, "make": Improves}
        fit_replicas(3, [NoLoCo(every=1), Dies(1, 2), saving], {"patience": 0.5, "timeout": 6.0}, **options)
        return Path(saving.best_model_path).name

    assert run_on_ranks(3, go, may_die=True) == ["epoch=2.ckpt", None, "epoch=2.ckpt"]


def test_later_runs_go_on_without_the_dead(tmp_path: Path) -> None:
    def go() -> tuple[tuple[int, ...], int, list[Any]]:
        warnings.filterwarnings("ignore", "rank .* is gone|Using `DistributedSampler`")
        strategy = {"patience": 0.5, "timeout": 6.0, "final": "mean"}
        options = {"max_steps": 3, "max_epochs": -1, "limit_val_batches": 1}
        trainer = fit_replicas(3, [NoLoCo(every=1), Dies(1, 2)], strategy, **options)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        data, path = TinyData(), str(tmp_path / "end.ckpt")
        metrics = trainer.validate(trainer.lightning_module, datamodule=data, verbose=False)
        metrics += trainer.validate(trainer.lightning_module, datamodule=data, ckpt_path=path, verbose=False)
        again = fit_replicas(3, [NoLoCo(every=1)], strategy, **options)
        return again.strategy.ranks.members, again.global_step, metrics

    first, dead, last = run_on_ranks(3, go, may_die=True)
    assert dead is None
    assert first == last
    assert first[:2] == ((0, 2), 3)
    assert len(first[2]) == 2


def test_the_last_survivor_goes_on() -> None:
    class TwoDie(Dies):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_rank > 0 and trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def go() -> tuple[int, ...]:
        warnings.filterwarnings("ignore", "rank .* is gone")
        strategy = {"patience": 0.5, "timeout": 3.0, "final": "mean"}
        trainer = fit_replicas(3, [NoLoCo(every=1), TwoDie(1, 1)], strategy, max_steps=3, max_epochs=-1)
        return trainer.strategy.ranks.members

    assert run_on_ranks(3, go, may_die=True) == [(0,), None, None]


def test_of_two_ranks_the_one_that_comes_too_late_does_not_go_on_alone() -> None:
    def go() -> str:
        warnings.filterwarnings("ignore", "rank .* is gone")
        rank = int(os.environ["LOCAL_RANK"])
        dist.init_process_group("gloo", rank=rank, world_size=2)
        ranks = Ranks(rank, 2, timeout=0.3, patience=0.1)
        if rank == 1:
            dist.distributed_c10d._get_default_store().wait(["passed over"])
        try:
            ranks.assemble()
        except ReplicaLost as error:
            return str(error)
        finally:
            store = dist.distributed_c10d._get_default_store()
            store.set("passed over" if rank == 0 else "ended", "1")
            if rank == 0:  # it has the store
                store.wait(["ended"])
        return str(ranks.members)

    first, late = run_on_ranks(2, go)
    assert first == "(0,)"
    assert late == "rank 1 came more than 0.3 s late, and the others went on without it."


def test_a_late_rank_is_passed_over_once() -> None:
    found = run_on_ranks(4, _go, lambda: NoLoCo(every=1), Sleeps(VICTIM, 2, 5.0), 1.5)
    partner = next(group for group in random_groups(2, 4, 2) if VICTIM in group)
    for rank, one in enumerate(found):
        assert one["steps"] == ROUNDS
        assert one["peers"][2] == (0 if rank in partner else 1)
        assert one["members"] == (0, 1, 2, 3)
    assert found[VICTIM]["peers"][-1] in (0, 1)


def test_without_patience_a_dead_peer_is_an_error() -> None:
    found = run_on_ranks(4, _go, lambda: NoLoCo(every=1), Dies(VICTIM, 2), None, may_die=True)
    assert found[VICTIM] is None
    messages = [found[rank] for rank in range(4) if rank != VICTIM]
    assert all(isinstance(text, str) and text.startswith("ReplicaLost") for text in messages)
    assert any(f"exchanging weights with rank {VICTIM} failed" in text for text in messages)
    assert all("resume all from the last checkpoint" in text for text in messages)


def test_a_dead_store_is_told_of() -> None:
    found = run_on_ranks(4, _go, lambda: NoLoCo(every=1), Dies(0, 2), may_die=True)
    assert found[0] is None
    for text in found[1:]:
        assert isinstance(text, str)
        assert "Rank 0, which holds the store" in text


def test_all_killed_and_resumed_is_the_undisturbed_training(tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")

    class KillsAll(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    def go(*callbacks: Callback, ckpt: str | None = None) -> dict[str, torch.Tensor]:
        options = {"max_epochs": 4, "ckpt_path": ckpt}
        return weights_of(fit_replicas(3, [NoLoCo(every=3), *callbacks], **options).lightning_module)

    whole = run_on_ranks(3, go)
    assert run_on_ranks(3, go, Saves(), KillsAll(), may_die=True) == [None] * 3
    resumed = run_on_ranks(3, lambda: go(ckpt=str(tmp_path / "last.ckpt")))
    assert all(equal(one, other) for one, other in zip(whole, resumed, strict=True))
