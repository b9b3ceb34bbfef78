"""Details of live averages that the tests of their whole behaviour do not see."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_soup.callbacks import EqualAverage, ExponentialAverage, LatestAverage, WeightEnsemble
from lightning_soup.callbacks.averaged_tensors import is_captured
from lightning_soup.callbacks.shadow import LatestMean, RunningMean
from lightning_soup.callbacks.steps import OptimizerSteps
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.threads import one_thread
from tests.helpers.averages import (
    EveryWeight,
    FrozenFirst,
    TwoOptimizers,
    Unfreeze,
    assert_close,
    equal,
    exponential,
    fit,
    loaders,
    values_of,
    with_start,
)
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

# ---------------------------------------------------------------------------------------------------------------- steps


class Mask(Callback):
    """Prunes a row after each step, as a listener that mutates."""

    def on_fit_start(self, trainer, pl_module):
        self.steps, self.module = OptimizerSteps.of(trainer), pl_module
        self.steps.listen(self, self.apply, phase="mutate")

    @torch.no_grad()
    def apply(self, optimizer):
        self.module.net[0].weight[0] = 0

    def teardown(self, trainer, pl_module, stage):
        self.steps.stop(self)


@pytest.mark.parametrize("first", [True, False])
def test_averages_see_what_masks_have_done_whatever_the_order_of_callbacks(first):
    average = EqualAverage(start=0, every=1)
    _, module, _ = fit([Mask(), average] if first else [average, Mask()])
    assert not module.net[0].weight[0].any()


def test_steps_that_are_taken_to_save_the_state_of_an_optimizer_are_none():
    class Stateless(TinyClassifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    class Save(Callback):
        stepped = 0

        def save(self, trainer, pl_module, *_):
            pl_module.zero_grad()
            optimizer = trainer.optimizers[0]
            hook = optimizer.register_step_post_hook(self.count)
            get_optimizer_state_dict(pl_module, optimizer)
            hook.remove()

        def count(self, *_):
            self.stepped += 1

        on_train_batch_end = on_train_epoch_start = on_train_epoch_end = save

    average, save = EqualAverage(start=0, every=1), Save()
    fit([average, save], module=Stateless)
    assert save.stepped == 18 + 3 + 3
    assert average.samples == 18


class InHook(TinyClassifier):
    """Optimized by hand, with steps in a hook."""

    def __init__(self, hook):
        super().__init__()
        self.automatic_optimization = False
        setattr(self, hook, self.take_step)

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))

    def take_step(self, *_):
        self.optimizers().step()
        self.zero_grad()


@pytest.mark.parametrize(
    ("hook", "steps"),
    [("on_train_batch_start", 18), ("on_train_batch_end", 18), ("on_train_epoch_end", 3), ("on_validation_end", 3)],
)
def test_steps_in_other_hooks_than_training_step_are_samples(hook, steps):
    class Primed(InHook):
        def on_train_start(self):
            self.training_step(TinyData().train[:16], 0)  # gradients for a step before the first batch

    average = EqualAverage(start=0, every=1)
    with pytest.warns(UserWarning, match="step counter stood still"):
        _, module, trail = fit(average, module=lambda: Primed(hook), num_sanity_val_steps=0)
    assert average.samples == steps
    assert_close(module, equal({}, trail[1:]))


def test_a_step_while_the_module_holds_the_average_is_an_error():
    class Both(InHook):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.take_step()

    with pytest.raises(UnsupportedSetup, match=r"ema: an optimizer took a step in validation.*Step in a"):
        fit(ExponentialAverage(0.7), module=lambda: Both("on_validation_epoch_end"))


@pytest.mark.parametrize("leave", ["average", "live"])
def test_a_step_after_the_end_of_training_is_a_change_by_the_user(leave):
    class Last(TinyClassifier):
        def on_train_end(self):
            self.before = values_of(self)
            self.trainer.optimizers[0].step()

    trainer, module, trail = fit(ExponentialAverage(0.7, leave=leave), module=Last)
    average = exponential(0.7, True)(trail[0], trail[1:19])
    assert_close(module.before, average if leave == "average" else trail[18])
    assert trainer.callbacks[0].samples == 18


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
def test_the_time_of_a_step_between_epochs_is_known(hook):
    # At the start of epoch 1 one epoch is over, at its end two.
    average = EqualAverage(start="1 epochs", every=1)
    with pytest.warns(UserWarning, match="step counter stood still"):
        _, module, trail = fit(average, module=lambda: InHook(hook))
    first = 3 if hook.endswith("start") else 2
    assert_close(module, equal({}, trail[first:]))


def test_optimizers_that_are_made_anew_are_followed():
    class Anew(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.optimizers = [torch.optim.SGD(pl_module.parameters(), lr=0.01)]

    average = EqualAverage(start=0, every=1)
    fit([Anew(), average])
    assert average.samples == 18


# ------------------------------------------------------------------------------------------------------------- schedule


def test_fractions_miss_no_tick_for_rounding():
    average = EqualAverage(start=0, every=0.1)
    fit(average, epochs=2, limit_train_batches=5)
    assert average.samples == 10


@pytest.mark.parametrize(
    ("start", "options", "first"),
    [(0.5, {"epochs": None, "max_steps": 10}, 6), (0.5, {"max_steps": 9}, 5), ("75%", {}, 14), (0.75, {}, 14)],
)
def test_fractions_are_of_whatever_ends_first_and_gate_exactly(start, options, first):
    _, module, trail = fit(EqualAverage(start=start, every=1), **options)
    assert_close(module, equal(trail[0], trail[first:]))


def test_epochs_of_unknown_length_end_with_their_last_batch():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TinyData().train)

    data = [DataLoader(Stream(), 16), loaders()[1]]
    _, module, trail = fit(EqualAverage(start="1 epochs"), data=data)
    assert_close(module, equal(trail[0], [trail[12], trail[18]]))


@pytest.mark.parametrize(("start", "batches"), [(0.5, 5), (0.25, 3), (0.0, 0)])
def test_a_fraction_of_max_steps_is_of_the_steps_of_all_optimizers(start, batches):
    class After(Callback):
        def on_train_start(self, trainer, pl_module):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights.append(values_of(pl_module))

    # 20 steps are 10 of each optimizer. Half of them is over after the 5th of each; of the 3rd ones, the first
    # optimizer's is the 5th of all, which is where a quarter is over, and the 6th of all.
    _, module, _ = fit([EqualAverage(start=start, every=1), after := After()], module=TwoOptimizers, max_steps=20)
    assert len(after.weights) == 10
    expected = equal({}, after.weights[batches:])
    if start == 0.25:
        second = equal({}, after.weights[2:])
        expected |= {name: value for name, value in second.items() if name.startswith("net.3.")}
    assert_close(module, expected)


def test_windows_of_accumulation_that_change_count_in_the_length_of_training():
    # 6 steps in the first epoch, 1 in each of the others.
    options = {"epochs": 3, "callbacks": [GradientAccumulationScheduler({0: 1, 1: 6})]}
    with pytest.raises(UnsupportedSetup, match="training ends before that, after 8 steps"):
        fit(ExponentialAverage(0.5, start=8), **options)
    with pytest.raises(UnsupportedSetup, match=r"start=1.5 epochs\): training ends before that, after 1.5 epochs"):
        fit(
            ExponentialAverage(0.5, start="1.5 epochs"),
            callbacks=[GradientAccumulationScheduler({0: 2, 1: 3})],
            max_steps=4,
        )
    average = EqualAverage(start=7, every=1)
    fit(average, **options)
    assert average.samples == 1


def test_start_in_epochs_after_max_steps_is_refused():
    with pytest.raises(UnsupportedSetup, match="training ends before that"):
        fit(ExponentialAverage(0.5, start="2 epochs"), max_steps=5)


def test_a_trial_run_is_not_refused_for_its_length():
    with pytest.warns(UserWarning, match="before start=100 steps"):
        fit(ExponentialAverage(0.5, start=100), fast_dev_run=2)


def test_a_weight_ensemble_by_epochs_samples_the_first_step_too():
    _, module, trail = fit(WeightEnsemble(every="1 epochs"))
    assert_close(module, with_start(trail[0], [trail[step] for step in (1, 6, 12, 18)]))


def test_weights_that_have_not_moved_are_no_sample_again():
    average = EqualAverage(start=0, every="0.25 epochs")
    fit(average, accumulate_grad_batches=6)
    assert average.samples == 3


# ---------------------------------------------------------------------------------------------------------- the tensors


def test_averages_are_kept_on_the_device_that_is_asked_for():
    for shadow in (RunningMean(torch.device("meta")), LatestMean(2, torch.device("meta"))):
        shadow.absorb([torch.ones(2)], 1.0)
        shadow.settle()
        assert shadow.tensors[0].device.type == "meta"


def test_a_restored_ring_knows_its_window():
    ring = LatestMean(3)
    ring.restore([[torch.ones(1)], [torch.zeros(1)]])
    assert ring.window == 2


def test_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread([torch.ones(1)]):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_ring_grows_by_a_layer_that_is_unfrozen():
    with pytest.warns(UserWarning, match="trainable since now"):
        _, module, _ = fit([Unfreeze(), LatestAverage(10, every=1), every := EveryWeight()], module=FrozenFirst)
    assert_close(module, equal(every.weights[0], every.weights[-10:]))


def test_parameters_added_to_the_optimizer_within_an_epoch_are_averaged():
    class Frozen(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[3].parameters(), lr=0.05)

    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                pl_module.net[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters())})

    average = ExponentialAverage(0.5)
    with pytest.warns(UserWarning, match="trainable since now"):
        fit([Unfreeze(), average], module=Frozen, epochs=1)
    assert {slot.name for group in average._average.groups for slot in group.slots} >= {"net.0.weight", "net.0.bias"}


class Shared(TinyClassifier):
    """Two parameters in the same memory, as some converters leave them, and one that is used in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = nn.Parameter(self.first.weight.data)
        self.third = self.first

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((self.second(self.first(self.third(x))), y), batch_idx)


