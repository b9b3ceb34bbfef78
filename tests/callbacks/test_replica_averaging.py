"""NoLoCo, DiLoCo and gossip as callbacks on real processes, against the same training in one process."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_soup import DiLoCo, ExponentialAverage, GossipAveraging, NoLoCo, open_checkpoint
from lightning_soup.callbacks.replica_averaging import ReplicaAveraging
from lightning_soup.distributed.gossip import GossipStep
from lightning_soup.distributed.noloco import DiLoCoStep, NoLoCoStep
from lightning_soup.errors import NonFiniteWeights, UnreadableCheckpoint, UnsupportedSetup
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.cli import through_yaml
from tests.helpers.replicas import equal, fit_replicas, simulate, weights_of
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_ranks

normed = partial(TinyClassifier, batch_norm=True)


def _fit(world_size: int, make_callback: Callable[[], Callback], **options: Any) -> dict[str, Tensor]:
    warnings.filterwarnings("ignore", "GossipAveraging: all")
    callbacks = [make_callback(), *options.pop("callbacks", [])]
    return weights_of(fit_replicas(world_size, callbacks, **options).lightning_module)


@pytest.mark.parametrize(
    ("world_size", "make_callback", "step", "every"),
    [
        (4, lambda: NoLoCo(every=2), NoLoCoStep(), 2),
        (3, lambda: NoLoCo(every=1), NoLoCoStep(), 1),
        (4, lambda: NoLoCo(3, 0.3, 0.9, 0.5, group_size=3, seed=5), NoLoCoStep(0.3, 0.9, 0.5, 3, 5), 3),
        (4, lambda: GossipAveraging(every=2), GossipStep(), 2),
        (3, lambda: GossipAveraging([[0, 1], [1, 2]]), GossipStep([[0, 1], [1, 2]]), 1),
    ],
)
def test_ranks_do_what_one_process_does_bit_for_bit(
    world_size: int, make_callback: Callable[[], ReplicaAveraging], step: Any, every: int
) -> None:
    found = run_on_ranks(world_size, lambda: _fit(world_size, make_callback, make=normed, max_epochs=3))
    expected = simulate(world_size, step, every, 3, normed)
    assert all(equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not equal(found[0], found[1])


@pytest.mark.parametrize("momentum", ["heavy-ball", "nesterov"])
def test_diloco_reduces_over_all(momentum: str) -> None:
    found = run_on_ranks(3, lambda: _fit(3, lambda: DiLoCo(2, momentum=momentum), make=normed, max_epochs=3))
    expected = simulate(3, DiLoCoStep(momentum=momentum), 2, 3, normed)
    for one, other in zip(found, expected, strict=True):  # an all-reduce adds in an order of its own
        assert all(torch.allclose(one[name], value, atol=1e-6) for name, value in other.items())
    assert equal(found[0], found[1])  # the last step is an outer one


def test_steps_are_those_of_the_optimizer_under_accumulation() -> None:
    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    found = run_on_ranks(2, lambda: _fit(2, lambda: NoLoCo(every=2), **options))
    expected = simulate(2, NoLoCoStep(), 2, 3, accumulate=2)
    assert all(
        torch.allclose(one[name], value, atol=1e-6)
        for one, other in zip(found, expected, strict=True)
        for name, value in other.items()
    )


def _resumable(folder: Path, epochs: int, make_callback: Callable[[], Callback], ckpt: str | None) -> dict[str, Tensor]:
    saving = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    options = {"callbacks": [saving], "enable_checkpointing": True, "make": normed}
    return _fit(3, make_callback, max_epochs=epochs, ckpt_path=ckpt, **options)


@pytest.mark.parametrize(
    "make_callback", [lambda: NoLoCo(every=3), lambda: DiLoCo(every=3), lambda: GossipAveraging(every=3)]
)
def test_a_resumed_fit_goes_on_bit_for_bit(tmp_path: Path, make_callback: Callable[[], Callback]) -> None:
    whole = run_on_ranks(3, _resumable, tmp_path, 4, make_callback, None)
    resumed = run_on_ranks(3, _resumable, tmp_path, 4, make_callback, str(tmp_path / "epoch=1.ckpt"))
    assert all(equal(one, other) for one, other in zip(whole, resumed, strict=True))


class Observes(TinyClassifier):
    """Keeps the least input seen, which is infinite before there was one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.tensor(float("inf")))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.least.copy_(torch.minimum(self.least, batch[0].min()))
        return super().training_step(batch, batch_idx)


