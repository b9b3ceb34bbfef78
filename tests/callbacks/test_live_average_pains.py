"""How averaging has failed people elsewhere, one test for each: none of it happens here.

The names (L: Lightning's averaging callbacks, S: its SWA, C: checkpoints and configs, T: other frameworks, F: found by
trying) are those of public reports that were read or run before these callbacks were written.
"""

import copy
import pickle

import lightning.pytorch.callbacks as lightning_callbacks
import open_clip
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_soup.callbacks as ours
from lightning_soup.callbacks import EqualAverage, ExponentialAverage, LatestAverage, LiveAverage
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.weights import open_checkpoint
from tests.helpers.averages import (
    ROWS,
    EveryWeight,
    FrozenFirst,
    Trail,
    Unfreeze,
    assert_close,
    exponential,
    fit,
    loaders,
    values_of,
)
from tests.helpers.boring import TinyClassifier
from tests.helpers.trainers import quiet_trainer


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Spy(Callback):
    """Notes the weights that the module holds in hooks."""

    def __init__(self):
        self.seen = []

    def _note(self, where, trainer, module):
        if not trainer.sanity_checking:
            self.seen.append((where, values_of(module)))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self._note("validation", trainer, pl_module)

    def on_test_batch_start(self, trainer, pl_module, *_):
        self._note("test", trainer, pl_module)

    def on_predict_batch_start(self, trainer, pl_module, *_):
        self._note("predict", trainer, pl_module)

    def last(self, where):
        return [weights for name, weights in self.seen if name == where][-1]


class BatchNormed(TinyClassifier):
    def __init__(self):
        super().__init__(batch_norm=True)


# ------------------------------------------------------------------------------------- Lightning's averaging callbacks


