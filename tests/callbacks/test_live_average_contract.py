"""Every live average, by the same tests: right, resumable, and at home in every way of training."""

import warnings
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_soup.weights import open_checkpoint
from tests.helpers.averages import ROWS, Trail, assert_close, fit, ids, loaders, values_of
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.cli import through_yaml
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

every_row = pytest.mark.parametrize("row", ROWS, ids=ids)
KEYS = ("state_dict", "current_model_state")


def load(path):
    return torch.load(path, weights_only=True)  # the safe loader, always


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@every_row
def test_equals_the_slow_reference_and_is_left_in_the_module(row):
    _, module, trail = fit(row.make())
    assert_close(module, row.expected(trail))


@every_row
def test_leaves_the_live_weights_if_asked(row):
    _, module, trail = fit(row.make(leave="live"))
    assert_same(values_of(module), trail[-1])


@every_row
def test_training_is_the_same_as_without_it(row):
    _, _, trail = fit(row.make())
    _, _, plain = fit([])
    for a, b in zip(trail, plain, strict=True):
        assert_same(a, b)


class CutAt(Callback):
    """The machine goes away after some steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@every_row
@pytest.mark.parametrize("middle", [False, True], ids=["end of epoch", "middle of epoch"])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resume_is_bit_exact(row, middle, tmp_path):
    # A plain loader begins an interrupted epoch anew: in the middle only equal batches tell nothing else apart.
    data = [DataLoader(ConcatDataset([Subset(TinyData().train, range(16))] * 6), 16), loaders()[1]] if middle else None
    options = {"epochs": 4, "max_steps": 21 if middle else -1, "data": data, "enable_checkpointing": True}
    file = "step=8.ckpt" if middle else "step=12.ckpt"

    def keep():
        every = {"every_n_train_steps": 8} if middle else {"every_n_epochs": 1}
        return ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{step}", **every)

    whole, _, _ = fit(row.make(), callbacks=[CutAt(0), keep()], **options)
    whole.save_checkpoint(tmp_path / "whole.ckpt")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(row.make(), callbacks=[CutAt(14), keep()], **options)
    resumed, _, _ = fit(row.make(), callbacks=[CutAt(0), keep()], seed=99, ckpt_path=tmp_path / file, **options)
    resumed.save_checkpoint(tmp_path / "resumed.ckpt")
    a, b = load(tmp_path / "whole.ckpt"), load(tmp_path / "resumed.ckpt")
    for key in KEYS:
        assert_same(a[key], b[key])
    assert counters(a) == counters(b)


def counters(checkpoint):
    (state,) = [value for key, value in checkpoint["callbacks"].items() if key.startswith("LiveAverage")]
    return [{n: v for n, v in group.items() if isinstance(v, (int, float))} for group in state["groups"]]


@every_row
def test_steps_are_counted_and_not_batches(row):
    # 7 batches in windows of 3: steps after batches 3, 6 and 7 of each epoch.
    _, module, trail = fit(row.make(), epochs=5, accumulate_grad_batches=3, data=loaders(14))
    assert len(trail) == 16
    assert_close(module, row.expected(trail, per_epoch=3))


@every_row
def test_half_precision_is_averaged_in_float32_and_live_weights_are_never_rounded(row):
    trainer, module, trail = fit(row.make(leave="live"), precision="bf16-true")
    assert_same(values_of(module), trail[-1])
    expected = row.expected(trail)
    average = trainer.callbacks[0]._average
    got = {slot.name: mean for group in average.groups for slot, _, mean in group.pairs()}
    assert all(mean.dtype == torch.float32 for mean in got.values())
    assert_close(got, expected)


@every_row
def test_double_precision_stays_double(row):
    _, module, trail = fit(row.make(), precision="64-true")
    assert_close(module, row.expected(trail), atol=1e-12)


class OverflowAt(Callback):
    """Makes the gradients of some batches overflow, so that the scaler skips their steps."""

    def __init__(self, *batches):
        self.batches, self.seen = batches, 0

    def on_after_backward(self, trainer, pl_module):
        self.seen += 1
        if self.seen in self.batches:
            next(pl_module.parameters()).grad.fill_(float("inf"))


@every_row
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_the_scaler_skips_are_no_samples(row, fused):
    class Scaled(TinyClassifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer, module, trail = fit(row.make(), module=Scaled, plugins=[plugin], callbacks=[OverflowAt(2, 3, 9)])
    real = [trail[0]] + [
        b
        for a, b in pairwise(trail)
        if not torch.equal(*[torch.cat([v.flatten() for v in w.values()]) for w in (a, b)])
    ]
    assert trainer.global_step == 18
    assert len(real) == 16
    if "swa" not in row.name or "steps" in row.name:  # ends of epochs are no step numbers here
        assert_close(module, row.expected(real))


@every_row
def test_compiled_parts_keep_their_names_and_their_average(row, tmp_path):
    class Compiled(TinyClassifier):
        def __init__(self):
            super().__init__()
            self.net[0] = torch.compile(self.net[0], backend="eager")

    trainer, module, trail = fit(row.make(), module=Compiled)
    assert_close(module, row.expected(trail))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "net.0._orig_mod.weight" in load(tmp_path / "x.ckpt")["state_dict"]
    assert_close(dict(open_checkpoint(tmp_path / "x.ckpt")), row.expected(trail))


class FailAt(Callback):
    """Fails in the middle of a validation."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch == self.epoch and not trainer.sanity_checking:
            raise RuntimeError("out of memory")