def test_a_buffer_that_was_infinite_in_the_beginning_can_be_resumed(tmp_path: Path) -> None:
    def go(epochs: int, ckpt: str | None = None) -> dict[str, Tensor]:
        options = {"callbacks": [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)], "enable_checkpointing": True}
        return _fit(2, lambda: NoLoCo(every=2), max_epochs=epochs, ckpt_path=ckpt, make=Observes, **options)

    whole = run_on_ranks(2, go, 2)
    resumed = run_on_ranks(2, go, 2, str(tmp_path / "epoch=0.ckpt"))
    assert all(equal(one, other) for one, other in zip(whole, resumed, strict=True))


def _message(function: Callable[[], Any]) -> str:
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    try:
        function()
    except (UnsupportedSetup, UnreadableCheckpoint, NonFiniteWeights) as error:
        return str(error)
    return "nothing"


def test_a_checkpoint_of_other_options_or_another_model_is_refused(tmp_path: Path) -> None:
    run_on_ranks(3, _resumable, tmp_path, 1, lambda: NoLoCo(every=3), None)
    path = str(tmp_path / "epoch=0.ckpt")
    for message in run_on_ranks(3, lambda: _message(lambda: _resumable(tmp_path, 2, lambda: NoLoCo(every=2), path))):
        assert "NoLoCo: the checkpoint is of a fit with" in message
        assert "'every': 3" in message

    def frozen() -> LightningModule:
        module = normed()
        module.net[0].bias.requires_grad_(False)
        return module

    def go() -> str:
        return _message(lambda: _fit(3, lambda: NoLoCo(every=3), make=frozen, max_epochs=2, ckpt_path=path))

    for message in run_on_ranks(3, go):
        assert "holds the state of other tensors" in message or "size" in message


class Overflow(Callback):
    """Lets the scaler pass over the second step of rank 1."""

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 1:
            pl_module.net[0].weight.grad.fill_(float("inf"))


class Rounds(Callback):
    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        averaging = next(one for one in trainer.callbacks if isinstance(one, ReplicaAveraging))
        self.found.append((trainer.global_step, averaging.round))


