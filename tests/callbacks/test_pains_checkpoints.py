"""More ways in which averaging has failed people elsewhere: checkpoints, schedules, strategies and the cost of a step.

Named as in test_live_average_pains.py.
"""

import warnings
from itertools import product
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.nn.utils import parametrizations

from lightning_soup.callbacks import (
    EqualAverage,
    ExponentialAverage,
    LatestAverage,
    ModelSoup,
    WeightEnsemble,
    average_of_module,
)
from lightning_soup.cli.sweep_training import train_setting
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.recipes import GreedySoup, gather_ingredients
from tests.helpers.averages import assert_close, equal, exponential, fit, loaders, values_of
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.sweeps import base_config, write_yaml
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks


class BatchNormed(TinyClassifier):
    def __init__(self):
        super().__init__(batch_norm=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------- Lightning's averaging callbacks


class Told(TinyClassifier):
    """Its score by epoch is known beforehand: the two best epochs lie before the cut."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", {0: 0.9, 1: 0.2, 2: 0.8, 3: 0.1, 4: 0.3}.get(self.current_epoch, 0.0))


def test_l15_the_best_of_before_a_resume_is_still_the_best_after_it(tmp_path):
    def train(epochs, ckpt_path=None):
        kept = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_acc", mode="max", save_top_k=2, save_last=True)
        soup, average = ModelSoup(), ExponentialAverage(0.5, leave="live")
        options = {"epochs": epochs, "module": Told, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        fit([average, kept, soup], ckpt_path=ckpt_path, default_root_dir=tmp_path, **options)
        return kept, soup

    train(3)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("epoch=*.ckpt")}
    kept, soup = train(5, tmp_path / "last.ckpt")
    assert set(before) == {"epoch=0.ckpt", "epoch=2.ckpt"}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("epoch=*.ckpt")} == before
    assert kept.best_model_path.endswith("epoch=0.ckpt")
    assert float(kept.best_model_score) == pytest.approx(0.9)
    assert {item.name: item.metrics["val_acc"] for item in soup.soup.ingredients} == {
        "epoch=0": pytest.approx(0.9),
        "epoch=2": pytest.approx(0.8),
    }


@pytest.mark.parametrize("scheduled", [False, True])
def test_l19_averaging_schedule_and_recalibration_are_three_switches(scheduled):
    class Module(BatchNormed):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.3**epoch)
            return ([optimizer], [decay]) if scheduled else optimizer

    class Notes(Callback):
        def __init__(self):
            self.rates = []

        def on_train_batch_start(self, trainer, *_):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.variance = pl_module.net[1].running_var.clone()

    notes = Notes()
    _, _, plain = fit([notes], module=Module)
    assert notes.rates[::6] == pytest.approx([0.05, 0.015, 0.0045] if scheduled else [0.05] * 3)
    for buffers in ("copy", "recalibrate"):
        seen = Notes()
        trainer, module, trail = fit([EqualAverage(0, 2, buffers=buffers), seen], module=Module)
        assert all(same(a, b) for a, b in zip(trail, plain, strict=True))  # neither changes the training,
        assert (trainer.global_step, trainer.current_epoch) == (18, 3)  # nor its length,
        assert seen.rates == notes.rates  # nor its learning rate
        assert_close(module, equal({}, trail[2::2]))
        assert torch.equal(module.net[1].running_var, notes.variance) is (buffers == "copy")


# ----------------------------------------------------------------------------------------------------- Lightning's SWA

STARTS, STOPS, PERIODS = (12, "2 epochs", 0.5), (18, "3 epochs", "75%"), (3, "0.5 epochs", 0.125)


@pytest.mark.parametrize(("start", "stop", "every"), list(product(STARTS, STOPS, PERIODS)))
def test_s08_start_stop_and_period_are_steps_epochs_or_fractions(start, stop, every):
    average = EqualAverage(start, every, stop=stop)
    _, module, trail = fit(average, epochs=4)
    assert average.samples == 2
    assert_close(module, equal({}, [trail[15], trail[18]]))


class TwoOptimizers(TinyClassifier):
    """The second one steps every other time."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        self.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        first.step()
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[0].parameters(), 0.05), torch.optim.Adam(self.net[3].parameters(), 0.05)]


