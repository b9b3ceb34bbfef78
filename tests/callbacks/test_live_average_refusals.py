"""Options that have no meaning are refused with an error that names them, before any training."""

import pytest
from lightning.pytorch.callbacks import ModelPruning

from lightning_soup.callbacks import EqualAverage, ExponentialAverage, LatestAverage, WeightEnsemble
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.averages import assert_close, equal, fit, loaders
from tests.helpers.boring import TinyClassifier


class Untouched(TinyClassifier):
    """Fails where it is trained."""

    def training_step(self, batch, batch_idx):
        pytest.fail("training began")


class ByHand(Untouched):
    """The number of its steps is not known."""

    automatic_optimization = False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExponentialAverage(1.0), r"decay=1.0\): expected 0 ≤ decay < 1"),
        (lambda: ExponentialAverage(-0.1), r"decay=-0.1\)"),
        (lambda: ExponentialAverage(float("nan")), r"decay=nan\)"),
        (lambda: LatestAverage(1), r"k=1\): expected 2 or more"),
        (lambda: WeightEnsemble(every=0), r"WeightEnsemble\(every=0\): expected more than 0"),
        (lambda: EqualAverage(every="0 epochs"), r"every='0 epochs'\): expected more than 0"),
        (lambda: WeightEnsemble(every=-5), r"WeightEnsemble\(every\)"),
        (lambda: WeightEnsemble(every="often"), "'often'"),
        (lambda: EqualAverage(start="120%"), "120%"),
        (lambda: ExponentialAverage(start=50, stop=50), "stop must come after start"),
        (lambda: ExponentialAverage(name=""), "name=''"),
        (lambda: ExponentialAverage(name="a/b"), "name='a/b'"),
        (lambda: ExponentialAverage(name="raw"), "meaning of its own"),
        (lambda: ExponentialAverage(include="head.*"), r"expected a list of patterns: \['head.\*'\]"),
        (lambda: ExponentialAverage(buffers="swap"), "buffers='swap'"),
        (lambda: ExponentialAverage(evaluate_on=["validation"]), r"evaluate_on=\['validation'\]"),
        (lambda: ExponentialAverage(leave="both"), "leave='both'"),
        (lambda: ExponentialAverage(recalibrate_batches=0), "recalibrate_batches=0"),
        (lambda: ExponentialAverage(device="gpu"), r"device='gpu'\): expected 'cpu'"),
    ],
)
def test_when_it_is_built(make, message):
    with pytest.raises(UnsupportedSetup, match=message):
        make()


@pytest.mark.parametrize(
    ("average", "options", "message"),
    [
        (
            ExponentialAverage(include=["heads.*"]),
            {},
            r"include=\['heads.\*'\]\): no trainable tensor matches. There are",
        ),
        (ExponentialAverage(exclude=["net.9.*"]), {}, r"exclude=\['net.9.\*'\]"),
        (ExponentialAverage(exclude=["*"]), {}, "no trainable parameter left to average"),
        (ExponentialAverage(start=18), {}, r"start=18 steps\): training ends before that, after 18 steps"),
        (ExponentialAverage(start="3 epochs"), {}, r"start=3 epochs\): training ends before that"),
        (ExponentialAverage(start=5), {"max_steps": 4}, "after 4 steps"),
        (
            EqualAverage(start=2, every=17),
            {},
            r"start=2 steps, every=17 steps\): training ends before that has passed once, after 18 steps",
        ),
        (EqualAverage(start="2 epochs", every=8), {}, r"every=8 steps\): training ends"),
        (ExponentialAverage(every=100), {}, r"every=100 steps\): training ends"),
        (LatestAverage(), {"max_steps": 5}, r"every=1 epochs\): training ends.*after 0.833333 epochs"),
        (EqualAverage(start="2 epochs", every="2 epochs"), {}, r"every=2 epochs\): training ends"),
        (EqualAverage(start=0, every=10, stop=9), {}, r"every=10 steps\): training ends"),
        (EqualAverage(start=0.75, every=0.75), {}, r"every=0.75 of the training\): training ends"),
        (ExponentialAverage(start="3 epochs"), {"module": ByHand}, r"start=3 epochs\): training ends before that"),
        (LatestAverage(every="4 epochs"), {"module": ByHand}, r"every=4 epochs\): training ends"),
        (ExponentialAverage(0.7), {"callbacks": [ModelPruning("l1_unstructured")]}, "ModelPruning.*Use SparsityMask"),
        (EqualAverage(), {"epochs": -1}, "needs an end of training, but it is endless"),
        (ExponentialAverage(buffers="recalibrate"), {}, "BatchNorm"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_before_training(average, options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        fit(average, **{"module": Untouched, "num_sanity_val_steps": 0, **options})


@pytest.mark.parametrize(
    ("average", "options", "samples"),
    [
        (EqualAverage(start=2, every=16), {}, 1),
        (EqualAverage(start="2 epochs", every=6), {}, 1),
        (EqualAverage(start=0.9, every="1 epochs"), {}, 1),
        (EqualAverage(start="1 epochs", every="2 epochs"), {}, 1),
        (LatestAverage(), {"max_steps": 6}, 1),
        (WeightEnsemble(every=100), {}, 1),
        # 7 batches in windows of 3: after 0.4 of the first epoch come three steps.
        (
            EqualAverage(start="0.4 epochs", every=3),
            {"data": loaders(14), "accumulate_grad_batches": 3, "epochs": 1},
            1,
        ),
    ],
)
def test_what_just_fits_is_not_refused(average, options, samples):
    fit(average, **options)
    assert average.samples == samples


def test_a_resumed_average_that_has_samples_needs_no_more_of_them(tmp_path):
    trainer, _, trail = fit(EqualAverage(start=0, every=9), epochs=3)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    _, module, _ = fit(EqualAverage(start=0, every=30), epochs=4, ckpt_path=tmp_path / "x.ckpt")
    assert_close(module, equal({}, trail[9::9]))
