import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup.callbacks import EqualAverage, ExpertsWeightAveraging, ExponentialAverage, LatestAverage
from lightning_soup.cli.files import show
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.conversion import dense_state, experts_of
from lightning_soup.weights import open_checkpoint
from tests.callbacks.test_experts_averaging import KEYS, Seeded, fit
from tests.callbacks.test_live_average_contract import CutAt
from tests.helpers.averages import loaders
from tests.helpers.trainers import quiet_trainer
from tests.helpers.transformer import TinyTransformer

pytestmark = pytest.mark.filterwarnings("ignore:.*ended .* apart", "ignore:.*looks back over", "ignore:.*was called w")


@pytest.fixture
def trained(tmp_path):
    """A module whose training had experts, and its file from before the conversion."""
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last")
    return fit([ExpertsWeightAveraging(), keep], enable_checkpointing=True)[1], tmp_path / "last.ckpt"


def same(found, expected):
    return list(found) == list(expected) and all(torch.equal(found[name], value) for name, value in expected.items())


# ------------------------------------------------------------------------------------------------ every loader finds it


def test_any_module_loads_the_plain_model_without_knowing_of_experts(trained):
    module, file = trained
    assert same(TinyTransformer.load_from_checkpoint(file).state_dict(), module.state_dict())
    content = torch.load(file, weights_only=True)
    assert same(content["state_dict"], module.state_dict())
    assert same(dense_state(content["current_model_state"], ["net.2.mlp", "net.4.mlp"]), module.state_dict())
    assert content["lightning_soup_experts"] == {"layers": ["net.2.mlp", "net.4.mlp"], "num_experts": 4}


def test_a_module_may_take_away_and_bring_back_part_of_a_file(tmp_path):
    class Partly(TinyTransformer):
        """Writes no head, and makes up for it when it is loaded, as modules with a frozen part do."""

        def on_save_checkpoint(self, checkpoint):
            assert any(".experts." in name for name in checkpoint["state_dict"])
            del checkpoint["state_dict"]["net.5.linear.bias"]

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["net.5.linear.bias"] = torch.zeros(3)

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    _, module = fit([ExpertsWeightAveraging(), keep], module=Partly(), enable_checkpointing=True)
    plain = Partly.load_from_checkpoint(keep.best_model_path)
    assert torch.equal(plain.net[2].mlp[0].weight, module.net[2].mlp[0].weight)
    options = {"enable_checkpointing": True, "ckpt_path": keep.best_model_path}
    fit([ExpertsWeightAveraging(), keep], module=Partly(), epochs=4, **options)


def test_show_describes_the_plain_model_and_says_of_the_experts(trained, capsys):
    show(str(trained[1]), tensors=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "tensors 27" in shown
    assert "4 in each of 2 layers, kept for resuming" in shown
    assert "mlp.experts" not in shown
    assert "current_model_state (51 entries)" in shown


def test_show_says_of_a_file_of_weights_only_that_there_were_experts(tmp_path, capsys):
    keep = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True, filename="light")
    fit([ExpertsWeightAveraging(), keep], enable_checkpointing=True)
    show(str(tmp_path / "light.ckpt"))
    assert "4 in each of 2 layers, while training" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("where", ["before the optimizer", "in training"])
def test_after_a_fit_that_failed_the_module_is_plain_and_the_next_fit_begins_anew(where):
    class Break(CutAt):
        def on_fit_start(self, trainer, pl_module):
            assert experts_of(pl_module)
            if where == "before the optimizer":
                raise RuntimeError("power cut")

    module = TinyTransformer()
    with pytest.raises(RuntimeError, match="power cut"):
        fit([Break(7), ExpertsWeightAveraging()], module=module)
    assert list(module.state_dict()) == KEYS
    callback = ExpertsWeightAveraging(3, layers="all")
    fit(callback, module=module)
    assert list(module.state_dict()) == KEYS