def test_memory_that_parameters_share_stays_shared_and_live():
    _, module, trail = fit(ExponentialAverage(0.5, leave="live"), module=Shared)
    assert_close(module, trail[-1], atol=0)
    _, module, _ = fit(ExponentialAverage(0.5), module=Shared)
    assert module.first.weight.data_ptr() == module.second.weight.data_ptr()


def test_memory_that_something_else_holds_is_written_and_not_exchanged():
    class Held(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.held = [self.net[0].weight.detach()]

        def validation_step(self, batch, batch_idx):
            assert torch.equal(self.held[0], self.net[0].weight)
            return super().validation_step(batch, batch_idx)

    _, module, trail = fit(ExponentialAverage(0.5), module=Held)
    assert_close(module, exponential(0.5, True)(trail[0], trail[1:]))
    assert torch.equal(module.held[0], module.net[0].weight)


def test_tied_parameters_are_averaged_once():
    class Tied(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.again = self.net[3]

    average = ExponentialAverage(0.5)
    fit(average, module=Tied)
    assert sum(len(group.slots) for group in average._average.groups) == 4


class Counts(Metric):
    """A metric with a saved floating-point buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(1))

    def update(self): ...

    def compute(self): ...


def test_buffers_of_metrics_and_those_that_are_not_saved_stay_live():
    class Buffered(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.counts = Counts()
            self.register_buffer("passing", torch.zeros(1), persistent=False)

        def training_step(self, batch, batch_idx):
            self.counts.total += 1
            self.passing += 1
            return super().training_step(batch, batch_idx)

    _, module, _ = fit(EqualAverage(start=0, every=1, buffers="average"), module=Buffered)
    assert module.counts.total == module.passing == 18


def test_buffers_go_to_the_first_optimizer_that_moves_averaged_tensors():
    class Two(TwoOptimizers):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def take_steps(self, optimizers, batch_idx):
            self.seen += 1
            super().take_steps(optimizers, batch_idx)

    average = EqualAverage(start=0, every=1, buffers="average", exclude=["net.0.*"])
    _, module, _ = fit(average, module=Two)
    assert float(module.seen) == pytest.approx(9.5)


def test_one_part_that_diverged_leaves_no_average_in_the_others():
    class Two(TwoOptimizers):
        def take_steps(self, optimizers, batch_idx):
            if (self.current_epoch, batch_idx) == (1, 5):
                self.net[3].weight.grad.fill_(float("nan"))
            super().take_steps(optimizers, batch_idx)

    class Live(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weight = pl_module.net[0].weight.detach().clone()

    module, live = Two(), Live()
    trainer = quiet_trainer(max_epochs=3, callbacks=[EqualAverage(start=0, every=1), live])
    with pytest.raises(NonFiniteWeights, match=r"net\.3\.weight"):
        trainer.fit(module, *loaders())
    assert torch.equal(module.net[0].weight, live.weight)


def test_values_that_are_copied_in_and_out_are_no_change_by_the_user():
    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.seen = values_of(pl_module)

    trainer, module, trail = fit([ExponentialAverage(0.7, leave="live"), look := Look()], precision="bf16-true")
    for _ in range(2):  # a warning would be an error
        look.seen = None
        trainer.validate(module, loaders()[1], verbose=False)
        assert_close(look.seen, exponential(0.7, True)(trail[0], trail[1:]), atol=2e-3)


def test_compiled_modules_on_a_gpu_may_have_recorded_addresses():
    plain, compiled = TinyClassifier(), TinyClassifier()
    compiled.net[0].compile(backend="eager")
    assert is_captured(compiled, torch.device("cuda"))
    assert not is_captured(plain, torch.device("cuda"))
    assert not is_captured(compiled, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------- diagnostics


@pytest.mark.parametrize(
    ("average", "window"),
    [(EqualAverage(start=0, every=1), 18), (LatestAverage(3, every=1), 3), (WeightEnsemble(every=1), 19)],
)
def test_windows_are_exact(average, window):
    trainer, _, _ = fit(average)
    assert float(trainer.callback_metrics[f"{average.name}/effective_window"]) == pytest.approx(window)


def test_the_window_goes_on_after_a_resume(tmp_path):
    trainer, _, _ = fit(EqualAverage(start=0, every=1), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer, _, _ = fit(EqualAverage(start=0, every=1), epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert float(trainer.callback_metrics["swa/effective_window"]) == pytest.approx(18)


def test_the_distance_is_relative_to_the_live_weights():
    trainer, module, trail = fit(ExponentialAverage(0.7))
    live = torch.cat([value.flatten() for value in trail[-1].values()])
    average = torch.cat([value.flatten() for value in values_of(module).values()])
    expected = float((live - average).norm() / live.norm())
    assert float(trainer.callback_metrics["ema/relative_distance"]) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------- files


def load(path):
    return torch.load(path, weights_only=True)


def test_a_file_written_after_the_fit_leaves_the_average_in_the_module(tmp_path):
    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.seen = values_of(pl_module)

    trainer, module, trail = fit([ExponentialAverage(0.7), look := Look()])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer.validate(module, loaders()[1], verbose=False)
    for weights in (look.seen, values_of(module)):
        assert_close(weights, exponential(0.7, True)(trail[0], trail[1:]))


def test_a_file_is_about_the_weights_that_the_module_was_given_after_the_fit(tmp_path):
    trainer, module, _ = fit(ExponentialAverage(0.7))
    other = TinyClassifier()
    module.load_state_dict(other.state_dict())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = load(tmp_path / "x.ckpt")
    assert_close(content["state_dict"], values_of(other), atol=0)
    assert "current_model_state" not in content


def test_halves_that_are_copied_in_turn_are_both_right_in_files(tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    _, _, trail = fit([ExponentialAverage(0.7), Save()], precision="bf16-true")
    content = load(tmp_path / "x.ckpt")
    assert_close(content["current_model_state"], trail[-1], atol=0)
    assert_close(content["state_dict"], exponential(0.7, True)(trail[0], trail[1:]), atol=2e-3)


def test_weights_only_files_of_a_validation_hold_the_average(tmp_path):
    class Hasty(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)

    _, _, trail = fit([ExponentialAverage(0.7), Hasty()])
    assert_close(load(tmp_path / "x.ckpt")["state_dict"], exponential(0.7, True)(trail[0], trail[1:]))


def test_the_sanity_check_of_a_resumed_run_is_on_the_average(tmp_path):
    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            if trainer.sanity_checking:
                self.seen = values_of(pl_module)

    trainer, _, trail = fit(ExponentialAverage(0.7), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit([ExponentialAverage(0.7), look := Look()], epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert_close(look.seen, exponential(0.7, True)(trail[0], trail[1:]))


def test_the_average_that_the_module_holds_is_first_in_files_though_nothing_was_scored_on_it(tmp_path):
    trainer, _, trail = fit(ExponentialAverage(0.7, evaluate_on=[], leave="average"))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = load(tmp_path / "x.ckpt")
    assert_close(content["state_dict"], exponential(0.7, True)(trail[0], trail[1:]))
    assert_close(content["current_model_state"], trail[-1], atol=0)


def test_an_average_of_another_name_is_not_gone_on_with(tmp_path):
    trainer, _, _ = fit(ExponentialAverage(0.7, name="a"), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    average = EqualAverage(start=0, every=1, name="b")
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        _, module, trail = fit(average, epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert average.samples == 6
    assert_close(module, equal(trail[0], trail[1:]))


def test_samples_of_lightnings_callbacks_count_for_a_weight_ensemble(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    theirs = EMAWeightAveraging(decay=0.5, update_every_n_steps=1)
    fit([theirs], epochs=2, callbacks=[keep], enable_checkpointing=True)
    before = int(load(tmp_path / "epoch=1.ckpt")["averaging_state"]["n_averaged"])
    average = WeightEnsemble(every=1)
    with pytest.warns(UserWarning, match="EMAWeightAveraging"):
        fit([average], epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert average.samples == before + 6


def test_files_are_tested_with_what_validation_scored(tmp_path):
    class Tested(TinyClassifier):
        def test_step(self, batch, batch_idx):
            self.tested = values_of(self)

    trainer, _, trail = fit(ExponentialAverage(0.7), module=Tested)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = quiet_trainer(callbacks=[ExponentialAverage(0.7)])
    again.test(module := Tested(), loaders()[1], ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert_close(module.tested, exponential(0.7, True)(trail[0], trail[1:]))


# -------------------------------------------------------------------------------------------------------- recalibration


class Normed(TinyClassifier):
    """With BatchNorm, a metric over the training epoch, and dropout in training."""

    def __init__(self):
        super().__init__(batch_norm=True)
        self.net[2] = nn.Dropout(0.1)
        self.train_accuracy = MulticlassAccuracy(3, average="micro")
        self.scored, self.epochs = 0, []

    def training_step(self, batch, batch_idx):
        self.train_accuracy.update(self.net(batch[0]), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.epochs.append(float(self.train_accuracy.compute()))
        self.train_accuracy.reset()

    def validation_step(self, batch, batch_idx):
        self.scored += 1
        return super().validation_step(batch, batch_idx)


def shuffled(**options):
    data = TinyData()
    return [DataLoader(data.train, 16, shuffle=True, **options), DataLoader(data.val, 16)]


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["", "workers"])
def test_recalibration_touches_neither_randomness_nor_metrics_nor_loaders_in_use(options):
    average = EqualAverage(start=0, every=1, buffers="recalibrate")
    _, module, trail = fit(average, module=Normed, data=shuffled(**options), val_check_interval=0.5)
    _, other, plain = fit([], module=Normed, data=shuffled(**options), val_check_interval=0.5)
    assert_close(trail[-1], plain[-1], atol=0)
    assert module.epochs == other.epochs


def test_recalibration_takes_as_many_batches_as_asked_for_and_none_after_the_fit():
    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.mean = pl_module.net[1].running_mean.clone()

    average = EqualAverage(start=0, every=1, buffers="recalibrate", recalibrate_batches=2, leave="live")
    trainer, module, _ = fit([average, look := Look()], module=Normed, num_sanity_val_steps=0)
    assert module.scored == 3 * (4 + 2)
    scored = look.mean
    trainer.validate(module, loaders()[1], verbose=False)
    assert module.scored == 3 * (4 + 2) + 4
    assert torch.equal(look.mean, scored)
    assert not torch.equal(module.net[1].running_mean, scored)


# --------------------------------------------------------------------------------------------------------------- advice


@pytest.mark.parametrize(
    ("options", "planned"),
    [({}, 60), ({"every": 3}, 20), ({"start": 0.5}, 30), ({"start": "5 epochs", "every": 2}, 15)],
)
def test_a_decay_too_long_is_measured_by_the_samples_that_will_be_taken(options, planned):
    near = 1 - 10 / max(planned, 20)
    with pytest.warns(UserWarning, match=f"only {planned} are planned.*A decay near {near:.3g} would"):
        fit(ExponentialAverage(0.999, **options), epochs=10)


def test_live_scores_are_logged_at_the_steps_of_other_metrics():
    class Steps(DummyLogger):
        def __init__(self):
            super().__init__()
            self.seen = {}

        def log_metrics(self, metrics, step):
            for name in metrics:
                self.seen.setdefault(name, []).append(step)

    logger = Steps()
    fit(ExponentialAverage(0.7, score_live=True), module=TwoOptimizers, logger=logger)
    assert logger.seen["ema/live_val_loss"] == logger.seen["val_loss"]


# ----------------------------------------------------------------------------------------------------------- two ranks


class Running(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def training_step(self, batch, batch_idx):
        self.mean = 0.5 * self.mean + 0.5 * batch[0].mean(0)
        return super().training_step(batch, batch_idx)


def _average_buffers(folder):
    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.scored = pl_module.mean.clone()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"devices": 2, "strategy": DDPStrategy(broadcast_buffers=False), "data": loaders(8)}
        average = EqualAverage(start=0, every=1, buffers="average", leave="live")
        fit([average, look := Look()], module=Running, num_sanity_val_steps=0, **options)
    return look.scored.numpy()


def test_ranks_score_the_same_averaged_buffers(tmp_path):
    first, second = run_on_two_ranks(_average_buffers, str(tmp_path))
    assert (first == second).all()