def test_a_step_that_the_scaler_passes_over_counts_on_all_ranks() -> None:
    def go() -> list[tuple[int, int]]:
        rounds = Rounds()
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
        fit_replicas(2, [NoLoCo(every=2), Overflow(), rounds], plugins=[plugin], max_epochs=2)
        return rounds.found

    first, second = run_on_ranks(2, go)
    assert first == second == [(step, step // 2) for step in range(1, 7)]


class TwoOptimizers(TinyClassifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[3].parameters(), 0.1)]


def test_with_several_optimizers_it_is_the_batch_that_counts() -> None:
    def go() -> list[tuple[int, int]]:
        rounds = Rounds()
        fit_replicas(2, [NoLoCo(every=2), rounds], make=TwoOptimizers, max_epochs=2)
        return rounds.found

    first, second = run_on_ranks(2, go)
    assert first == second == [(2 * batch, batch // 2) for batch in range(1, 7)]


@pytest.mark.parametrize("order", [0, 1])
def test_an_average_sees_the_weights_after_the_outer_step(tmp_path: Path, order: int) -> None:
    class Keep(Callback):
        """The weights at the end of each batch, when the outer step has been taken."""

        def __init__(self) -> None:
            self.found: list[Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            self.found.append(pl_module.net[0].weight.detach().clone())

    def go() -> bool:
        average, keep = ExponentialAverage(decay=0.5, warmup=False), Keep()
        callbacks = [NoLoCo(every=1), average]
        trainer = fit_replicas(2, [*(callbacks[::-1] if order else callbacks), keep], max_epochs=1)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        found = open_checkpoint(tmp_path / "end.ckpt", which=trainer.global_rank)["net.0.weight"]
        expected = keep.found[0]
        for weight in keep.found[1:]:
            expected = 0.5 * expected + 0.5 * weight
        return torch.allclose(found, expected, atol=1e-6)

    assert run_on_ranks(2, go) == [True, True]


def test_compiled_layers_are_averaged_as_others_are() -> None:
    def compiled() -> LightningModule:
        module = TinyClassifier()
        module.net = torch.compile(module.net, backend="eager")
        return module

    found = run_on_ranks(2, lambda: _fit(2, lambda: NoLoCo(every=2), make=compiled))
    plain = run_on_ranks(2, lambda: _fit(2, lambda: NoLoCo(every=2)))
    for one, other in zip(found, plain, strict=True):
        assert equal({name.replace("_orig_mod.", ""): value for name, value in one.items()}, other)


def test_half_precision_weights_have_slow_ones_in_float32() -> None:
    def go() -> tuple[set[torch.dtype], torch.dtype, dict[str, Tensor]]:
        callback = NoLoCo(every=1)
        trainer = fit_replicas(2, [callback], precision="bf16-true")
        state = callback.state_dict()["state"]
        return {tensor.dtype for tensor in state.values()}, trainer.lightning_module.net[0].weight.dtype, state

    (slow, fast, one), (_, _, other) = run_on_ranks(2, go)
    assert (slow, fast) == ({torch.float32}, torch.bfloat16)
    assert torch.equal(one["phi"], other["phi"])  # of two replicas


def test_figures_are_logged() -> None:
    def go() -> dict[str, float]:
        callback = GossipAveraging("complete", variance_correction=True)
        warnings.filterwarnings("ignore", "GossipAveraging: all")
        trainer = fit_replicas(3, [callback], max_steps=2)
        return {name: float(value) for name, value in trainer.logged_metrics.items()}

    figures = run_on_ranks(3, go)[2]
    assert figures["GossipAveraging/peers"] == 2
    assert figures["GossipAveraging/factor_mean"] == pytest.approx(1, abs=0.05)
    assert figures["GossipAveraging/sent_MB"] == pytest.approx(2 * 2 * 195 * 4 / 1e6)
    assert figures["GossipAveraging/moved"] > 0


def test_related_replicas_are_told_that_nothing_is_corrected() -> None:
    def go() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit_replicas(2, [GossipAveraging()], max_steps=2)
        return [str(one.message) for one in caught]

    assert any("the correction of variances does nothing" in text for text in run_on_ranks(2, go)[0])


def test_nan_is_not_sent() -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 1:
                with torch.no_grad():
                    pl_module.net[0].weight[0, 0] = float("nan")

    messages = run_on_ranks(2, lambda: _message(lambda: fit_replicas(2, [NoLoCo(every=2), Breaks()], max_steps=4)))
    assert all("net.0.weight holds NaN or an infinite value, which was not sent" in text for text in messages)


def test_parameters_that_are_unfrozen_in_training_are_refused() -> None:
    class Unfreezes(Callback):
        def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
            pl_module.net[0].bias.requires_grad_(False)

        def on_train_epoch_start(self, trainer: Any, pl_module: LightningModule) -> None:
            pl_module.net[0].bias.requires_grad_(trainer.current_epoch == 1)

    messages = run_on_ranks(2, lambda: _message(lambda: fit_replicas(2, [NoLoCo(every=2), Unfreezes()], max_epochs=3)))
    assert all("frozen or unfrozen since training began" in text for text in messages)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [NoLoCo(alpha=0.9)], "drift apart"),
        (lambda: [NoLoCo(), DiLoCo()], "both average"),
        (lambda: [GossipAveraging("regular", degree=4)], "no graph of 3 replicas"),
    ],
)
def test_what_cannot_work_is_refused_before_training(callbacks: Callable[[], list], message: str) -> None:
    found = run_on_ranks(3, lambda: _message(lambda: fit_replicas(3, callbacks())))
    assert all(message in text for text in found)


def test_one_device_or_another_strategy_is_refused() -> None:
    trainer = quiet_trainer(callbacks=[NoLoCo()], max_epochs=1)
    with pytest.raises(UnsupportedSetup, match="the strategy is SingleDeviceStrategy"):
        trainer.fit(TinyClassifier(), datamodule=TinyData())
    assert "there is one replica" in run_on_ranks(1, lambda: _message(lambda: fit_replicas(1, [NoLoCo()])))[0]


@pytest.mark.parametrize(
    "make", [lambda: NoLoCo(every=0), lambda: NoLoCo(beta=-1), lambda: GossipAveraging(beta=2), lambda: DiLoCo(alpha=1)]
)
def test_options_out_of_range_are_refused(make: Callable[[], Callback]) -> None:
    with pytest.raises(UnsupportedSetup, match="expected"):
        make()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("NoLoCo", {"every": 7, "alpha": 0.3, "beta": 0.9, "gamma": 0.4, "group_size": 3, "seed": 2}),
        ("DiLoCo", {"every": 9, "alpha": 0.9, "momentum": "nesterov"}),
        ("GossipAveraging", {"topology": [[0, 1], [1, 2]], "every": 3, "beta": None, "chunks": {"*.qkv.weight": 3}}),
        ("GossipAveraging", {"topology": "regular", "degree": 3, "target": "mix", "exclude": ["head.*"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter")
def test_options_survive_yaml(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    built = through_yaml(TinyClassifier, f"lightning_soup.callbacks.{name}", options, tmp_path)
    assert len(built) == 2
    for one in built:
        assert {option: getattr(one, option) for option in options} == options
