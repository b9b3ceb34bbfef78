"""Averages where training is cut, changed or taken up again in odd ways."""

import gc

import numpy
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.nn.utils import prune

from lightning_soup.callbacks import EqualAverage, ExponentialAverage, LatestAverage, WeightEnsemble
from lightning_soup.errors import UnsupportedSetup
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
from tests.helpers.boring import TinyClassifier
from tests.helpers.trainers import quiet_trainer

MEAN = "net.1.running_mean"


def load(path):
    return torch.load(path, weights_only=True)


class BatchNormed(TinyClassifier):
    def __init__(self):
        super().__init__(batch_norm=True)


class Statistics(Callback):
    """Notes the running mean where it is live, where it is scored, and after an exception."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.live = pl_module.net[1].running_mean.clone()

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.scored = pl_module.net[1].running_mean.clone()

    def on_exception(self, trainer, pl_module, exception):
        self.after = pl_module.net[1].running_mean.clone()


@pytest.mark.parametrize("leave", ["average", "live"])
def test_files_hold_recalibrated_statistics_in_one_half_and_live_ones_in_the_other(leave, tmp_path):
    seen, keep = Statistics(), ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    average = EqualAverage(start=0, every=2, buffers="recalibrate", leave=leave)
    options = {"module": BatchNormed, "callbacks": [keep], "enable_checkpointing": True}
    trainer, _, _ = fit([average, seen], **options)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    content, after = load(tmp_path / "epoch=2.ckpt"), load(tmp_path / "after.ckpt")
    assert torch.equal(content["state_dict"][MEAN], seen.scored)
    assert not torch.equal(seen.scored, seen.live)
    assert torch.equal(content["current_model_state"][MEAN], seen.live)
    assert torch.equal(after["current_model_state"][MEAN], seen.live)


def test_resumed_runs_go_on_with_the_recalibrated_statistics(tmp_path):
    trainer, _, _ = fit(EqualAverage(start=0, every=2, buffers="recalibrate"), module=BatchNormed, epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    class Look(Callback):
        first = None

        def on_train_batch_end(self, trainer, *_):
            if self.first is None:  # before any validation
                trainer.save_checkpoint(tmp_path / "y.ckpt")
                self.first = load(tmp_path / "y.ckpt")["state_dict"][MEAN]

    average = EqualAverage(start=0, every=2, buffers="recalibrate")
    fit([average, look := Look()], module=BatchNormed, ckpt_path=tmp_path / "x.ckpt", num_sanity_val_steps=0)
    assert torch.equal(look.first, load(tmp_path / "x.ckpt")["state_dict"][MEAN])


def test_live_weights_are_in_files_written_after_training_in_half_precision(tmp_path):
    trainer, module, trail = fit(ExponentialAverage(0.7), precision="bf16-true")
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = load(tmp_path / "x.ckpt")
    assert_close(content["current_model_state"], trail[-1], atol=0)
    assert_close(content["state_dict"], values_of(module), atol=0)


def test_files_written_in_validation_hold_both_halves_in_half_precision(tmp_path):
    class Hasty(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            self.scored = values_of(pl_module)
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    _, _, trail = fit([ExponentialAverage(0.7), hasty := Hasty()], precision="bf16-true")
    content = load(tmp_path / "x.ckpt")
    assert_close(content["current_model_state"], trail[-1], atol=0)
    assert_close(content["state_dict"], hasty.scored, atol=0)


def test_weights_only_files_hold_recalibrated_statistics(tmp_path):
    seen = Statistics()
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=True)
    average = EqualAverage(start=0, every=2, buffers="recalibrate")
    fit([average, seen], module=BatchNormed, callbacks=[keep], enable_checkpointing=True)
    assert torch.equal(load(tmp_path / "epoch=2.ckpt")["state_dict"][MEAN], seen.scored)


def test_an_exception_in_recalibration_restores_the_live_statistics():
    class Failing(BatchNormed):
        calls = 0

        def validation_step(self, batch, batch_idx):
            self.calls += self.global_step == 12
            if self.calls == 3:  # while training batches pass: they are the first of this validation
                raise RuntimeError("out of memory")
            return super().validation_step(batch, batch_idx)

    seen = Statistics()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit([EqualAverage(start=0, every=2, buffers="recalibrate"), seen], module=Failing)
    assert torch.equal(seen.after, seen.live)


@pytest.mark.parametrize("stop", ["1.5 epochs", 8, 0.5])
def test_nothing_is_sampled_after_stop_at_ends_of_epochs(stop):
    average = EqualAverage(start=0, every="1 epochs", stop=stop)
    _, module, trail = fit(average)
    assert average.samples == 1
    assert_close(module, trail[6])


def test_a_file_written_after_other_weights_came_is_about_those(tmp_path):
    trainer, module, _ = fit(ExponentialAverage(0.7, leave="live"))
    other = TinyClassifier()
    module.load_state_dict(other.state_dict())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert_close(load(tmp_path / "x.ckpt")["state_dict"], values_of(other), atol=0)


def test_a_layer_exchanged_after_the_fit_is_scored_as_it_is():
    class Look(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.weight = pl_module.net[3].weight.clone()

    trainer, module, _ = fit([ExponentialAverage(0.7, leave="live"), look := Look()])
    module.net[3] = nn.Linear(16, 3)
    with pytest.warns(UserWarning, match="changed after its fit"):
        trainer.validate(module, loaders()[1], verbose=False)
    assert torch.equal(look.weight, module.net[3].weight)


def test_weights_only_files_written_after_the_fit_hold_the_average(tmp_path):
    trainer, _, trail = fit(ExponentialAverage(0.7, leave="live"))
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert_close(load(tmp_path / "x.ckpt")["state_dict"], exponential(0.7, True)(trail[0], trail[1:]))


def test_numbers_of_numpy_leave_no_trace_in_files(tmp_path):
    trainer, _, _ = fit(ExponentialAverage(numpy.float64(0.7), warmup=False))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    load(tmp_path / "x.ckpt")


def test_a_weight_ensemble_has_its_start_where_the_file_is_of_another_average(tmp_path):
    trainer, _, _ = fit(ExponentialAverage(0.7), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    average = WeightEnsemble(every=2)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        _, module, trail = fit(average, epochs=4, ckpt_path=tmp_path / "x.ckpt")
    assert average.samples == 6
    assert_close(module, with_start(trail[0], trail[1::2]))


def test_a_trainer_is_used_again_after_an_exception():
    class Fail(Callback):
        batches = 0

        def on_train_batch_start(self, *_):
            self.batches += 1
            if self.batches == 8:
                raise RuntimeError("interrupted")

    average = ExponentialAverage(0.7)
    trainer = quiet_trainer(max_epochs=3, callbacks=[average, Fail()])
    module = TinyClassifier()
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(module, *loaders())
    del module
    gc.collect()
    trainer.fit(TinyClassifier(), *loaders())
    assert average.samples == 12


@pytest.mark.parametrize("rule", [EqualAverage, LatestAverage])
def test_a_layer_that_a_later_callback_unfreezes_is_averaged_from_its_first_step(rule):
    average = rule(start=0, every=1) if rule is EqualAverage else rule(18, every=1)
    with pytest.warns(UserWarning, match=r"trainable since now.*net\.0\.weight"):
        _, module, _ = fit([average, Unfreeze(), everything := EveryWeight()], module=FrozenFirst)
    assert_close(module, {n: sum(w[n] for w in everything.weights) / 18 for n in everything.weights[0]})


@pytest.mark.filterwarnings("ignore:.*trainable since now", "ignore:Checkpoint directory")
@pytest.mark.parametrize("make", [lambda: EqualAverage(start=0, every=1), lambda: LatestAverage(20, every=1)])
def test_resume_is_bit_exact_where_a_layer_is_still_frozen_when_it_begins(make, tmp_path):
    def run(**options):
        keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        options |= {"callbacks": [keep], "enable_checkpointing": True, "module": FrozenFirst, "epochs": 4}
        return fit([Unfreeze(), make()], **options)[1].state_dict()

    whole, resumed = run(), run(ckpt_path=tmp_path / "epoch=1.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


class WithBackbone(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(8, 8)

    def training_step(self, batch, batch_idx):
        return super().training_step((self.backbone(batch[0]), batch[1]), batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore:.*trainable since now", "ignore:Checkpoint directory")
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_what_is_frozen_again_where_a_run_is_resumed_keeps_its_samples(epoch, tmp_path):
    """Lightning's BackboneFinetuning does not thaw the backbone again that it had thawed before the file."""

    def run(**options):
        keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
        tune = BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_ratio_lr=1.0, initial_denom_lr=1.0)
        given = [tune, EqualAverage(start=0, every=1), everything := EveryWeight()]
        options |= {"callbacks": [keep], "enable_checkpointing": True, "module": WithBackbone}
        _, module, _ = fit(given, **options)
        return module, everything.weights

    module, before = run()
    assert_close(values_of(module, frozen=True), equal({}, before))
    module, after = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert_close(values_of(module, frozen=True), equal({}, [*before[: 6 * (epoch + 1)], *after]))