@every_row
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
def test_an_exception_in_validation_restores_the_live_weights_before_files_are_written(row, tmp_path):
    keep = OnExceptionCheckpoint(tmp_path)
    module = TinyClassifier()
    trail = Trail()
    average = row.make()
    trainer = quiet_trainer(max_epochs=4, callbacks=[average, trail, FailAt(2), keep], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit(module, *loaders())
    assert_same(values_of(module), trail.weights[-1])
    content = load(tmp_path / "on_exception.ckpt")
    assert_close(content["current_model_state"], trail.weights[-1], atol=0)
    assert_close(content["state_dict"], row.expected(trail.weights))


@every_row
def test_files_hold_both_halves_and_open_under_three_names(row, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True, filename="{epoch}", save_top_k=-1)
    trainer, _, trail = fit(row.make(name="mine"), callbacks=[keep], enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("after", "last", "epoch=2"):
        path = tmp_path / f"{name}.ckpt"
        assert_close(dict(open_checkpoint(path)), row.expected(trail))
        assert_close(dict(open_checkpoint(path, which="mine")), row.expected(trail))
        assert_close(dict(open_checkpoint(path, which="raw")), trail[-1], atol=0)
        assert_close(TinyClassifier.load_from_checkpoint(path), row.expected(trail))


@every_row
def test_weights_only_files_hold_the_average(row, tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, filename="{epoch}", save_top_k=-1)
    _, _, trail = fit(row.make(), callbacks=[keep], enable_checkpointing=True)
    assert_close(load(tmp_path / "epoch=2.ckpt")["state_dict"], row.expected(trail))
    if row.samples(12, 6):
        assert_close(load(tmp_path / "epoch=1.ckpt")["state_dict"], row.expected(trail[:13]))


@every_row
def test_yaml_round_trip(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train"])
    callback = row.make()
    options = {name: getattr(callback, name) for name in ("decay", "warmup", "k") if hasattr(callback, name)}
    path = f"{type(callback).__module__}.{type(callback).__name__}"
    fixed = {"name": "other", "every": "2 epochs", "start": 0.25, "exclude": ["net.3.*"], "evaluate_on": ["test"]}

    both = through_yaml(TinyClassifier, path, {**options, **fixed}, tmp_path)
    assert len(both) == 2
    for made in both:
        assert (made.name, str(made.schedule.every), made.exclude) == ("other", "2 epochs", ("net.3.*",))
        assert made.evaluate_on == ("test",)
        assert made.leave == "average"
        assert all(getattr(made, name) == value for name, value in options.items())


def _train_on_a_rank(folder):
    results = {}
    for row in ROWS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer, module, trail = fit(row.make(), devices=2, strategy="ddp", data=loaders(8))
        trainer.save_checkpoint(f"{folder}/{row.name}.ckpt")
        results[row.name] = [
            {name: value.numpy() for name, value in w.items()} for w in (values_of(module), row.expected(trail))
        ]
    return results


def test_two_ranks_agree(tmp_path):
    ranks = run_on_two_ranks(_train_on_a_rank, str(tmp_path))
    for row in ROWS:
        (average, expected), (other, _) = [
            [{n: torch.from_numpy(v) for n, v in w.items()} for w in rank[row.name]] for rank in ranks
        ]
        assert_same(average, other)
        assert_close(average, expected)
        assert_close(dict(open_checkpoint(tmp_path / f"{row.name}.ckpt")), expected)