def test_s09_several_optimizers_are_averaged_and_souped(tmp_path):
    class Trails(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.of = [[], []]
            for trail, optimizer, layer in zip(
                self.of, trainer.optimizers, (pl_module.net[0], pl_module.net[3]), strict=True
            ):
                optimizer.register_step_post_hook(lambda *_, t=trail, n=layer: t.append(n.weight.detach().clone()))

    trails = Trails()
    _, module, _ = fit([EqualAverage(0, 2), trails], module=TwoOptimizers)
    assert [len(trail) for trail in trails.of] == [18, 9]
    for trail, layer in zip(trails.of, (module.net[0], module.net[3]), strict=True):
        torch.testing.assert_close(layer.weight.detach(), torch.stack(trail[1::2]).mean(0), atol=1e-6, rtol=0)
    soup = ModelSoup(last=2, dirpath=str(tmp_path))
    _, module, _ = fit([soup, trails], module=TwoOptimizers)
    for trail, layer in zip(trails.of, (module.net[0], module.net[3]), strict=True):
        ends = torch.stack(trail[len(trail) // 3 - 1 :: len(trail) // 3][1:])
        torch.testing.assert_close(layer.weight.detach(), ends.mean(0), atol=1e-6, rtol=0)


CALLBACKS = [EqualAverage, ExponentialAverage, LatestAverage, WeightEnsemble, lambda: ModelSoup(last=2)]


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
@pytest.mark.parametrize("make", CALLBACKS, ids=["swa", "ema", "lawa", "zscl", "soup"])
def test_s09_unsupported_strategies_are_named_before_training(make, strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy), callbacks=[], fast_dev_run=False)
    with pytest.raises(UnsupportedSetup, match=f"does not work with {strategy.__name__}"):
        make().setup(trainer, TinyClassifier(), "fit")


# ------------------------------------------------------------------------------------------------------- checkpoints


def train_with_step_saves(folder, soup):
    """A ModelCheckpoint that writes every second step, right before the validation of that step."""
    kept = ModelCheckpoint(folder, "{step}", monitor="val_loss", save_top_k=-1, every_n_train_steps=2)
    torch.manual_seed(1)
    options = {"max_epochs": 2, "val_check_interval": 2, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(callbacks=[kept, soup], default_root_dir=folder, **options)
    trainer.fit(TinyClassifier(), datamodule=TinyData())
    return ModuleEvaluator(TinyClassifier(), TinyData(), metric="val_loss", mode="min")


def test_c02_recipes_choose_by_scores_of_the_very_weights(tmp_path):
    soup = ModelSoup(GreedySoup())
    evaluator = train_with_step_saves(tmp_path, soup)
    real = {item.name: evaluator.score(item.weights) for item in soup.soup.ingredients}
    assert len(real) == 6
    first, *others = soup.soup.history
    assert first.label == max(real, key=real.get)
    assert first.score == pytest.approx(real[first.label])
    assert {trial.label: trial.values["alone"] for trial in others} == {
        name: pytest.approx(score) for name, score in real.items() if name != first.label
    }


@pytest.mark.parametrize("of", ["the soup of a fit", "files"])
def test_c02_the_score_of_a_step_save_is_not_that_of_the_validation_before(tmp_path, of):
    soup = ModelSoup()
    evaluator = train_with_step_saves(tmp_path, soup)
    pattern = str(tmp_path / "step=*.ckpt")
    ingredients = soup.soup.ingredients if of == "the soup of a fit" else gather_ingredients(pattern)
    assert len(ingredients) == 6
    for item in ingredients:
        real = -evaluator.score(item.weights)
        assert item.metrics.get("val_loss", real) == pytest.approx(real), item.name  # right, or not said at all


class ToldByStep(TinyClassifier):
    """Its score at each validation is known beforehand."""

    scores: ClassVar = {2: 0.5, 4: 0.1, 6: 0.4, 8: 0.6, 10: 0.7, 12: 0.8}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.scores.get(self.global_step, 1.0))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_c02_the_score_of_a_swept_run_is_that_of_its_checkpoint(tmp_path):
    options = {"filename": "{step}", "monitor": "val_loss", "save_top_k": 1, "every_n_train_steps": 2}
    saver = {"class_path": "ModelCheckpoint", "init_args": options}
    config = base_config(data={"batch_size": 8}, callbacks=[saver], val_check_interval=2, max_epochs=1)
    config["model"] = {"class_path": f"{__name__}.ToldByStep"}
    (tmp_path / "run").mkdir()
    trained = train_setting({}, tmp_path / "run", 0, base=write_yaml(tmp_path / "base.yaml", config))
    real = ToldByStep.scores[int(trained.checkpoint.stem.removeprefix("step="))]
    assert trained.metrics.get("val_loss", real) == pytest.approx(real)


# ---------------------------------------------------------------------------------------------------- other frameworks


def test_t04_buffers_that_are_not_averaged_are_never_stale():
    class Buffers(Callback):
        def __init__(self):
            self.trained, self.validated = [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.trained.append(pl_module.net[1].running_mean.clone())

        def on_validation_batch_start(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                self.validated.append(pl_module.net[1].running_mean.clone())

    buffers = Buffers()
    _, module, _ = fit([ExponentialAverage(0.9), buffers], module=BatchNormed)
    per_validation = len(buffers.validated) // 3
    for epoch in range(3):
        expected = buffers.trained[6 * epoch + 5]
        assert all(
            torch.equal(found, expected) for found in buffers.validated[per_validation * epoch :][:per_validation]
        )
    assert torch.equal(module.net[1].running_mean, buffers.trained[-1])
    assert len({tuple(found.tolist()) for found in buffers.trained}) == 18


PARAMETRIZATIONS = {
    "orthogonal": parametrizations.orthogonal,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
def test_t04_parametrized_modules_are_averaged(kind):
    class Parametrized(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.net[0] = PARAMETRIZATIONS[kind](self.net[0])

    class Outputs(Callback):
        """What the module computes in the last validation."""

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
            self.loss = (outputs.clone(), [t.clone() for t in batch])

    outputs = Outputs()
    _, module, trail = fit([ExponentialAverage(0.8), outputs], module=Parametrized)
    names = set(trail[0])
    assert len(names) >= 4
    assert_close(module, exponential(0.8, True)(trail[0], trail[1:]))
    other = Parametrized()
    other.load_state_dict(module.state_dict())
    loss, (x, y) = outputs.loss
    torch.testing.assert_close(nn.functional.cross_entropy(other.eval().net(x), y), loss)


def _average_on_a_rank(_):
    warnings.simplefilter("ignore")
    average = EqualAverage(0, 1, buffers="average")
    trainer, module, trail = fit(average, epochs=2, module=BatchNormed, devices=2, strategy="ddp", data=loaders(8))
    off = max(float((values_of(module)[n] - v).abs().max()) for n, v in equal({}, trail[1:]).items())
    return {name: value.numpy() for name, value in module.state_dict().items()}, off, trainer.world_size


def test_t10_ranks_end_with_one_average_weights_and_statistics(tmp_path):
    (first, off, ranks), (second, other_off, _) = run_on_two_ranks(_average_on_a_rank, None)
    assert ranks == 2
    assert max(off, other_off) < 2e-6
    assert {"net.0.weight", "net.1.running_mean", "net.1.running_var"} <= first.keys()
    for name, value in first.items():
        assert (value == second[name]).all(), name


class ManyTensors(TinyClassifier):
    """Forty tensors more."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*self.net[:3], *[nn.Linear(16, 16) for _ in range(20)], self.net[3])


@pytest.mark.parametrize(("every", "samples"), [(1, 12), (4, 3)])
def test_t11_an_update_is_one_fused_operation_planned_once_and_the_period_saves_updates(every, samples, monkeypatch):
    calls = {"fused": [], "planned": 0}
    fused, plan = torch._foreach_lerp_, average_of_module.select

    def count_fused(tensors, *args):
        calls["fused"].append(len(tensors))
        return fused(tensors, *args)

    def count_plans(*args):
        calls["planned"] += 1
        return plan(*args)

    monkeypatch.setattr(torch, "_foreach_lerp_", count_fused)
    monkeypatch.setattr(average_of_module, "select", count_plans)
    average = ExponentialAverage(0.5, every=every)
    fit(average, epochs=2, module=ManyTensors)
    assert average.samples == samples
    assert calls == {"fused": [44] * (samples - 1), "planned": 1}  # the first sample is copied
