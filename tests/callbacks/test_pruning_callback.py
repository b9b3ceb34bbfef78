"""What callbacks that prune have in common: when masks are laid over what, and what is left behind."""

import pickle
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_soup.callbacks import ExponentialAverage, SparsityMask, pruned_weights
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.prunable_weights import NOT_PRUNABLE
from lightning_soup.layers.pruning import prune_
from tests.callbacks.test_sparsity_mask import OPTIMIZERS, SIZE, fit, module_with, zeros
from tests.helpers.averages import TwoOptimizers, loaders
from tests.helpers.boring import TinyClassifier
from tests.helpers.trainers import quiet_trainer


def _disturbed(value):
    """A checkpoint's tensors of two dimensions, not zero anywhere."""
    if isinstance(value, dict):
        return {key: _disturbed(one) for key, one in value.items()}
    return value + 1 if isinstance(value, torch.Tensor) and value.ndim == 2 else value


def test_what_a_checkpoint_holds_is_masked_before_anything_is_done_with_it(tmp_path):
    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.weights = zeros(pl_module)

        def on_train_start(self, trainer, pl_module):
            states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
            self.states = sum(int((value == 0).sum()) for value in states if value.ndim == 2)

    module = module_with(OPTIMIZERS["AdamW"])
    trainer, _, _ = fit(SparsityMask(0.75), module=module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    for key in ("state_dict", "optimizer_states"):
        content[key] = _disturbed(content[key]) if key == "state_dict" else [_disturbed(one) for one in content[key]]
    torch.save(content, tmp_path / "y.ckpt")
    look = Look()
    module = module_with(OPTIMIZERS["AdamW"])
    fit(SparsityMask(0.75), epochs=4, module=module, callbacks=[look], ckpt_path=tmp_path / "y.ckpt")
    assert look.weights == SIZE * 3 // 4
    assert look.states == 3 * look.weights  # exp_avg, exp_avg_sq, max_exp_avg_sq


@pytest.mark.parametrize("first", [False, True], ids=["average first", "mask first"])
def test_averages_see_weights_that_are_masked(first):
    """Also where the optimizer fills what is pruned in each step."""
    mask, live = SparsityMask(0.75), ExponentialAverage(0.9)
    module = module_with(OPTIMIZERS["towards an anchor"])
    fit(mask, module=module, callbacks=[live]) if first else quiet_trainer(max_epochs=3, callbacks=[live, mask]).fit(
        module, *loaders()
    )
    assert zeros(module) == SIZE * 3 // 4


def test_layers_made_in_configure_model():
    class Late(TinyClassifier):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = TinyClassifier().net

    module = Late()
    quiet_trainer(max_epochs=1, callbacks=[SparsityMask(0.75)]).fit(module, *loaders())
    assert zeros(module) == SIZE * 3 // 4


def test_nothing_is_left_at_the_optimizer():
    mask = SparsityMask(0.75)
    trainer = quiet_trainer(max_epochs=1, callbacks=[mask])
    trainer.fit(TinyClassifier(), *loaders())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert mask.masks is not None


def test_what_cannot_be_pruned_is_refused_before_optimizers_are_made():
    with pytest.raises(UnsupportedSetup, match="nothing in TinyClassifier can be pruned"):
        SparsityMask(0.5, exclude=["*"]).setup(quiet_trainer(), TinyClassifier(), "fit")


def test_what_belongs_to_a_run_stays_with_it():
    mask = SparsityMask(0.75)
    state = mask.state_dict()
    assert (state["steps"], state["ticks"], state["done"]) == (0, 0, False)
    assert "masks" not in state
    trainer, module, _ = fit(mask)
    assert pickle.loads(pickle.dumps(mask)).masks is None
    assert "sparsity" in trainer.callback_metrics
    assert "sparsity" not in trainer.validate(module, loaders()[1], verbose=False)[0]


class TestWhenItPrunes:
    @pytest.fixture
    def amounts(self, monkeypatch):
        """What was asked of prune_, in order."""
        found = []

        def counting(tensors, amount, *options):
            found.append(amount)
            return prune_(tensors, amount, *options)

        monkeypatch.setattr(pruned_weights, "prune_", counting)
        return found

    @pytest.mark.parametrize(
        ("options", "times"),
        [({}, 1), ({"start": 3}, 1), ({"start": "1 epochs"}, 1), ({"stop": 12, "every": 4}, 3)],
        ids=str,
    )
    def test_no_more_than_it_must(self, amounts, options, times, tmp_path):
        mask = SparsityMask(0.75, **options)
        trainer, _, _ = fit(mask)
        assert len(amounts) == times
        assert mask.state_dict()["done"]
        assert amounts[-1] == 0.75
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        fit(SparsityMask(0.75, **options), epochs=4, ckpt_path=tmp_path / "x.ckpt")
        assert len(amounts) == times

    @pytest.mark.parametrize(("start", "dense"), [(5, 4), ("5 steps", 4), ("1 epochs", 6), (0.5, 9), (10 / 18, 10)])
    def test_steps_are_pruned_at_once_and_the_rest_at_ends_of_batches(self, start, dense):
        _, _, seen = fit(SparsityMask(0.75, start=start))
        assert seen == [0] * dense + [SIZE * 3 // 4] * (18 - dense)

    def test_steps_are_those_of_the_first_optimizer(self):
        _, _, seen = fit(SparsityMask(0.75, start=4), module=TwoOptimizers())
        assert seen.count(0) == 6

    def test_moments_in_epochs_are_counted_on_after_a_resume(self, tmp_path):
        def run(**resume):
            keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}", every_n_epochs=1)
            mask = SparsityMask(0.75, stop="4 epochs", every="1 epochs")
            return fit(mask, epochs=4, callbacks=[keep], enable_checkpointing=True, **resume)[2]

        seen = run()
        again = run(ckpt_path=tmp_path / "epoch=1.ckpt")
        assert again == seen[12:]

    @pytest.mark.parametrize("options", [{}, {"stop": 12, "every": 4}], ids=["once", "gradually"])
    def test_random_masks_are_those_of_the_seed(self, options):
        found = []
        for seed in (1, 1, 2):
            mask = SparsityMask(0.75, "random", seed=seed, **options)
            fit(mask)
            found.append(mask.masks)
        assert found[0] == found[1] != found[2]


def test_a_bare_trainer_logs_nothing():
    class Silent(TinyClassifier):
        def log(self, name, *arguments, **options):
            assert name != "sparsity"

    module, mask = Silent(), SparsityMask(0.75)
    Trainer(accelerator="cpu", devices=1, barebones=True, max_epochs=1, callbacks=[mask]).fit(module, *loaders())
    assert zeros(module) == SIZE * 3 // 4


class TestTimesThatCannotBe:
    def test_a_fraction_of_an_endless_training(self):
        with pytest.raises(UnsupportedSetup, match=r"0\.5 of the training needs an end of training, but it is endless"):
            fit(SparsityMask(0.75, start=0.5), epochs=-1)

    @pytest.mark.parametrize("times", [("2 epochs", 0.5), (12, "2 epochs"), (0.5, 9)])
    def test_a_stop_that_other_units_put_before_the_start(self, times):
        start, stop = times
        with pytest.raises(UnsupportedSetup, match="stop must come after start"):
            fit(SparsityMask(0.75, start=start, stop=stop))


def test_what_is_left_out_by_its_place_is_told():
    mask = SparsityMask(0.5, skip_head=True)
    with mock.patch("lightning_soup.callbacks.pruning_callback.rank_zero_info") as info:
        fit(mask)
    info.assert_called_once_with("SparsityMask: not pruned is net.3.weight (skip_first, skip_head).")
    assert set(mask.masks) == {"net.0.weight"}


def test_patterns_that_fit_nothing_are_told_of():
    with pytest.warns(UserWarning, match=r"exclude=\['nte\.3\.\*'\] fits no parameter.*such as net\.0\.weight"):
        fit(SparsityMask(0.5, exclude=["nte.3.*", "*cls_token*"]))
    fit(SparsityMask(0.5, exclude=["net.3.*", "*.bias", *NOT_PRUNABLE]))


def test_frozen_weights_are_told_of():
    module = TinyClassifier()
    module.net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"1 of the 2 weights to prune are frozen: net\.0\.weight\. .*Leave them out"):
        fit(SparsityMask(0.5), module=module)
    fit(SparsityMask(0.5, exclude=["net.0.*"]), module=module)
