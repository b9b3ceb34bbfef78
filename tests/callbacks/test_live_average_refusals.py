"""Options that have no meaning are refused with an error that names them, before any training."""

import pytest

from lightning_soup.callbacks import EqualAverage, ExponentialAverage, LatestAverage, WeightEnsemble
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.averages import fit
from tests.helpers.boring import TinyClassifier


class Untouched(TinyClassifier):
    """Fails where it is trained."""

    def training_step(self, batch, batch_idx):
        pytest.fail("training began")


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
        (EqualAverage(), {"epochs": -1}, "needs an end of training, but it is endless"),
        (ExponentialAverage(buffers="recalibrate"), {}, "BatchNorm"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_before_training(average, options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        fit(average, module=Untouched, num_sanity_val_steps=0, **options)
