"""LandscapeMonitor: its figures against those of the weights themselves, and trainings that do not notice it."""

import math
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchmetrics.classification import MulticlassAccuracy

import lightning_soup
from lightning_soup.callbacks import ExponentialAverage, LandscapeMonitor
from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.landscape import Objective, hessian_top_eigenvalues, hessian_trace
from tests.helpers.averages import FrozenFirst, TwoOptimizers, Unfreeze, loaders, values_of
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.cli import through_yaml
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

QUICK = {"max_steps": 6, "max_probes": 4, "batches": 2}


class Dropping(TinyClassifier):
    """Draws random numbers in training, has BatchNorm, and counts in training what validation counts too."""

    def __init__(self):
        super().__init__(batch_norm=True)
        self.net.insert(3, nn.Dropout(0.3))
        self.train_accuracy = MulticlassAccuracy(3, average="micro")

    def training_step(self, batch, batch_idx):
        self.train_accuracy(self.net(batch[0]), batch[1])
        self.log("train_acc", self.train_accuracy, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.train_accuracy.update(self.net(batch[0]), batch[1])  # a metric that both use
        return super().validation_step(batch, batch_idx)


class Seen(Callback):
    """What is logged by the end of each epoch, and the weights and state that it ends with."""

    def __init__(self):
        self.metrics, self.states = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_epoch_start(self, trainer, pl_module):
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_fit_end(self, trainer, pl_module):
        self.on_train_epoch_start(trainer, pl_module)
        self.metrics = self.metrics[1:]


def fit(monitor=None, module=None, *, data=None, epochs=2, ckpt_path=None, callbacks=(), loaders=(), **options):
    torch.manual_seed(5)
    module, seen = module() if module else TinyClassifier(), Seen()
    given = [*callbacks, *([] if monitor is None else [monitor]), seen]
    trainer = quiet_trainer(callbacks=given, max_epochs=epochs, **options)
    if loaders:
        trainer.fit(module, *loaders, ckpt_path=ckpt_path)
    else:
        trainer.fit(module, datamodule=data or TinyData(), ckpt_path=ckpt_path)
    return trainer, module, seen


def measured(module, batches, **options):
    objective = Objective.of_module(module, batches)
    top = hessian_top_eigenvalues(objective, max_steps=6, tolerance=0.01)
    trace = hessian_trace(objective, max_probes=4, min_probes=4, tolerance=0.05)
    return {
        "lambda_max": top.values[0],
        "lambda_max_error": top.errors[0],
        "trace": trace.value,
        "trace_error": trace.error,
        "loss": objective.value(),
    }


# ---------------------------------------------------------------------------------------------------------- figures


def test_figures_are_those_of_the_weights():
    start = values_of(fit(epochs=0)[1])
    monitor = LandscapeMonitor(**QUICK)
    trainer, _, seen = fit(monitor)
    for state, logged in zip(seen.states, seen.metrics, strict=True):
        module = TinyClassifier()
        module.load_state_dict(state)
        batches = list(TinyData().val_dataloader())[:2]
        weights = values_of(module)
        wanted = measured(module, batches) | {
            "norm": math.sqrt(sum(float(value.square().sum()) for value in weights.values())),
            "distance_from_start": math.sqrt(sum(float((weights[n] - start[n]).square().sum()) for n in start)),
        }
        got = {n.removeprefix("landscape/"): v for n, v in logged.items() if n.startswith("landscape/")}
        assert got == pytest.approx(wanted, rel=1e-5)
    assert monitor.figures == pytest.approx(wanted, rel=1e-5)
    assert trainer.callback_metrics["landscape/lambda_max"] > 0


def test_they_reach_the_loggers_and_can_be_monitored(tmp_path):
    logger = CSVLogger(tmp_path)
    kept = ModelCheckpoint(tmp_path, monitor="landscape/trace", mode="min", filename="{epoch}")
    _, _, seen = fit(LandscapeMonitor(**QUICK), callbacks=[kept], epochs=3, logger=logger, enable_checkpointing=True)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "landscape/lambda_max_error" in text.splitlines()[0]
    best = min(range(3), key=lambda epoch: seen.metrics[epoch]["landscape/trace"])
    assert kept.best_model_path.endswith(f"epoch={best}.ckpt")


@pytest.mark.parametrize(("options", "epochs"), [({"every_n_epochs": 2}, [1, 3]), ({"epochs": [0, 3]}, [0, 3])])
def test_only_some_epochs(options, epochs):
    class When(LandscapeMonitor):
        def _measured(self, trainer, module):
            times.append(trainer.current_epoch)
            return super()._measured(trainer, module)

    times = []
    fit(When(metrics=["norm"], **options), epochs=4)
    assert times == epochs


def test_only_some_figures_and_none_that_needs_data():
    _, _, seen = fit(LandscapeMonitor(metrics=["trace"], name="train", data="train", **QUICK))
    assert [name for name in seen.metrics[-1] if name.startswith("train/")] == ["train/trace", "train/trace_error"]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_weights_alone_need_no_data():
    monitor = LandscapeMonitor(metrics=["distance_from_start", "norm"])
    fit(monitor, loaders=[TinyData().train_dataloader()])
    assert set(monitor.figures) == {"distance_from_start", "norm"}


def test_the_barrier_to_the_weights_before():
    monitor = LandscapeMonitor(metrics=["loss"], previous=True, batches=4)
    _, _, seen = fit(monitor, lambda: TinyClassifier(batch_norm=True), epochs=3)
    assert "landscape/barrier" not in seen.metrics[0]
    batches = list(TinyData().val_dataloader())

    def loss(state):
        module = TinyClassifier(batch_norm=True)
        module.load_state_dict(state)
        return Objective.of_module(module, batches).value()

    for i in (1, 2):
        one, other = seen.states[i - 1 : i + 1]
        middle = {n: (one[n] + other[n]) / 2 if one[n].is_floating_point() else one[n] for n in one}
        wanted = loss(middle) - (loss(one) + loss(other)) / 2
        assert seen.metrics[i]["landscape/barrier"] == pytest.approx(wanted, abs=1e-6)


def test_the_batches_stay_the_same_for_shuffled_training_data():
    class Still(TinyClassifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    _, _, seen = fit(LandscapeMonitor(data="train", **QUICK), Still, epochs=3)
    first, *others = ({n: v for n, v in m.items() if "landscape/" in n} for m in seen.metrics)
    assert first["landscape/distance_from_start"] == 0
    assert all(other == first for other in others)
    monitor = LandscapeMonitor(data="train", **QUICK)
    fit(monitor, Still, epochs=1)
    assert monitor.figures == pytest.approx({n.removeprefix("landscape/"): v for n, v in first.items()})


def test_the_start_of_parameters_that_are_unfrozen_later():
    monitor = LandscapeMonitor(metrics=["distance_from_start", "norm"], previous=True, batches=1)
    _, module, seen = fit(monitor, FrozenFirst, callbacks=[Unfreeze()], epochs=3)
    start = values_of(fit(epochs=0, module=FrozenFirst)[1], frozen=True)
    end = values_of(module, frozen=True)
    wanted = math.sqrt(sum(float((end[name] - start[name]).square().sum()) for name in start))
    assert monitor.figures["distance_from_start"] == pytest.approx(wanted, rel=1e-6)
    assert seen.metrics[1]["landscape/norm"] > 1.1 * seen.metrics[0]["landscape/norm"]


def test_nan_is_logged_and_training_goes_on():
    class Diverges(TinyClassifier):
        def on_train_epoch_end(self):
            with torch.no_grad():
                self.net[0].weight.fill_(math.nan)

    with pytest.warns(UserWarning, match="logs NaN"):
        _, _, seen = fit(LandscapeMonitor(**QUICK), Diverges)
    assert math.isfinite(seen.metrics[0]["landscape/trace"])
    assert math.isnan(seen.metrics[1]["landscape/trace"])
    assert math.isnan(seen.metrics[1]["landscape/loss"])


# --------------------------------------------------------------------------------------------- training is unchanged


class WithGenerator(TinyData):
    """Its order of training comes from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def train_dataloader(self):
        sampler = RandomSampler(self.train, generator=self.generator)
        return DataLoader(self.train, 16, sampler=sampler, generator=self.generator)


class Half(MixedPrecision):
    """16-mixed on a processor, with a scaler that lets steps through."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))


class Compiled(TinyClassifier):
    """With a compiled part."""

    def __init__(self):
        super().__init__()
        self.net[0] = torch.compile(self.net[0], backend="eager")


WAYS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 4},
    "own generator": {"data": WithGenerator},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
    "16-mixed": {"plugins": Half},
    "two optimizers by hand": {"module": TwoOptimizers},
    "compiled part": {"module": Compiled},
    "accumulated, one batch of validation": {"accumulate_grad_batches": 3, "limit_val_batches": 1},
}


