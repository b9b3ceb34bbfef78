"""LearnableEnsembleWeights: weights over the families of any module's predictions."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader

from lightning_soup import AwareNet, LearnableEnsembleWeights
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.evaluation.mixture import learn_weights, log_alpha, mix, stack_families
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.families import HeldOutData, three_families
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using `DistributedSampler` with the dataloaders", "ignore:You defined a `validation_step` but have no"
)


class TwoHeads(LightningModule):
    """Two kinds of heads on one body: a module of one's own, trained by the mean of their losses."""

    family_names = ("wide", "narrow")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)) for _ in range(2))
        self.narrow = nn.ModuleList([nn.Linear(8, 3)])

    def member_logits(self, batch):
        return [[head(batch[0]) for head in heads] for heads in (self.wide, self.narrow)]

    def training_step(self, batch, batch_idx):
        heads = [z for members in self.member_logits(batch) for z in members]
        return torch.stack([nn.functional.cross_entropy(z, batch[1]) for z in heads]).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def best(module, loader, names=TwoHeads.family_names):
    with torch.no_grad():
        parts = [(stack_families(module.member_logits(batch), names), batch[1]) for batch in loader]
    log_p, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    return learn_weights(log_p, targets), log_p, targets


def fit(callback, module=None, **options):
    module = module or TwoHeads()
    trainer = quiet_trainer(**{"max_epochs": 3, "callbacks": [callback], **options})
    torch.manual_seed(1)
    trainer.fit(module, datamodule=TinyData())
    return module, trainer


@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_the_weights_are_the_best_of_the_validation_data(when):
    callback = LearnableEnsembleWeights(when)
    module, trainer = fit(callback)
    expected, log_p, targets = best(module, TinyData().val_dataloader())
    torch.testing.assert_close(callback.w, expected, atol=1e-5, rtol=1e-5)
    assert callback.alpha == pytest.approx(
        dict(zip(("wide", "narrow"), log_alpha(expected).exp().tolist(), strict=True))
    )
    batch = next(iter(TinyData().val_dataloader()))
    mixed = mix(stack_families(module.member_logits(batch), callback.names), log_alpha(expected).float())
    torch.testing.assert_close(callback.log_probabilities(module, batch), mixed)
    if when == "validation":
        logged = trainer.callback_metrics
        assert float(logged["ensemble_alpha/wide"]) == pytest.approx(callback.alpha["wide"], abs=1e-6)
        learned = float(nll_loss(mix(log_p, log_alpha(expected).float()), targets))
        alike = float(nll_loss(mix(log_p, torch.full((2,), -math.log(2))), targets))
        assert float(logged["ensemble_loss"]) == pytest.approx(learned, abs=1e-5)
        assert float(logged["uniform_loss"]) == pytest.approx(alike, abs=1e-5)
        assert learned < alike


@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_training_is_not_touched(when):
    plain, _ = fit(ModelCheckpoint(), enable_checkpointing=True, fast_dev_run=False, max_epochs=0)
    reference = TwoHeads()
    torch.manual_seed(1)
    quiet_trainer(max_epochs=3).fit(reference, datamodule=TinyData())
    module, _ = fit(LearnableEnsembleWeights(when))
    for name, value in reference.state_dict().items():
        assert torch.equal(value, module.state_dict()[name])
    assert plain is not module


def test_values_at_the_end_are_logged(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    fit(LearnableEnsembleWeights(), logger=CSVLogger(tmp_path))
    (table,) = tmp_path.rglob("metrics.csv")
    assert "ensemble_alpha/narrow" in table.read_text()
    assert list(tmp_path.rglob("ensemble_weights.png"))


def test_a_test_gives_the_ensembles_figures():
    callback = LearnableEnsembleWeights()
    module, trainer = fit(callback)
    trainer.test(module, TinyData().test_dataloader()[0], verbose=False)
    _, log_p, targets = best(module, TinyData().test_dataloader()[0])
    mixed = mix(log_p, callback.log_alpha.float())
    assert float(trainer.callback_metrics["test_ensemble_loss"]) == pytest.approx(
        float(nll_loss(mixed, targets)), abs=1e-5
    )
    accuracy = float((mixed.argmax(1) == targets).float().mean())
    assert float(trainer.callback_metrics["test_ensemble_acc"]) == pytest.approx(accuracy)


def test_the_weights_are_kept_in_files(tmp_path):
    def made(callback):
        kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        return {"callbacks": [callback, kept], "enable_checkpointing": True, "default_root_dir": tmp_path}

    reference = LearnableEnsembleWeights("validation")
    fit(reference, **made(reference))
    resumed = LearnableEnsembleWeights("validation")
    quiet_trainer(max_epochs=3, **made(resumed)).fit(
        TwoHeads(), datamodule=TinyData(), ckpt_path=str(tmp_path / "epoch=2.ckpt")
    )
    assert torch.equal(resumed.w, reference.w)
    assert resumed.state_dict() == reference.state_dict()
    tested = LearnableEnsembleWeights()
    trainer = quiet_trainer(**made(tested))
    trainer.test(TwoHeads(), TinyData().test_dataloader()[0], ckpt_path=str(tmp_path / "epoch=2.ckpt"), verbose=False)
    assert torch.equal(tested.w, reference.w)
    assert "test_ensemble_loss" in trainer.callback_metrics


def test_beside_an_ensemble_that_trains_everything():
    callback = LearnableEnsembleWeights()
    module = AwareNet(three_families(), num_classes=3, freeze_members=False, lr=1e-3)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, datamodule=HeldOutData())
    expected, log_p, targets = best(module.eval(), HeldOutData().val_dataloader(), module.family_names)
    torch.testing.assert_close(callback.log_alpha.exp(), log_alpha(expected).exp(), atol=1e-4, rtol=0)
    learned = nll_loss(mix(log_p, callback.log_alpha.float()), targets)
    assert learned <= nll_loss(mix(log_p, module.log_alpha.detach()), targets) + 1e-6  # on what it was not trained on


