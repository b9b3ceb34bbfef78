import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from lightning_soup.callbacks import ExpertsWeightAveraging
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.conversion import experts_of
from lightning_soup.weights import open_checkpoint
from tests.callbacks.test_experts_averaging import KEYS, fit
from tests.helpers.averages import loaders
from tests.helpers.clip import RowData, fit_clip, tiny_clip
from tests.helpers.trainers import quiet_trainer
from tests.helpers.transformer import Block, TinyTransformer
from tests.helpers.zscl import tiny_zscl, write_teacher

pytestmark = pytest.mark.filterwarnings("ignore:.*ended .* apart", "ignore:.*looks back over", "ignore:.*was called w")


def test_fast_dev_run():
    assert list(fit(ExpertsWeightAveraging(), fast_dev_run=True)[1].state_dict()) == KEYS


@pytest.mark.parametrize("strict", [True, False])
def test_any_module_is_tested_on_the_plain_model_of_a_file(strict, tmp_path):
    module = TinyTransformer()
    module.strict_loading = strict
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer, _ = fit([ExpertsWeightAveraging(), keep], module=module, enable_checkpointing=True)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    nn.init.zeros_(module.net[2].mlp[0].weight)
    trainer.validate(module, loaders()[1], ckpt_path="best", verbose=False)
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("wrapped", ["linear", "mlp", "block", "recomputed"])
def test_files_of_wrapped_models_hold_the_plain_model(wrapped, tmp_path):
    module = TinyTransformer()
    for i, block in enumerate(module.net[1:5], start=1):
        if wrapped == "linear":
            block.mlp[0] = torch.compile(block.mlp[0], backend="eager", dynamic=True)
        elif wrapped == "mlp":
            block.mlp = torch.compile(block.mlp, backend="eager", dynamic=True)
        elif wrapped == "block":
            module.net[i] = torch.compile(block, backend="eager")
    if wrapped == "recomputed":
        apply_activation_checkpointing(module, check_fn=lambda part: isinstance(part, Block))
    keys = list(module.state_dict())
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last")
    fit([ExpertsWeightAveraging(), keep], module=module, enable_checkpointing=True)
    dense = torch.load(keep.best_model_path, weights_only=True)["state_dict"]
    assert list(dense) == keys == list(module.state_dict())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in dense.items())
    assert not any("experts" in name for name in open_checkpoint(keep.best_model_path))


def test_networks_with_buffers_resume_from_a_plain_file(tmp_path):
    class Scaled(nn.Sequential):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.register_buffer("scale", torch.tensor(0.5))

    def make():
        module = TinyTransformer()
        for block in module.net[1:5]:
            block.mlp = Scaled(*block.mlp)
        return module

    trainer, _ = fit(ExpertsWeightAveraging(), module=make())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    fit(ExpertsWeightAveraging(), module=make(), epochs=4, ckpt_path=tmp_path / "after.ckpt")


def test_all_networks_of_both_towers_of_open_clip(tmp_path):
    module = tiny_clip(train="both", head="text")
    keys = list(module.state_dict())
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer = fit_clip(module, callbacks=[ExpertsWeightAveraging(layers="all"), keep], enable_checkpointing=True)
    assert list(module.state_dict()) == keys
    trainer.test(module, datamodule=RowData(), ckpt_path="best", verbose=False)


def test_zscl(tmp_path):
    module = tiny_zscl(1, teacher=write_teacher(tmp_path), text_side="student")
    keys = list(module.state_dict())
    fit_clip(module, callbacks=[ExpertsWeightAveraging(layers="all")])
    assert list(module.state_dict()) == keys


@pytest.mark.parametrize("first", [True, False])
def test_averages_of_lightning_are_refused(first):
    both = [ExpertsWeightAveraging(), EMAWeightAveraging()]
    with pytest.raises(UnsupportedSetup, match="Use ExponentialAverage"):
        fit(both if first else both[::-1])