@pytest.mark.parametrize("data", ["val", "train"])
@pytest.mark.parametrize("way", [*WAYS, pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by the compiler
def test_training_is_the_same_to_the_bit(way, data):
    def train(monitor):
        whole = {"module": lambda: torch.compile(TinyClassifier(), backend="eager")}
        options = {"module": Dropping, **WAYS.get(way, whole)}
        options = {n: [v()] if n == "plugins" else v() if n == "data" else v for n, v in options.items()}
        average = ExponentialAverage(0.5)
        _, _, seen = fit(monitor, callbacks=[average], **options)
        return seen

    plain, watched = train(None), train(LandscapeMonitor(data=data, previous=True, **QUICK))
    for one, other in zip(plain.states, watched.states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    for one, other in zip(plain.metrics, watched.metrics, strict=True):
        own = {name: value for name, value in other.items() if not name.startswith("landscape/")}
        assert own == one  # the average's validation, and metrics of training, too
        assert math.isfinite(other["landscape/lambda_max"])


def test_gradients_modes_and_tensors_are_left_alone():
    class Looks(Callback):
        """Before the monitor."""

        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.net[2].eval()
            for parameter in pl_module.parameters():
                parameter.grad = torch.ones_like(parameter)
            self.held = [*pl_module.parameters(), *pl_module.buffers()]
            self.modes = [part.training for part in pl_module.modules()]
            self.stage = trainer.state.stage

    class LooksAgain(Callback):
        """After it."""

        def on_train_epoch_end(self, trainer, pl_module):
            held = [*pl_module.parameters(), *pl_module.buffers()]
            assert all(one is other for one, other in zip(looks.held, held, strict=True))
            assert all((parameter.grad == 1).all() for parameter in pl_module.parameters())
            assert looks.modes == [part.training for part in pl_module.modules()]
            assert looks.stage == trainer.state.stage
            assert pl_module.dtype == torch.bfloat16
            assert not pl_module.net[2].training

    looks = Looks()
    torch.manual_seed(0)
    callbacks = [looks, LandscapeMonitor(previous=True, **QUICK), LooksAgain()]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=2, precision="bf16-true")
    trainer.fit(Dropping(), datamodule=TinyData())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_figures_are_taken_in_thirty_two_bits(precision):
    _, _, seen = fit(LandscapeMonitor(**QUICK), precision=precision, epochs=1)
    module = TinyClassifier()
    module.load_state_dict(seen.states[0])  # which widens them
    wanted = measured(module, list(TinyData().val_dataloader())[:2])
    assert {name: seen.metrics[0][f"landscape/{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_transfer_hooks_see_validation():
    class Augments(TinyData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + torch.randn_like(batch[0]), batch[1]] if self.trainer.training else batch

    _, _, seen = fit(LandscapeMonitor(**QUICK), data=Augments(), epochs=1)
    module = TinyClassifier()
    module.load_state_dict(seen.states[0])
    wanted = measured(module, list(TinyData().val_dataloader())[:2])
    assert seen.metrics[0]["landscape/loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize("persistent", [False, True])
def test_loaders_with_workers(persistent):
    def train(monitor):
        data = TinyData()
        options = {"num_workers": 1, "persistent_workers": persistent}
        loaders = [DataLoader(data.train, 16, shuffle=True, **options), DataLoader(data.val, 16, **options)]
        return fit(monitor, loaders=loaders, epochs=2)[2]

    plain = train(None)
    for data in ("val", "train"):
        watched = train(LandscapeMonitor(data=data, metrics=["loss"], batches=1))
        for one, other in zip(plain.states, watched.states, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------- resume, two ranks


def test_a_resumed_fit_goes_on(tmp_path):
    def train(epochs, **options):
        return fit(LandscapeMonitor(previous=True, **QUICK), epochs=epochs, loaders=loaders(), **options)

    _, _, whole = train(4)
    trainer, _, _ = train(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["LandscapeMonitor(landscape)"]
    assert set(state["start"]) == set(dict(TinyClassifier().named_parameters()))
    _, _, rest = train(4, ckpt_path=tmp_path / "half.ckpt")
    assert rest.metrics == whole.metrics[2:]
    assert "landscape/barrier" in rest.metrics[0]


def test_a_checkpoint_without_its_state_is_told_of(tmp_path):
    trainer, _, _ = fit(None, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    monitor = LandscapeMonitor(metrics=["distance_from_start"])
    with pytest.warns(UserWarning, match="counts from here"):
        fit(monitor, epochs=2, ckpt_path=tmp_path / "one.ckpt")
    assert monitor.figures["distance_from_start"] > 0


def test_a_second_fit_begins_anew():
    monitor = LandscapeMonitor(metrics=["distance_from_start"], previous=True, batches=1)
    fit(monitor)
    _, _, seen = fit(monitor)
    assert "landscape/barrier" not in seen.metrics[0]
    first = LandscapeMonitor(metrics=["distance_from_start"])
    fit(first)
    assert monitor.figures["distance_from_start"] == first.figures["distance_from_start"]


class Gathers(TinyClassifier):
    """Its validation loss goes over all ranks."""

    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx)
        return self.all_gather(loss, sync_grads=True).mean()


def on_a_rank(watched, module):
    monitor = LandscapeMonitor(previous=True, **QUICK) if watched else None
    try:
        _, _, seen = fit(monitor, module, devices=2, strategy="ddp", num_sanity_val_steps=0)
    except LightningSoupError as error:
        return str(error)
    states = [{name: value.numpy() for name, value in state.items()} for state in seen.states]
    return states, [{n: v for n, v in metrics.items() if "landscape/" in n} for metrics in seen.metrics]


def test_two_ranks_train_as_without_and_log_the_same():
    (first, logged), (second, also) = run_on_two_ranks(on_a_rank, True, Dropping)
    plain, _ = run_on_two_ranks(on_a_rank, False, Dropping)[0]
    assert logged == also
    assert "landscape/barrier" in logged[1]
    for one, other, without in zip(first, second, plain, strict=True):
        weights = [name for name in one if name.endswith(("weight", "bias"))]
        assert all((one[name] == other[name]).all() and (one[name] == without[name]).all() for name in weights)


def test_a_loss_over_all_ranks_is_refused_on_both():
    assert all("self.all_gather" in told for told in run_on_two_ranks(on_a_rank, True, Gathers))


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options",
    [
        {"every_n_epochs": 0},
        {"batches": 0},
        {"max_steps": True},
        {"max_probes": 0},
        {"tolerance": 0.0},
        {"trace_tolerance": math.nan},
        {"epochs": []},
        {"epochs": [-1]},
        {"metrics": ["lambda"]},
        {"metrics": []},
        {"data": "test"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(UnsupportedSetup, match=rf"LandscapeMonitor\({next(iter(options))}="):
        LandscapeMonitor(**options)


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`", "ignore:Total length of"
)
def test_what_cannot_work_is_refused_before_training():
    class Silent(TinyClassifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)

    class Frozen(TinyClassifier):
        def training_step(self, batch, batch_idx):
            return None

        def __init__(self):
            super().__init__()
            self.requires_grad_(False)

    class Trains(Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("training began")

    def refused(match, monitor, module=TinyClassifier, error=UnsupportedSetup, **options):
        with pytest.raises(error, match=match):
            fit(monitor, module, callbacks=[Trains()], **options)

    refused("returned no loss", LandscapeMonitor(), Silent)
    refused("no val_dataloader", LandscapeMonitor(), loaders=[TinyData().train_dataloader()])
    empty = DataLoader(torch.utils.data.TensorDataset(torch.zeros(3, 8), torch.zeros(3).long()), 16, drop_last=True)
    refused("gave no batch", LandscapeMonitor(), loaders=[TinyData().train_dataloader(), empty])
    refused("measure nothing", LandscapeMonitor(every_n_epochs=3))
    refused("measure nothing", LandscapeMonitor(epochs=[2]))
    refused("no trainable parameter", LandscapeMonitor(), Frozen)
    trainer = quiet_trainer(strategy=ModelParallelStrategy())
    with pytest.raises(UnsupportedSetup, match="ModelParallelStrategy"):
        LandscapeMonitor().setup(trainer, TinyClassifier(), "fit")


def test_a_failure_while_measuring_is_named():
    class Breaks(TinyClassifier):
        def validation_step(self, batch, batch_idx):
            if self.trainer.current_epoch == 1 and torch.is_grad_enabled():
                raise ValueError("broken")
            return super().validation_step(batch, batch_idx)

    with pytest.raises(LightningSoupError, match=r"cannot measure epoch 1 \(ValueError: broken\)"):
        fit(LandscapeMonitor(**QUICK), Breaks)


def test_every_option_through_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train"])
    options = {
        "every_n_epochs": 3,
        "epochs": [1, 2],
        "metrics": ["trace", "norm"],
        "previous": True,
        "data": "train",
        "batches": 2,
        "max_steps": 5,
        "tolerance": 0.1,
        "max_probes": 7,
        "trace_tolerance": 0.2,
        "keep_graph": True,
        "seed": 4,
        "name": "sharpness",
    }
    for monitor in through_yaml(TinyClassifier, "lightning_soup.callbacks.LandscapeMonitor", options, tmp_path):
        own = vars(monitor) | vars(monitor._of_loss)
        assert {name: own[name] for name in options} == options
    assert lightning_soup.LandscapeMonitor is LandscapeMonitor


@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("barebones", [False, True])
def test_the_graph_can_be_kept_and_nothing_logged(keep_graph, barebones):
    monitor = LandscapeMonitor(keep_graph=keep_graph, **QUICK)
    options = {"barebones": True, "logger": None, "log_every_n_steps": None} if barebones else {}
    with pytest.warns(UserWarning, match="barebones") if barebones else nullcontext():
        fit(monitor, epochs=1, **options)
    other = LandscapeMonitor(keep_graph=not keep_graph, **QUICK)
    fit(other, epochs=1)
    assert monitor.figures == pytest.approx(other.figures, rel=1e-4)