@pytest.mark.filterwarnings("ignore:.*but there is no last checkpoint", "ignore:You're resuming from a checkpoint that")
def test_the_file_that_is_written_of_a_failure_holds_the_experts(tmp_path):
    def callbacks(cut):
        return [ExpertsWeightAveraging(), Seeded(), CutAt(cut)]

    _, whole = fit(callbacks(0))
    with pytest.raises(RuntimeError, match="power cut"):
        fit([*callbacks(12), OnExceptionCheckpoint(tmp_path, "cut")], enable_checkpointing=True)
    assert "net.2.mlp.experts.3.0.weight" in open_checkpoint(tmp_path / "cut.ckpt", which="raw")
    _, resumed = fit(callbacks(0), seed=99, ckpt_path=tmp_path / "cut.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_damaged_file_is_not_trained_on(trained):
    _, file = trained
    content = torch.load(file, weights_only=True)
    del content["current_model_state"]["net.2.mlp.experts.1.0.weight"]
    torch.save(content, file)
    with pytest.raises(UnsupportedSetup, match=r"lacks net\.2\.mlp\.experts\.1\.0\.weight"):
        fit([ExpertsWeightAveraging(), ModelCheckpoint()], epochs=4, enable_checkpointing=True, ckpt_path=file)


# ------------------------------------------------------------------------------------------------------- live averages


MAKE = {
    "ema": lambda **o: ExponentialAverage(0.8, **o),
    "swa": lambda **o: EqualAverage(0, every=1, **o),
    "lawa": lambda **o: LatestAverage(3, every=1, **o),
}


@pytest.mark.parametrize("leave", ["live", "average"])
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("first", [True, False])
def test_an_average_outlives_the_conversion(kind, leave, first, tmp_path):
    make = MAKE[kind]
    both = [ExpertsWeightAveraging(), make(leave=leave)]
    keep = ModelCheckpoint(dirpath=tmp_path, filename="before", save_top_k=1)
    trainer, module = fit([*(both if first else both[::-1]), keep], enable_checkpointing=True)
    average, live = (open_checkpoint(tmp_path / "before.ckpt", which=which) for which in ("average", "raw"))
    live = dense_state(live, ["net.2.mlp", "net.4.mlp"])
    assert not torch.equal(average["net.2.mlp.0.weight"], live["net.2.mlp.0.weight"])

    held = dict(module.state_dict())
    torch.testing.assert_close(held, dict(live if leave == "live" else average), rtol=0, atol=1e-6)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    for name, which in [("after", "average"), ("after", both[1].name), ("light", "average"), ("before", both[1].name)]:
        found = dict(open_checkpoint(tmp_path / f"{name}.ckpt", which=which))
        assert list(found) == KEYS
        for key, value in average.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
    assert same(dict(open_checkpoint(tmp_path / "after.ckpt", which="raw")), live)

    expected = TinyTransformer()
    expected.load_state_dict(dict(average))
    [scores] = trainer.validate(module, loaders()[1], verbose=False)
    assert scores == pytest.approx(quiet_trainer().validate(expected, loaders()[1], verbose=False)[0], abs=1e-6)
    assert same(module.state_dict(), held)


def test_several_averages_outlive_the_conversion(tmp_path):
    fast = ExponentialAverage(0.5, name="fast", leave="live")
    slow = ExponentialAverage(0.9, name="slow", evaluate_on=[], leave="average")
    keep = ModelCheckpoint(dirpath=tmp_path, filename="before")
    trainer, module = fit([fast, ExpertsWeightAveraging(), slow, keep], enable_checkpointing=True)
    before = {name: dict(open_checkpoint(tmp_path / "before.ckpt", which=name)) for name in ("fast", "slow")}
    assert not torch.equal(before["fast"]["net.2.mlp.0.weight"], before["slow"]["net.2.mlp.0.weight"])
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name, expected in before.items():
        found = open_checkpoint(tmp_path / "after.ckpt", which=name)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before["slow"][key], rtol=0, atol=1e-6)


def test_an_average_is_added_when_training_goes_on(tmp_path):
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    fit([ExpertsWeightAveraging(), keep], enable_checkpointing=True)
    file = keep.best_model_path
    spreads = []

    class Look(ExpertsWeightAveraging):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            spreads.append(self.spread)

    for callbacks in ([Look(), ExponentialAverage(0.8)], [ExponentialAverage(0.8), Look()]):
        fit([*callbacks, copy.deepcopy(keep)], epochs=4, enable_checkpointing=True, ckpt_path=file)
    assert spreads[0] == spreads[1] > 0


@pytest.mark.parametrize("place", [0, 1])
def test_the_spread_in_logs_is_that_of_what_is_validated_in_any_order_of_callbacks(place):
    callbacks = [ExponentialAverage(0.9)]
    callbacks.insert(place, ExpertsWeightAveraging(init="independent", share_rate=0.0))
    seen = []

    class Look(ModelCheckpoint):
        """Comes last, when the average stands in the module."""

        def on_validation_epoch_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                seen.append(callbacks[place].spread)

    trainer, _ = fit([*callbacks, Look(save_top_k=0)], enable_checkpointing=True)
    assert float(trainer.callback_metrics["ewa/spread"]) == pytest.approx(seen[-1], rel=1e-6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_batches_of_a_foreign_loop_see_the_plain_model(trained):
    module, file = trained
    images = DataLoader(TensorDataset(torch.randn(4, 8)), 4)
    [found] = quiet_trainer().predict(TinyTransformer(), images, ckpt_path=file)
    assert torch.equal(found, module.eval().net(images.dataset.tensors[0]))