def test_l01_without_any_update_the_module_keeps_its_weights_and_the_reason_is_said():
    class StopEarly(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    average = EqualAverage(start="2 epochs", every=9)
    with pytest.warns(UserWarning, match="6 steps after start were fewer than every=9 steps"):
        _, module, trail = fit([average, StopEarly()], epochs=4)
    assert same(values_of(module), trail[-1])


def test_l01_until_the_first_update_validation_is_on_the_live_weights():
    spy = Spy()
    _, _, trail = fit([ExponentialAverage(0.5, start="2 epochs"), spy])
    assert same(spy.seen[0][1], trail[6])
    assert_close(spy.last("validation"), exponential(0.5, True)(trail[0], trail[13:]))


def test_l02_live_weights_are_in_files_written_after_training(tmp_path):
    trainer, _, trail = fit(EqualAverage(start=0))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_close(load(tmp_path / "after.ckpt")["current_model_state"], trail[-1], atol=0)


@pytest.mark.parametrize("leave", ["average", "live"])
def test_l03_test_and_predict_use_the_average_too(leave):
    spy = Spy()
    average = ExponentialAverage(0.7, leave=leave)
    trainer, module, trail = fit([average, spy])
    expected = exponential(0.7, True)(trail[0], trail[1:])
    trainer.predict(module, loaders()[1])
    assert_close(spy.last("predict"), expected)
    trainer.validate(module, loaders()[1], verbose=False)
    assert_close(spy.last("validation"), expected)
    assert_close(module, expected if leave == "average" else trail[-1], atol=2e-6)


def test_l03_a_stage_that_is_not_asked_for_sees_the_live_weights():
    spy = Spy()
    trainer, module, trail = fit([ExponentialAverage(0.7, leave="live", evaluate_on=["predict"]), spy])
    assert same(spy.last("validation"), trail[-1])
    trainer.predict(module, loaders()[1])
    assert_close(spy.last("predict"), exponential(0.7, True)(trail[0], trail[1:]))


def test_l04_the_module_is_never_built_by_us():
    class Counting(TinyClassifier):
        calls = 0

        def configure_model(self):
            self.calls += 1

    _, module, _ = fit(ExponentialAverage(0.5), module=Counting)
    assert module.calls == 1


def test_l06_tensors_are_paired_by_name_and_a_changed_shape_is_an_error():
    class Growing(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[0], pl_module.net[3] = nn.Linear(8, 20), nn.Linear(20, 3)

    with pytest.raises(UnsupportedSetup, match=r"net\.0\.weight had the shape \[16, 8\].* is now of shape \[20, 8\]"):
        fit([ExponentialAverage(0.5), Growing()])


def test_l06_a_layer_that_is_unfrozen_later_is_averaged_from_then_on():
    everything = EveryWeight()
    with pytest.warns(UserWarning, match=r"trainable since now.*net\.0\.weight"):
        _, module, _ = fit([Unfreeze(), EqualAverage(start=0, every=1), everything], module=FrozenFirst)
    mean = {n: sum(w[n] for w in everything.weights) / 18 for n in everything.weights[0]}
    assert_close(module, mean)


class Buffers(TinyClassifier):
    """Has a buffer of each kind: a count, a switch, a mask of −inf, and a moving mean of the inputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("switch", torch.tensor(False))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("mean", torch.zeros(8))

    def training_step(self, batch, batch_idx):
        self.count += 1
        self.switch = ~self.switch
        self.mean = 0.5 * self.mean + 0.5 * batch[0].mean(0)  # another tensor each time, as people write it
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_l07_t12_buffers_that_are_no_finite_floats_are_copied(buffers):
    class Means(Callback):
        def __init__(self):
            self.means = []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.means.append(pl_module.mean.double().clone())

    means = Means()
    _, module, _ = fit([EqualAverage(start=0, every=1, buffers=buffers), means], module=Buffers)
    assert int(module.count) == 18
    assert module.switch.dtype == torch.bool
    assert torch.equal(module.mask, torch.full((2, 2), -torch.inf).triu(1))
    expected = means.means[-1] if buffers == "copy" else sum(means.means) / 18
    torch.testing.assert_close(module.mean.double(), expected, atol=1e-6, rtol=0)


def test_l08_files_of_lightnings_own_callbacks_are_resumed(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    theirs = EMAWeightAveraging(decay=0.5, update_every_n_steps=1)
    fit([theirs], epochs=2, callbacks=[keep], enable_checkpointing=True)
    content = load(tmp_path / "epoch=1.ckpt")
    average = ExponentialAverage(0.5, warmup=False)
    with pytest.warns(UserWarning, match="EMAWeightAveraging"):
        _, module, trail = fit([average], epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_close(trail[0], {n: v.double() for n, v in content["current_model_state"].items()}, atol=0)
    expected = {n: v.double() for n, v in content["state_dict"].items()}
    for weights in trail[1:]:
        expected = {n: 0.5 * expected[n] + 0.5 * weights[n] for n in weights}
    assert_close(module, expected)


def test_l08_ours_are_resumed_by_lightnings_own_callbacks(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit([ExponentialAverage(0.5)], epochs=2, callbacks=[keep], enable_checkpointing=True)
    content = load(tmp_path / "epoch=1.ckpt")
    with pytest.warns(UserWarning, match="current_model_state"):
        _, _, trail = fit([EMAWeightAveraging(decay=0.5)], epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_close(trail[0], {n: v.double() for n, v in content["current_model_state"].items()}, atol=0)


class ByHand(TinyClassifier):
    """Several optimizers, stepped at different rates."""

    def __init__(self, raw=False, rates=(1, 2)):
        super().__init__()
        self.automatic_optimization = False
        self.raw, self.rates, self.seen = raw, rates, 0
        self.extra = nn.Parameter(torch.zeros(3))

    def training_step(self, batch, batch_idx):
        self.seen += 1
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x) + self.extra, y)
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer, rate in zip(optimizers, self.rates, strict=True):
            if self.seen % rate == 0:
                optimizer.step()

    def configure_optimizers(self):
        parts = [self.net[0].parameters(), self.net[3].parameters(), [self.extra]]
        return [torch.optim.SGD(part, lr=0.05) for part in parts[: len(self.rates)]]


class EachTrail(Callback):
    def on_fit_start(self, trainer, pl_module):
        self.trails = [[] for _ in trainer.optimizers]
        self.hooks = [
            optimizer.register_step_post_hook(
                lambda opt, *_, i=i: self.trails[i].append(
                    [p.detach().double().clone() for group in opt.param_groups for p in group["params"]]
                )
            )
            for i, optimizer in enumerate(trainer.optimizers)
        ]

    def teardown(self, trainer, pl_module, stage):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("rates", [(1, 2), (1, 1), (1, 2, 3)])
@pytest.mark.parametrize("raw", [False, True])
def test_l09_l10_each_optimizer_has_its_own_steps(rates, raw):
    trails, average = EachTrail(), EqualAverage(start=0, every=2)
    options = {"module": lambda: ByHand(raw, rates), "callbacks": [trails]}
    if raw:
        with pytest.warns(UserWarning, match="step counter stood still"):
            trainer, _, _ = fit(average, **options)
    else:
        trainer, _, _ = fit(average, **options)
    for optimizer, trail, rate in zip(trainer.optimizers, trails.trails, rates, strict=True):
        taken = trail[1::2]
        assert len(taken) == 18 // rate // 2
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(held):
            mean = sum(weights[number] for weights in taken) / len(taken)
            torch.testing.assert_close(parameter.double(), mean, atol=1e-6, rtol=0)


def test_l11_raw_optimizers_are_followed_and_the_still_counter_is_named():
    with pytest.warns(UserWarning, match="checkpoints, logs and limits that go by steps did not work"):
        fit(ExponentialAverage(0.5), module=lambda: ByHand(raw=True))


def test_l12_checkpoint_callbacks_find_the_live_weights_and_files_are_right_all_the_same(tmp_path):
    class Hasty(Callback):
        """Saves while the average stands in the module."""

        def on_validation_batch_end(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "hasty.ckpt")

    _, _, trail = fit([ExponentialAverage(0.7), Hasty()])
    content = load(tmp_path / "hasty.ckpt")
    assert_close(content["current_model_state"], trail[-1], atol=0)
    assert_close(content["state_dict"], exponential(0.7, True)(trail[0], trail[1:]))


@pytest.mark.parametrize("sanity", [0, 2])
def test_l13_training_resumes_from_the_live_weights_whatever_the_sanity_check(sanity, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    _, _, trail = fit(ExponentialAverage(0.7), epochs=2, callbacks=[keep], enable_checkpointing=True)
    options = {"epochs": 3, "ckpt_path": tmp_path / "epoch=1.ckpt", "num_sanity_val_steps": sanity}
    average = ExponentialAverage(0.7)
    with pytest.warns(UserWarning, match="ModelCheckpoint"):
        _, _, again = fit(average, **options)
    assert same(again[0], trail[-1])


def test_l13_resuming_without_the_callback_says_where_the_live_weights_are(tmp_path):
    trainer, _, _ = fit(ExponentialAverage(0.7), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match="the live weights are in the file under current_model_state"):
        fit([], epochs=3, ckpt_path=tmp_path / "x.ckpt")


def test_l14_a_warm_up_that_straddles_a_resume_goes_on(tmp_path):
    trainer, _, first = fit(ExponentialAverage(0.9), epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    _, module, second = fit(ExponentialAverage(0.9), epochs=4, ckpt_path=tmp_path / "x.ckpt")
    assert_close(module, exponential(0.9, True)(first[0], first[1:] + second[1:]))


def test_l16_averages_are_made_where_the_weights_are_when_they_are_first_needed():
    average = ExponentialAverage(0.5, start=3)
    made = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            made.append([len(group.shadow.tensors) for group in average._average.groups])

    fit([average, Look()], epochs=1)
    assert made == [[0], [0], [0], [4], [4], [4]]


def test_l17_lightnings_callbacks_are_no_bases_of_ours_so_neither_replaces_the_other():
    class Own(TinyClassifier):
        def configure_callbacks(self):
            return [ExponentialAverage(0.5, name="of the model")]

    assert not issubclass(LiveAverage, WeightAveraging)
    theirs = WeightAveraging()
    trainer, _, _ = fit([theirs], module=Own)
    assert theirs in trainer.callbacks
    assert any(isinstance(callback, ExponentialAverage) for callback in trainer.callbacks)


def test_l18_several_averages_of_one_class_live_side_by_side(tmp_path):
    slow, fast = ExponentialAverage(0.9, name="slow"), ExponentialAverage(0.2, name="fast", evaluate_on=[])
    trainer, _, trail = fit([slow, fast])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    for name, decay in (("slow", 0.9), ("fast", 0.2), ("average", 0.9)):
        got = dict(open_checkpoint(tmp_path / "x.ckpt", which=name))
        assert_close(got, exponential(decay, True)(trail[0], trail[1:]))
    assert trainer.callback_metrics["slow/samples"] == trainer.callback_metrics["fast/samples"] == 18


def test_l18_two_that_want_the_module_at_once_are_refused():
    with pytest.raises(UnsupportedSetup, match=r"a and b ask for it. Give all but one evaluate_on=\[\]"):
        fit([ExponentialAverage(0.9, name="a"), EqualAverage(name="b")])
    with pytest.raises(UnsupportedSetup, match="leave='live'"):
        fit([ExponentialAverage(0.9, name="a"), EqualAverage(name="b", evaluate_on=[], leave="average")])


# ----------------------------------------------------------------------------------------------------- Lightning's SWA


def test_s01_validation_monitors_and_saves_the_average(tmp_path):
    spy = Spy()
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=-1, filename="{epoch}")
    _, _, trail = fit([EqualAverage(start=0, every="1 epochs"), spy], callbacks=[keep], enable_checkpointing=True)
    mean = {name: (trail[6][name] + trail[12][name] + trail[18][name]) / 3 for name in trail[0]}
    assert_close(spy.last("validation"), mean)
    assert_close(dict(open_checkpoint(tmp_path / "epoch=2.ckpt")), mean)


@pytest.mark.parametrize("validate", [True, False])
def test_s02_f08_recalibration_takes_no_step_and_changes_no_weight(validate):
    options = {} if validate else {"limit_val_batches": 0}
    average = EqualAverage(start=0, every=2, buffers="recalibrate")
    trainer, module, trail = fit(average, module=BatchNormed, **options)
    _, _, plain = fit([], module=BatchNormed, **options)
    assert trainer.global_step == 18
    assert all(same(a, b) for a, b in zip(trail, plain, strict=True))
    assert_close(module, {n: sum(w[n] for w in trail[2::2]) / 9 for n in trail[0]})


def test_s03_s05_the_trainer_and_the_scheduler_are_left_alone():
    class Scheduled(TinyClassifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]

    trainer, _, trail = fit(EqualAverage(start=0), module=Scheduled, accumulate_grad_batches=2)
    other, _, plain = fit([], module=Scheduled, accumulate_grad_batches=2)
    assert all(same(a, b) for a, b in zip(trail, plain, strict=True))
    for name in ("max_epochs", "max_steps", "accumulate_grad_batches", "current_epoch", "global_step"):
        assert getattr(trainer, name) == getattr(other, name), name


def test_s04_recalibrated_statistics_are_the_plain_mean_over_the_data():
    train, val = loaders(32)
    _, module, _ = fit(EqualAverage(start=0, every=2, buffers="recalibrate"), module=BatchNormed, data=(train, val))
    with torch.no_grad():
        inputs = [module.net[0](x) for x, _ in train]
    norm = module.net[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in inputs]).mean(0))


def test_s04_live_statistics_come_back_after_validation():
    class Look(Callback):
        def __init__(self):
            self.before, self.after = [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.before.append(pl_module.net[1].running_mean.clone())

        def on_train_epoch_end(self, trainer, pl_module):
            self.after.append(pl_module.net[1].running_mean.clone())

    look = Look()
    fit([EqualAverage(start=0, every=2, buffers="recalibrate"), look], module=BatchNormed)
    assert [torch.equal(a, b) for a, b in zip(look.before[5::6], look.after, strict=True)] == [True] * 3


def test_s07_only_what_trains_is_copied():
    class Heavy(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(100, 100).requires_grad_(False)
            self.data = torch.zeros(1000)

    average = ExponentialAverage(0.5)
    fit(average, module=Heavy)
    kept = sum(t.numel() for group in average._average.groups for t in group.shadow.tensors)
    assert kept == 8 * 16 + 16 + 16 * 3 + 3


def test_s10_a_rule_of_the_user_is_used():
    class LastOnly(LiveAverage):
        def share(self, n):
            return 1.0

    _, module, trail = fit(LastOnly(every=4))
    assert same(values_of(module), trail[16])


# ------------------------------------------------------------------------------------- other frameworks, and found here


@pytest.mark.slow
def test_t05_compiled_modules_have_the_names_of_plain_ones(tmp_path):
    trainer, _, _ = fit(ExponentialAverage(0.5), module=lambda: torch.compile(TinyClassifier(), backend="eager"))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "net.0.weight" in load(tmp_path / "x.ckpt")["state_dict"]


def test_t06_warm_up_is_the_default_and_a_decay_too_long_is_named():
    with pytest.warns(UserWarning, match="looks back over 1,000 samples, but only 18 are planned"):
        trainer, module, trail = fit(ExponentialAverage())
    assert_close(module, exponential(0.999, True)(trail[0], trail[1:]))
    assert 1 < trainer.callback_metrics["ema/effective_window"] < 18
    assert 0 < trainer.callback_metrics["ema/relative_distance"] < 1


@pytest.mark.parametrize("buffers", ["copy", "average", "recalibrate"])
def test_t07_batch_norm_has_three_named_modes_and_live_scores_beside(buffers):
    trainer, _, _ = fit(EqualAverage(start=0, every=1, buffers=buffers, score_live=True), module=BatchNormed)
    metrics = trainer.callback_metrics
    assert metrics["swa/live_val_loss"] != metrics["val_loss"]
    plain, _, _ = fit([], module=BatchNormed)
    torch.testing.assert_close(metrics["swa/live_val_loss"], plain.callback_metrics["val_loss"])


def test_t09_the_optimizer_is_not_wrapped():
    trainer, _, _ = fit(ExponentialAverage(0.5))
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_f02_an_object_used_again_begins_anew():
    average = ExponentialAverage(0.7)
    fit(average)
    _, module, trail = fit(average, seed=8)
    assert average.samples == 18
    assert_close(module, exponential(0.7, True)(trail[0], trail[1:]))


def test_f03_one_start_gates_everything():
    average = EqualAverage(start="1 epochs", stop="2 epochs", every=1)
    _, module, trail = fit(average)
    assert average.samples == 6
    assert_close(module, {n: sum(w[n] for w in trail[7:13]) / 6 for n in trail[0]})


def test_f05_another_model_is_not_scored_with_the_average():
    spy = Spy()
    trainer, _, _ = fit([ExponentialAverage(0.7, leave="live"), spy])
    other = TinyClassifier()
    trainer.validate(other, loaders()[1], verbose=False)
    assert same(spy.last("validation"), values_of(other))


def test_f05_a_module_that_was_given_other_weights_is_scored_with_those(tmp_path):
    spy = Spy()
    trainer, module, _ = fit([ExponentialAverage(0.7, leave="live"), spy])
    other = TinyClassifier()
    module.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match="changed after its fit"):
        trainer.validate(module, loaders()[1], verbose=False)
    assert same(spy.last("validation"), values_of(other))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert_close(load(tmp_path / "x.ckpt")["state_dict"], values_of(other), atol=0)


class Adapter(TinyClassifier):
    """Saves its last layer only, as adapters do."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {n: v for n, v in super().state_dict(*args, **kwargs).items() if n.startswith("net.3")}


def test_f06_partial_files_are_resumed_where_the_module_is_not_strict(tmp_path):
    trainer, _, trail = fit(ExponentialAverage(0.7), module=Adapter, epochs=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = load(tmp_path / "x.ckpt")
    assert set(content["state_dict"]) == set(content["current_model_state"]) == {"net.3.weight", "net.3.bias"}
    _, _, again = fit(ExponentialAverage(0.7), module=Adapter, epochs=3, ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(again[0]["net.3.weight"], trail[-1]["net.3.weight"])


def test_f09_the_causal_mask_of_clip_survives():
    architecture = {"embed_dim": 16, "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4}}
    architecture["vision_cfg"]["image_size"] = 8
    architecture["text_cfg"] = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}

    class Clip(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.clip = open_clip.CLIP(**copy.deepcopy(architecture))

        def training_step(self, batch, batch_idx):
            images, texts = torch.randn(4, 3, 8, 8), torch.randint(1, 32, (4, 8))
            features = self.clip.encode_image(images), self.clip.encode_text(texts)
            return super().training_step(batch, batch_idx) + (features[0] * features[1]).mean()

    _, module, _ = fit(ExponentialAverage(0.7, buffers="average"), module=Clip, epochs=1)
    assert module.clip.attn_mask.isinf().any()
    assert module.clip.encode_text(torch.randint(1, 32, (4, 8))).isfinite().all()


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_f10_callbacks_are_pickled_before_and_after_a_fit(row):
    average = row.make()
    assert pickle.loads(pickle.dumps(average)).name == average.name
    fit(average)
    again = pickle.loads(pickle.dumps(average))
    assert again.samples == 0
    _, module, trail = fit(again)
    assert_close(module, row.expected(trail))


def test_f16_class_names_are_not_lightnings():
    for name in vars(ours):
        if name[0].isupper():
            assert not hasattr(lightning_callbacks, name), name


def test_a_divergence_is_named_and_never_averaged_silently():
    class Diverging(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 7:
                pl_module.net[0].weight.grad.fill_(float("nan"))

    with pytest.raises(NonFiniteWeights, match=r"average of net\.0\.weight has a NaN"):
        fit([ExponentialAverage(0.7), Diverging()])


def test_an_average_off_the_device_is_right_too():
    data = TensorDataset(torch.randn(8, 8), torch.randint(0, 3, (8,)))
    trainer = quiet_trainer(max_epochs=2, callbacks=[LatestAverage(2, every=1, device="cpu"), trail := Trail()])
    trainer.fit(module := TinyClassifier(), DataLoader(data, 4), DataLoader(data, 4))
    assert_close(module, {n: (trail.weights[-1][n] + trail.weights[-2][n]) / 2 for n in trail.weights[0]})