def test_frozen_tensors_may_be_left_out():
    fit(ExponentialAverage(0.7, exclude=["net.0.*"]), module=FrozenFirst)


@pytest.mark.parametrize("leave", ["average", "live"])
def test_a_module_that_was_pruned_before_is_averaged_under_its_masks(leave):
    class Pruned(TinyClassifier):
        def __init__(self):
            super().__init__()
            prune.l1_unstructured(self.net[0], "weight", amount=0.5)

        def validation_step(self, batch, batch_idx):
            result = super().validation_step(batch, batch_idx)
            self.scored = self.net[0].weight.clone()
            return result

    _, module, trail = fit(ExponentialAverage(0.7, leave=leave), module=Pruned)
    mean = exponential(0.7, True)(trail[0], trail[1:])
    mask = module.net[0].weight_mask
    assert float(mask.mean()) == 0.5
    torch.testing.assert_close(module.scored.double(), mean["net.0.weight_orig"] * mask, atol=1e-6, rtol=0)
    assert_close(module, mean if leave == "average" else trail[-1])


def test_lazy_layers_are_named():
    class Lazy(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.LazyLinear(16)

    with pytest.raises(UnsupportedSetup, match=r"net\.0\.weight has no shape yet"):
        fit(ExponentialAverage(0.7), module=Lazy)


def test_lazy_buffers_are_named_where_they_are_averaged():
    class Lazy(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.net[1] = nn.LazyBatchNorm1d(affine=False)

    with pytest.raises(UnsupportedSetup, match=r"net\.1\.running_mean has no shape yet"):
        fit(ExponentialAverage(0.7, buffers="average"), module=Lazy)
    fit(ExponentialAverage(0.7), module=Lazy)


def test_complex_parameters_are_averaged():
    class Complex(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.ones(8, dtype=torch.complex64))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (batch[0] * self.phase).abs().mean()

    class Phases(Callback):
        def on_train_start(self, trainer, pl_module):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen.append(pl_module.phase.detach().clone())

    module = Complex()
    trainer = quiet_trainer(max_epochs=3, callbacks=[EqualAverage(start=0, every=1), phases := Phases()])
    trainer.fit(module, *loaders())
    torch.testing.assert_close(module.phase.detach(), sum(phases.seen) / 18)


def test_a_smaller_k_keeps_the_latest_samples_of_the_file(tmp_path):
    trainer, _, first = fit(LatestAverage(4, every=1), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    average = LatestAverage(2, every=1)
    _, module, trail = fit(average, epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert_close(module, equal(first[0], trail[-2:]))
    assert trainer.callbacks[0].samples == 12
    assert len(average._average.groups[0].shadow.samples) == 2


def test_another_rule_does_not_go_on_with_what_it_cannot_read(tmp_path):
    trainer, _, _ = fit(LatestAverage(4, every=1, name="mine"), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="'mine' is of LatestAverage, which EqualAverage cannot go on with"):
        _, module, trail = fit(EqualAverage(start=0, every=1, name="mine"), epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert_close(module, equal(trail[0], trail[1:]))


def test_start_in_steps_counts_those_before_a_resume_without_the_callback(tmp_path):
    trainer, _, _ = fit([], epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    average = EqualAverage(start=14, every=1)
    _, module, trail = fit(average, epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert average.samples == 4
    assert_close(module, equal(trail[0], trail[3:]))


def test_an_optimizer_that_was_never_sampled_is_named():
    class Two(TwoOptimizers):
        def take_steps(self, optimizers, batch_idx):
            super().take_steps(optimizers[: 2 if batch_idx == 0 else 1], batch_idx)

    with pytest.warns(UserWarning, match=r"never sampled.*net\.3\.weight"):
        fit(EqualAverage(start=0, every=4), module=Two)


def test_stop_before_start_in_another_unit_is_refused():
    with pytest.raises(UnsupportedSetup, match="stop must come after start"):
        fit(ExponentialAverage(0.7, start="2 epochs", stop=5))


def test_a_decay_too_long_is_named_for_averages_by_epochs_too():
    with pytest.warns(UserWarning, match="looks back over 1,000 samples, but only 3 are planned"):
        fit(ExponentialAverage(0.999, every="1 epochs"))


def test_live_scores_are_those_of_validation_alone():
    class Own(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            self.log("of_the_average", 1.0)

    trainer, _, _ = fit([ExponentialAverage(0.7, score_live=True), Own()])
    live = {name for name in trainer.callback_metrics if "live_" in name}
    assert live == {"ema/live_val_acc", "ema/live_val_loss"}


def test_a_file_written_while_others_hold_the_weights_has_both_halves(tmp_path):
    class Hold(Callback):
        """Refers to all weights, so that none is exchanged, and saves while the average stands in their place."""

        def on_validation_start(self, trainer, pl_module):
            self.kept = [parameter.detach() for parameter in pl_module.parameters()]

        def on_validation_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1 and not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                self.average = values_of(pl_module)

        def on_train_epoch_end(self, trainer, pl_module):
            self.live = values_of(pl_module)

    hold = Hold()
    fit([hold, ExponentialAverage(0.8)], epochs=2)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    for name, value in hold.average.items():
        assert torch.equal(content["state_dict"][name].double(), value)
        assert torch.equal(content["current_model_state"][name].double(), hold.live[name])
        assert not torch.equal(value, hold.live[name])