def _on_a_rank(when):
    torch.set_num_threads(1)
    callback = LearnableEnsembleWeights(when)
    module = AwareNet(three_families(), num_classes=3, freeze_members=False, lr=1e-8, lr_w=1e-8)
    trainer = quiet_trainer(max_epochs=1, devices=2, strategy="ddp", callbacks=[callback])
    trainer.fit(module, datamodule=HeldOutData(7))
    return callback.log_alpha.exp().tolist()


@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_two_ranks_learn_from_all_samples(when):
    callback = LearnableEnsembleWeights()
    module = AwareNet(three_families(), num_classes=3, freeze_members=False, lr=1e-8, lr_w=1e-8)
    quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, datamodule=HeldOutData(7))
    first, second = run_on_two_ranks(_on_a_rank, when)
    assert first == second
    assert first == pytest.approx(callback.log_alpha.exp().tolist(), abs=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_precisions(when, precision):
    callback = LearnableEnsembleWeights(when)
    _, trainer = fit(callback, precision=precision)
    assert sum(callback.alpha.values()) == pytest.approx(1)
    trainer.test(trainer.lightning_module, TinyData().test_dataloader()[0], verbose=False)
    assert trainer.callback_metrics["test_ensemble_loss"].isfinite()


def test_a_validation_that_breaks_off_leaves_nothing_behind():
    class Broken(TwoHeads):
        fails = True

        def validation_step(self, batch, batch_idx):
            if batch_idx == 2 and self.fails and not self.trainer.sanity_checking:
                raise ValueError("broken")

    callback, module = LearnableEnsembleWeights("validation"), Broken()
    with pytest.raises(ValueError, match="broken"):
        fit(callback, module)
    module.fails = False
    module.train()
    fit(callback, module)
    expected, _, _ = best(module, TinyData().val_dataloader())
    torch.testing.assert_close(callback.w, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_nothing_is_learned_outside_a_fit(when):
    callback = LearnableEnsembleWeights(when)
    module, trainer = fit(callback)
    before = callback.w.clone()
    trainer.validate(module, TinyData().test_dataloader()[1], verbose=False)
    assert torch.equal(callback.w, before)
    fresh = LearnableEnsembleWeights(when)
    quiet_trainer(callbacks=[fresh]).validate(module, datamodule=TinyData(), verbose=False)
    assert fresh.w is None


class Misnamed(TwoHeads):
    family_names = ()


class Twins(TwoHeads):
    family_names = ("one", "one")


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (TinyClassifier, {}, "TinyClassifier lacks them"),
        (Misnamed, {}, "family_names; Misnamed lacks them"),
        (Twins, {}, "two families of one name: one, one"),
        (TwoHeads, {"limit_val_batches": 0}, "there is none"),
        (lambda: AwareNet(three_families(), num_classes=3), {}, "learns these weights itself"),
    ],
)
def test_modules_and_trainers_that_cannot_be(module, options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        fit(LearnableEnsembleWeights(), module(), **options)


def test_options_that_cannot_be():
    with pytest.raises(UnsupportedSetup, match="when='never'"):
        LearnableEnsembleWeights("never")
    with pytest.raises(UnsupportedSetup, match=r"K = 2 families"):
        fit(LearnableEnsembleWeights(min_alpha=0.5))
    with pytest.raises(UnsupportedSetup, match="not learned yet"):
        LearnableEnsembleWeights().log_probabilities(TwoHeads(), None)
    callback = LearnableEnsembleWeights()
    fit(callback)
    module = AwareNet(three_families(), num_classes=3, freeze_members=False)
    with pytest.raises(UnsupportedSetup, match="weights are of the families wide, narrow, but AwareNet has good"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, datamodule=HeldOutData())


@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_batches_that_are_no_pairs(when):
    class OfDicts(TwoHeads):
        def member_logits(self, batch):
            return super().member_logits((batch["x"],) if isinstance(batch, dict) else batch)

    x, y = TinyData().val.tensors
    loader = DataLoader([{"x": one, "y": other} for one, other in zip(x, y, strict=True)], 16)
    trainer = quiet_trainer(max_epochs=1, callbacks=[LearnableEnsembleWeights(when)])
    with pytest.raises(UnsupportedSetup, match=r"batches \(inputs, targets\), got dict"):
        trainer.fit(OfDicts(), TinyData().train_dataloader(), loader)


@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_nan_is_not_averaged(when):
    module = TwoHeads()
    module.narrow[0].weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteWeights, match="families narrow predict NaN"):
        fit(LearnableEnsembleWeights(when), module)
