"""One callback or one file in several calls of a Trainer: what an average is worth after its fit."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_soup.callbacks import ExponentialAverage, LatestAverage, WeightEnsemble
from tests.helpers.averages import Trail, assert_close, equal, exponential, fit, loaders, values_of, with_start
from tests.helpers.boring import TinyClassifier
from tests.helpers.trainers import quiet_trainer

MAKE = {
    "ema": (lambda **o: ExponentialAverage(0.7, **o), exponential(0.7, True)),
    "lawa": (lambda **o: LatestAverage(4, every=1, **o), lambda start, taken: equal(start, taken[-4:])),
    "zscl": (lambda **o: WeightEnsemble(every=1, **o), with_start),
}
every_rule = pytest.mark.parametrize(("make", "mean"), MAKE.values(), ids=MAKE)
both = pytest.mark.parametrize("leave", ["average", "live"])


class WithTest(TinyClassifier):
    """Keeps the weights that it was tested with."""

    def test_step(self, batch, batch_idx):
        self.tested = values_of(self)


def assert_holds(trainer, module, average, live, leave, path):
    """The module as it is left after a fit, both halves in a file, and the average in a test."""
    assert_close(module, average if leave == "average" else live)
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    assert_close(content["state_dict"], average)
    assert_close(content["current_model_state"], live, atol=0)
    trainer.test(module, loaders()[1], verbose=False)  # a warning would be an error
    assert_close(module.tested, average)


@both
@every_rule
def test_a_second_fit_with_nothing_left_to_train_keeps_the_average(make, mean, leave, tmp_path):
    average = make(leave=leave)
    trainer, module, trail = fit(average, module=WithTest)
    trainer.fit(module, *loaders())
    assert average.samples == 18
    assert_holds(trainer, module, mean(trail[0], trail[1:]), trail[-1], leave, tmp_path / "x.ckpt")


@both
@every_rule
def test_a_fit_that_is_resumed_at_its_end_ends_as_it_did(make, mean, leave, tmp_path):
    trainer, _, trail = fit(make(leave=leave), module=WithTest)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    average = make(leave=leave)
    trainer, module, _ = fit(average, module=WithTest, seed=99, ckpt_path=tmp_path / "x.ckpt")
    assert average.samples == 18
    assert_holds(trainer, module, mean(trail[0], trail[1:]), trail[-1], leave, tmp_path / "y.ckpt")
    trainer.fit(module, *loaders(), ckpt_path=tmp_path / "x.ckpt")  # in the same Trainer, too
    assert_holds(trainer, module, mean(trail[0], trail[1:]), trail[-1], leave, tmp_path / "y.ckpt")


@both
def test_a_second_fit_that_fails_before_it_trains_keeps_the_average(leave, tmp_path):
    class Fail(Callback):
        failing = False

        def on_sanity_check_start(self, trainer, pl_module):
            if self.failing:
                raise RuntimeError("no such device")

    average, fail = ExponentialAverage(0.7, leave=leave), Fail()
    trainer, module, trail = fit([average, fail], module=WithTest)
    fail.failing = True
    with pytest.raises(RuntimeError, match="no such device"):
        trainer.fit(module, *loaders())
    assert_holds(trainer, module, MAKE["ema"][1](trail[0], trail[1:]), trail[-1], leave, tmp_path / "x.ckpt")


def test_a_fit_of_another_module_with_nothing_left_to_train_has_no_average():
    average = ExponentialAverage(0.7)
    trainer, _, _ = fit(average)
    other = TinyClassifier()
    before = values_of(other)
    trainer.fit(other, *loaders())
    assert average.samples == 0
    assert_close(other, before, atol=0)


@both
def test_a_file_is_tested_without_a_word_whatever_was_left_in_the_module(leave, tmp_path):
    keep = ModelCheckpoint(tmp_path, "best", monitor="val_loss", mode="max")
    average = ExponentialAverage(0.7, leave=leave)
    trainer, module, trail = fit(average, module=WithTest, callbacks=[keep], enable_checkpointing=True)
    best = torch.load(keep.best_model_path, weights_only=True)["global_step"]
    trainer.test(module, loaders()[1], ckpt_path="best", verbose=False)  # a warning would be an error
    expected = exponential(0.7, True)(trail[0], trail[1 : best + 1])
    assert best < 18
    assert_close(module.tested, expected)
    trainer.test(module, loaders()[1], verbose=False)  # which goes by what the module was given
    assert_close(module.tested, expected)


@both
def test_a_fit_that_is_interrupted_by_hand_leaves_an_average_to_test_and_save(leave, tmp_path):
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 3):
                raise KeyboardInterrupt

    module, trail = WithTest(), Trail()
    average = ExponentialAverage(0.7, leave=leave)
    trainer = quiet_trainer(max_epochs=3, callbacks=[average, trail, Interrupt()])
    with pytest.raises(SystemExit):
        trainer.fit(module, *loaders())
    assert len(trail.weights) == 10
    expected = exponential(0.7, True)(trail.weights[0], trail.weights[1:])
    trainer.test(module, loaders()[1], verbose=False)  # a warning would be an error
    assert_close(module.tested, expected)
    assert_holds(trainer, module, expected, trail.weights[-1], "live", tmp_path / "x.ckpt")
    module.load_state_dict(WithTest().state_dict())  # as after any fit
    with pytest.warns(UserWarning, match="changed after its fit"):
        trainer.test(module, loaders()[1], verbose=False)
    assert_close(module.tested, values_of(module), atol=0)


def test_a_ring_is_formed_in_inference_mode_and_goes_on_in_training(tmp_path):
    class Save(Callback):
        @torch.inference_mode()
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step % 5 == 1:
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    _, _, trail = fit([LatestAverage(4, every=1), Save()], precision="bf16-true")
    for step in (1, 6, 11, 16):
        content = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        assert_close(content["state_dict"], equal({}, trail[1 : step + 1][-4:]), atol=2e-3)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_an_average_that_ends_with_its_processes_is_said_before_training(strategy):
    trainer = quiet_trainer(strategy=strategy, devices=2)
    for average in (ExponentialAverage(0.7), ExponentialAverage(0.7, evaluate_on=["validate"], leave="live")):
        average.setup(trainer, TinyClassifier(), "fit")  # a warning would be an error
    with pytest.warns(UserWarning, match="average with them.*leave='average'"):
        ExponentialAverage(0.7, leave="live").setup(trainer, TinyClassifier(), "fit")