def test_target_is_a_list():
    with pytest.raises(UnsupportedSetup, match=r"expected a list of patterns: \['net"):
        ExpertsWeightAveraging(target="net.*.mlp")


def test_a_trainer_that_goes_on_counts_on():
    rates = []

    class Ramp(ExpertsWeightAveraging):
        def share_rate_at(self, step):
            rates.append((step, super().share_rate_at(step)))
            return rates[-1][1]

    module, trainer = TinyTransformer(), quiet_trainer(max_epochs=1, callbacks=[Ramp()])
    trainer.fit(module, *loaders())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, *loaders())
    assert [step for step, _ in rates] == list(range(12))
    assert rates[5][1] == pytest.approx(0.3)  # of 6 steps, half was over
    assert rates[6][1] == pytest.approx(0.3)  # of 12


def test_hooks_on_networks_are_there_again_after_the_fit():
    module, seen = TinyTransformer(), []
    handle = module.net[2].mlp.register_forward_hook(lambda part, args, out: seen.append((part.training, len(out))))
    fit(ExpertsWeightAveraging(), module=module, num_sanity_val_steps=0, max_steps=6)
    assert seen == [(True, 16)] * 6 + [(False, 16)] * 3 + [(False, 12)]
    module.net(torch.randn(5, 8))
    assert seen[-1] == (True, 5)
    handle.remove()
    module.net(torch.randn(5, 8))
    assert len(seen) == 11


# --------------------------------------------------------------------------------------------------------------- frozen


class Freeze(BaseFinetuning):
    """Freezes the blocks, and lets them train from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[1:5])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[1:5], optimizer, lr=0.01)


class Trainable(TinyTransformer):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_networks_that_are_frozen_after_the_callback_have_experts_for_when_they_are_unfrozen():
    spreads = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            spreads.append(trainer.callbacks[0].spread)

    _, module = fit(
        [ExpertsWeightAveraging(3, share_rate=0.6, schedule="constant"), Freeze(), Look()], module=Trainable()
    )
    assert spreads[0] == 0
    assert spreads[1] > 0
    assert list(module.state_dict()) == KEYS


def test_networks_that_are_frozen_before_the_callback_stay_plain(caplog):
    module = Trainable()
    module.net[1:3].requires_grad_(False)
    before = {name: value.clone() for name, value in module.net[2].state_dict().items()}
    with caplog.at_level("INFO"):
        _, module = fit(ExpertsWeightAveraging(layers="all"), module=module)
    assert "frozen networks stay plain, also if they are unfrozen later: net.1.mlp, net.2.mlp" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in module.net[2].state_dict().items())
    with pytest.raises(UnsupportedSetup, match="all of these feed-forward networks are frozen"):
        fit([Freeze(), ExpertsWeightAveraging()], module=Trainable())


def test_the_frozen_tower_of_a_clip_model_stays_plain():
    module, places = tiny_clip(train="image", head="trained"), []

    class Look(Callback):
        def on_fit_start(self, trainer, pl_module):
            places.extend(experts_of(pl_module))

    fit_clip(module, callbacks=[ExpertsWeightAveraging(layers="all", init="independent"), Look()])
    assert places == ["model.visual.transformer.resblocks.0.mlp"]


def test_what_is_frozen_in_experts_does_not_move_by_a_bit():
    module = TinyTransformer()
    for block in module.net[1:5]:
        block.mlp[0].requires_grad_(False)
    before = module.net[2].mlp[0].weight.clone()
    found, moved = [], []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            found.extend(expert[0].weight.clone() for expert in pl_module.net[2].mlp.experts)
            moved.extend(expert[2].weight.clone() for expert in pl_module.net[2].mlp.experts)

    callback = ExpertsWeightAveraging(7, share_rate=6 / 7, schedule="constant")  # at each step all become their mean
    fit([callback, Look()], module=module)
    for weight in moved[1:]:
        torch.testing.assert_close(weight, moved[0], rtol=0, atol=1e-7)
    assert all(torch.equal(weight, before) for weight in found)
    assert torch.equal(module.net[2].mlp[0].weight, before)
