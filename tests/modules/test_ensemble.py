"""AwareNet: frozen members and learned weights, training of everything, files, refusals."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader

from lightning_soup import AwareNet, Family, combine, open_checkpoint
from lightning_soup.cli.main import main
from lightning_soup.errors import (
    IncompatibleIngredients,
    NonFiniteWeights,
    RecipeError,
    UnreadableCheckpoint,
    UnsupportedSetup,
)
from lightning_soup.evaluation.mixture import learn_weights, log_alpha, mix
from lightning_soup.modules import ImageClassifier
from tests.helpers.boring import TinyData
from tests.helpers.families import Counted, HeldOutData, three_families, trained
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks


def ensemble(**options):
    return AwareNet(**{"families": three_families(), "num_classes": 3, **options})


def everything(module, loader):
    """log p_k and targets of a loader."""
    module.eval()
    with torch.no_grad():
        parts = [(module.family_log_probabilities(x), y) for x, y in loader]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


pytestmark = pytest.mark.filterwarnings(
    "ignore:Using `DistributedSampler` with the dataloaders", "ignore:You defined a `validation_step` but have no"
)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ------------------------------------------------------------------------------------------------------------- forward


def test_the_output_is_the_mean_of_means_of_probabilities():
    module = ensemble()
    module.w.data = torch.tensor([0.5, 1.0, -0.5])
    x = torch.randn(7, 8)
    p = 0
    for alpha, members in zip(module.w.softmax(0), module.members, strict=True):
        p = p + alpha * torch.stack([member(x).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(module(x).exp(), p)
    assert [len(members) for members in module.member_logits(x)] == [2, 1, 3]
    assert module.alpha == pytest.approx(
        dict(zip(("good", "small", "random"), module.w.softmax(0).tolist(), strict=True))
    )
    torch.testing.assert_close(module.predict_step((x, None), 0), module(x))


def test_every_family_weighs_the_same_at_the_start():
    assert list(ensemble().alpha.values()) == pytest.approx([1 / 3] * 3)


def test_families_in_every_form():
    a, b, c, d = nn.Linear(8, 3), *(nn.Sequential(nn.Linear(8, 3)) for _ in range(2)), nn.Linear(8, 3)
    module = AwareNet([a, [b, c], Family(modules=[d], name="rest"), "test_byobnet"], 2, num_classes=3)
    assert module.family_names == ["Linear", "Sequential", "rest", "test_byobnet"]
    assert [len(members) for members in module.members] == [1, 2, 1, 2]
    assert [member for members in module.members for member in members][:4] == [a, b, c, d]


# ------------------------------------------------------------------------------------------------------ frozen members


def test_the_best_weights_are_learned_from_one_pass_over_held_out_data():
    module, data = ensemble(), HeldOutData()
    before = state(module.members)
    trainer = quiet_trainer(max_epochs=50)
    trainer.fit(module, datamodule=data)
    assert same(before, state(module.members))
    for members in module.members:
        assert [member.seen for member in members] == [60] * len(members)  # the validation set, once
    log_p, targets = everything(module, data.val_dataloader())
    best = learn_weights(log_p, targets)
    torch.testing.assert_close(module.log_alpha.exp(), log_alpha(best).exp().float(), atol=1e-3, rtol=0)
    loss = nll_loss(mix(log_p, module.log_alpha), targets).detach()
    assert float(loss) <= float(nll_loss(mix(log_p, log_alpha(best).float()), targets)) + 1e-6
    assert float(loss) < float(nll_loss(mix(log_p, torch.full((3,), -math.log(3))), targets))
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(loss), abs=1e-6)
    assert module.alpha["random"] < 0.05
    assert trainer.current_epoch == 2  # it stopped when nothing changed
    assert trainer.callback_metrics["alpha/good"] == pytest.approx(module.alpha["good"])
    entropy = -sum(a * math.log(max(a, 1e-30)) for a in module.alpha.values())
    assert float(trainer.callback_metrics["alpha_entropy"]) == pytest.approx(entropy, abs=1e-5)


def test_members_stay_in_evaluation_mode():
    module = AwareNet(three_families(batch_norm=True), num_classes=3)
    before = state(module)
    seen = []
    member = module.members[0][0]
    member.register_forward_hook(lambda *_: seen.append(member.training))
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, datamodule=HeldOutData())
    trainer.test(module, datamodule=HeldOutData(), verbose=False)
    module.train()
    assert not any(seen)
    assert not any(part.training for part in module.members.modules())
    assert same({n: v for n, v in before.items() if n != "w"}, {n: v for n, v in state(module).items() if n != "w"})


def test_learning_on_the_training_loader_where_members_were_trained_elsewhere():
    module, data = ensemble(learn_on="train"), HeldOutData()
    quiet_trainer(max_epochs=5).fit(module, datamodule=data)
    log_p, targets = everything(module, DataLoader(data.data.train, 96))
    best = log_alpha(learn_weights(log_p, targets)).exp().float()
    torch.testing.assert_close(module.log_alpha.exp(), best, atol=1e-3, rtol=0)


def test_loaders_instead_of_a_data_module():
    module, data = ensemble(), TinyData()
    quiet_trainer(max_epochs=5).fit(module, data.train_dataloader(), data.val_dataloader())
    reference = ensemble()
    quiet_trainer(max_epochs=5).fit(reference, datamodule=HeldOutData())
    torch.testing.assert_close(module.w, reference.w)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 1e-6},
        {"num_sanity_val_steps": 0},
        {"max_epochs": 1},
        {"limit_train_batches": 0.1},
        {"val_check_interval": 3},
        {"val_check_interval": 0.5},
        {"val_check_interval": "00:00:00:01"},
        {"limit_train_batches": 0.1, "reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_the_trainers_options_do_not_change_what_is_best(options):
    module, reference = ensemble(), ensemble()
    quiet_trainer(**{"max_epochs": 5, **options}).fit(module, datamodule=HeldOutData())
    quiet_trainer(max_epochs=5).fit(reference, datamodule=HeldOutData())
    torch.testing.assert_close(module.log_alpha.exp(), reference.log_alpha.exp(), atol=1e-3, rtol=0)


def test_held_out_data_without_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(TinyData().val)

    module, reference = ensemble(), ensemble()
    quiet_trainer(max_epochs=5).fit(module, TinyData().train_dataloader(), DataLoader(Stream(), 16))
    quiet_trainer(max_epochs=5).fit(reference, datamodule=HeldOutData())
    assert torch.equal(module.w, reference.w)


@pytest.mark.parametrize(("learn_on", "other"), [("val", "train"), ("train", "val")])
def test_a_share_of_the_held_out_data(learn_on, other):
    module, data = ensemble(learn_on=learn_on), HeldOutData()
    trainer = quiet_trainer(max_epochs=5, **{f"limit_{learn_on}_batches": 0.5, f"limit_{other}_batches": 1})
    trainer.fit(module, datamodule=data)
    assert module.members[0][0].seen == {"val": 2, "train": 3}[learn_on] * 16
    assert getattr(trainer, f"limit_{learn_on}_batches") == 0.5  # as before


def test_learning_on_the_training_loader_without_validation():
    module, reference = ensemble(learn_on="train"), ensemble(learn_on="train")
    quiet_trainer(max_epochs=5, limit_val_batches=0).fit(module, datamodule=HeldOutData())
    quiet_trainer(max_epochs=5).fit(reference, datamodule=HeldOutData())
    torch.testing.assert_close(module.log_alpha.exp(), reference.log_alpha.exp(), atol=1e-3, rtol=0)


def test_another_optimizer_takes_as_many_steps_as_it_is_given():
    class Slow(AwareNet):
        def configure_optimizers(self):
            return torch.optim.SGD([self.w], 1e-3)

    module = Slow(three_families(), num_classes=3)
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(module, datamodule=HeldOutData())
    assert trainer.global_step == 5


def test_a_callback_that_asks_for_the_number_of_steps():
    class Asking(Callback):
        def setup(self, trainer, pl_module, stage):
            assert trainer.estimated_stepping_batches == 30  # which makes the loader of the training images

    module, reference = ensemble(), ensemble()
    trainer = quiet_trainer(max_epochs=5, callbacks=[Asking()])
    trainer.fit(module, datamodule=HeldOutData())
    quiet_trainer(max_epochs=5).fit(reference, datamodule=HeldOutData())
    assert torch.equal(module.w, reference.w)
    assert (module.members[0][0].seen, trainer.global_step) == (60, 2)


def test_bf16_mixed_predicts_in_bf16_and_mixes_in_float32():
    module, data = ensemble(), HeldOutData()
    quiet_trainer(max_epochs=5, precision="bf16-mixed").fit(module, datamodule=data)
    with torch.autocast("cpu", torch.bfloat16):
        log_p, targets = everything(module, data.val_dataloader())
    assert log_p.dtype == torch.float32
    best = log_alpha(learn_weights(log_p, targets)).exp().float()
    torch.testing.assert_close(module.log_alpha.exp(), best, atol=1e-3, rtol=0)


def test_a_floor_holds():
    module = ensemble(min_alpha=0.1)
    quiet_trainer(max_epochs=5).fit(module, datamodule=HeldOutData())
    assert module.alpha["random"] == pytest.approx(0.1, abs=1e-3)


def test_hooks_of_the_data_module_see_images_and_not_predictions():
    class Augmenting(HeldOutData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert isinstance(batch, list)
            assert batch[0].shape[1:] == (8,)
            return batch

    module, data = ensemble(), Augmenting()
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, datamodule=data)
    assert trainer.fit_loop._data_source.instance is data  # as before
    trainer.validate(module, datamodule=data, verbose=False)


def test_the_fit_goes_on_from_a_file(tmp_path):
    def fit(**more):
        module, kept = ensemble(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = quiet_trainer(max_epochs=5, callbacks=[kept], enable_checkpointing=True, default_root_dir=tmp_path)
        trainer.fit(module, datamodule=HeldOutData(), **more)
        return module

    reference = fit()
    module = fit(ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert torch.equal(module.w, reference.w)
    assert module.history == reference.history


def _fit_on_two_ranks(batch_size):
    torch.set_num_threads(1)
    module = ensemble()
    trainer = quiet_trainer(max_epochs=5, devices=2, strategy="ddp")
    trainer.fit(module, datamodule=HeldOutData(batch_size))
    seen = sum(member.seen for member in module.members[0])
    trainer.test(module, datamodule=HeldOutData(batch_size), verbose=False)
    return module.w.tolist(), seen, {name: float(value) for name, value in trainer.callback_metrics.items()}


def _train_on_two_ranks():
    torch.set_num_threads(1)
    module = ensemble(freeze_members=False)
    quiet_trainer(max_epochs=2, devices=2, strategy="ddp").fit(module, datamodule=HeldOutData())
    return {name: value.tolist() for name, value in module.state_dict().items()}


def test_two_ranks_share_the_work_and_learn_the_same():
    alone = ensemble()
    trainer = quiet_trainer(max_epochs=5)
    trainer.fit(alone, datamodule=HeldOutData())
    trainer.test(alone, datamodule=HeldOutData(), verbose=False)
    first, second = run_on_two_ranks(_fit_on_two_ranks, 7)  # 60 images in batches of 7: uneven shares
    assert first[0] == second[0]
    torch.testing.assert_close(torch.tensor(first[0]), alone.w.detach(), atol=1e-3, rtol=1e-3)
    assert first[1] == second[1] == 2 * 30  # two members, half of the images each
    for name, value in trainer.callback_metrics.items():
        if name.startswith(("test_auc", "test_f1", "test_acc")):
            assert first[2][name] == pytest.approx(float(value), abs=1e-3)


def test_two_ranks_train_members_alike():
    first, second = run_on_two_ranks(_train_on_two_ranks)
    assert first == second


# ------------------------------------------------------------------------------------------------- training everything


def test_training_everything_is_the_plain_loop():
    seed_everything(0, verbose=False)
    module = ensemble(freeze_members=False, lr=1e-2, warmup=0, weight_decay=0.1)
    reference = copy.deepcopy(module)
    loader = DataLoader(TinyData().train, 16)
    quiet_trainer(max_epochs=1, limit_val_batches=0).fit(module, loader)
    decayed = [p for p in reference.members.parameters() if p.ndim > 1]
    rest = [p for p in reference.members.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": rest, "weight_decay": 0.0},
            {"params": [reference.w], "weight_decay": 0.0, "lr": 1e-1},
        ],
        lr=1e-2,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / 6)))
    reference.train()
    for x, y in loader:
        optimizer.zero_grad()
        p = sum(
            a * torch.stack([m(x).softmax(1) for m in ms]).mean(0)
            for a, ms in zip(reference.w.softmax(0), reference.members, strict=True)
        )
        (-p[range(len(y)), y].log().mean()).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(module.state_dict(), reference.state_dict(), atol=2e-5, rtol=1e-4)
    assert not torch.equal(module.w, torch.zeros(3))


def test_the_weights_have_a_rate_of_their_own_and_no_decay():
    for lr_w, expected in ((None, 3e-3), (0.5, 0.5)):
        module = ensemble(freeze_members=False, lr=3e-4, lr_w=lr_w)
        (group,) = [group for group in module.parameter_groups() if group["params"][0] is module.w]
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(expected), 0.0)


def test_members_that_share_layers_are_trained_once():
    torch.manual_seed(0)
    trunk = nn.Linear(8, 8)
    heads = [nn.Sequential(trunk, nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)]
    families = [Family(name="two", modules=heads[:2]), Family(name="one", modules=heads[2:])]
    module = AwareNet(families, num_classes=3, freeze_members=False)
    before = trunk.weight.clone()
    quiet_trainer(max_epochs=1).fit(module, datamodule=HeldOutData())
    optimized = [parameter for group in module.parameter_groups() for parameter in group["params"]]
    assert len(optimized) == len(set(optimized)) == len(list(module.parameters()))
    assert not torch.equal(trunk.weight, before)


def test_label_smoothing_is_that_of_cross_entropy():
    module = ensemble(freeze_members=False, label_smoothing=0.2)
    log_p, targets = torch.randn(6, 3).log_softmax(1), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = nn.functional.cross_entropy(log_p, targets, label_smoothing=0.2)
    torch.testing.assert_close(module._train_loss(log_p, targets), expected)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_training_everything_resumes_bit_exactly(tmp_path, options):
    def fit(**more):
        seed_everything(3, verbose=False)
        module = AwareNet(three_families(batch_norm=True), num_classes=3, freeze_members=False, lr=1e-2)
        kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        options.update(callbacks=[kept], enable_checkpointing=True, default_root_dir=tmp_path)
        trainer = quiet_trainer(max_epochs=4, **options)
        trainer.fit(module, DataLoader(TinyData().train, 16), DataLoader(TinyData().val, 16), **more)
        return module

    reference = fit()
    resumed = fit(ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert same(state(reference), state(resumed))
    assert reference.history == resumed.history


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_a_compiled_ensemble_trains():
    torch.manual_seed(0)
    module = ensemble(freeze_members=False, lr=1e-2)
    reference = copy.deepcopy(module)
    loader = DataLoader(TinyData().train, 16)
    quiet_trainer(max_epochs=1, limit_val_batches=0).fit(torch.compile(module, backend="eager"), loader)
    quiet_trainer(max_epochs=1, limit_val_batches=0).fit(reference, loader)
    torch.testing.assert_close(state(module), state(reference), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- checkpoints of members


SMALL = {"model_name": "vit_tiny_patch16_224", "img_size": 28, "in_chans": 1}
ARGS = {"patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 2, "global_pool": "avg", "class_token": False}


def classifier(seed, **options):
    torch.manual_seed(seed)
    return ImageClassifier(**SMALL, model_args=ARGS, num_classes=2, **options)


@pytest.fixture
def member_files(tmp_path):
    """Three fine-tunes of one start, as Lightning writes them."""
    start = classifier(0)
    for number in range(3):
        module = copy.deepcopy(start)
        torch.manual_seed(number)
        for parameter in module.model.parameters():
            parameter.data += 0.002 * torch.randn_like(parameter)
        trainer = quiet_trainer(max_epochs=0)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / f"member{number}.ckpt")
    return tmp_path


def vit(folder, **options):
    return Family(
        **{
            "model": SMALL["model_name"],
            "img_size": 28,
            "model_args": ARGS,
            "name": "vit",
            "checkpoints": [f"{folder}/member*.ckpt"],
            **options,
        }
    )


def images():
    return torch.rand(5, 1, 28, 28)


def test_members_from_checkpoints(member_files):
    module = AwareNet([vit(member_files)], in_chans=1)
    assert len(module.members[0]) == 3
    for number, member in enumerate(module.members[0]):
        kept = open_checkpoint(member_files / f"member{number}.ckpt")
        assert all(torch.equal(kept[f"model.{name}"], value) for name, value in member.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.members.parameters())


def test_an_ensemble_loads_from_its_file_alone(member_files, tmp_path):
    module = AwareNet(
        [vit(member_files), vit(member_files, name="two", checkpoints=[str(member_files / "member1.ckpt")])], in_chans=1
    )
    module.w.data = torch.tensor([0.3, -0.2])
    trainer = quiet_trainer(max_epochs=0)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "ensemble.ckpt")
    for path in member_files.glob("member*.ckpt"):
        path.unlink()
    loaded = AwareNet.load_from_checkpoint(tmp_path / "ensemble.ckpt")
    x = images()
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert loaded.family_names == ["vit", "two"]


def test_tier_1_as_a_soup(member_files):
    module = AwareNet([vit(member_files)], in_chans=1, tier1="soup")
    assert len(module.members[0]) == 1
    files = [open_checkpoint(path) for path in sorted(member_files.glob("member*.ckpt"))]
    mean = combine(files, [1 / 3] * 3)
    assert all(torch.equal(mean[f"model.{name}"], value) for name, value in module.members[0][0].state_dict().items())


def test_a_soup_of_members_that_did_not_start_alike_is_refused(member_files):
    trainer = quiet_trainer(max_epochs=0)
    trainer.strategy.connect(classifier(99))
    trainer.save_checkpoint(member_files / "member2.ckpt")
    with pytest.raises(RecipeError):
        AwareNet([vit(member_files)], in_chans=1, tier1="soup")
    AwareNet([vit(member_files)], in_chans=1)  # their predictions can be averaged


def test_the_statistics_of_a_soup_are_its_own(tmp_path):
    start = trained(0, batch_norm=True)
    for number in range(2):
        network = copy.deepcopy(start).train()
        torch.manual_seed(number)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        for x, _ in TinyData().train_dataloader():
            network(x)
        torch.save(network.state_dict(), tmp_path / f"{number}.pt")
    shape = partial(Counted, batch_norm=True)
    family = Family(name="soup", modules=[shape(), shape()], checkpoints=[f"{tmp_path}/*.pt"])
    other = Family(name="alone", modules=[trained(5, batch_norm=True)])
    module = AwareNet([family], num_classes=3, tier1="soup")
    mean = state(module.members[0][0])
    quiet_trainer(max_epochs=1).fit(module, datamodule=HeldOutData())
    soup = module.members[0][0]
    hidden = soup.net[0](TinyData().train.tensors[0])
    torch.testing.assert_close(soup.net[1].running_mean, hidden.mean(0).detach(), atol=0.02, rtol=0)
    assert not torch.equal(soup.net[1].running_mean, mean["net.1.running_mean"])
    assert torch.equal(soup.net[0].weight, mean["net.0.weight"])
    with pytest.raises(UnsupportedSetup, match="alone has 0 checkpoints"):
        AwareNet([family, other], num_classes=3, tier1="soup")


def test_a_soup_with_frozen_statistics_keeps_them(tmp_path):
    start = trained(0, batch_norm=True)
    for number in range(2):
        network = copy.deepcopy(start)
        network.net[0].weight.data += 0.01 * number
        torch.save(network.state_dict(), tmp_path / f"{number}.pt")
    family = Family(name="soup", modules=[Counted(batch_norm=True) for _ in range(2)], checkpoints=[f"{tmp_path}/*.pt"])
    module = AwareNet([family], num_classes=3, tier1="soup")
    quiet_trainer(max_epochs=1).fit(module, datamodule=HeldOutData())
    assert torch.equal(module.members[0][0].net[1].running_mean, start.net[1].running_mean)


# --------------------------------------------------------------------------------------------------------- evaluation


class TwoClasses(LightningDataModule):
    class_names = ("fake", "real")
    num_classes = 2

    def __init__(self, one_class=False):
        super().__init__()
        torch.manual_seed(0)
        x, y = torch.randn(40, 8), (torch.arange(40) % 4 == 0).long()
        x[:, 0] += 2.0 * y
        self.set = torch.utils.data.TensorDataset(x, torch.zeros_like(y) if one_class else y)

    def train_dataloader(self):
        return DataLoader(self.set, 10)

    val_dataloader = test_dataloader = train_dataloader


def test_the_positive_class_by_name():
    def tested(positive):
        torch.manual_seed(1)
        module = AwareNet([nn.Linear(8, 2)], positive=positive)
        trainer = quiet_trainer()
        trainer.test(module, datamodule=TwoClasses(), verbose=False)
        return module, {name: float(value) for name, value in trainer.callback_metrics.items()}

    module, fake = tested("fake")
    assert fake == tested(0)[1]
    assert fake["test_f1"] != tested("real")[1]["test_f1"]
    x, y = TwoClasses().set.tensors
    detected = module(x).detach()[:, 0].exp() > 0.5
    hits = (detected & (y == 0)).sum()
    assert fake["test_f1"] == pytest.approx(float(2 * hits / (detected.sum() + (y == 0).sum())))
    assert fake["test_loss"] == pytest.approx(float(nll_loss(module(x), y).detach()), abs=1e-6)


def test_one_class_only_is_nan_and_a_warning():
    trainer = quiet_trainer()
    with pytest.warns(UserWarning, match="not defined"):
        trainer.test(AwareNet([nn.Linear(8, 2)]), datamodule=TwoClasses(one_class=True), verbose=False)
    assert trainer.callback_metrics["test_auc"].isnan()


def test_the_normalisation_is_that_of_the_data_at_hand():
    class Normalised(TwoClasses):
        def __init__(self, mean):
            super().__init__()
            self.preprocessing = SimpleNamespace(mean=[mean], std=[0.5])

    module = AwareNet([nn.Linear(8, 2)])
    quiet_trainer(max_epochs=1).fit(module, datamodule=Normalised(0.5))
    quiet_trainer().test(module, datamodule=Normalised(0.1), verbose=False)
    assert module.hparams.data_mean == [0.1]


def test_several_test_sets_are_told_apart():
    trainer = quiet_trainer()
    trainer.test(ensemble(), datamodule=HeldOutData(), verbose=False)
    assert {"test_auc", "test_auc/shifted", "test_f1/shifted", "test_acc"} <= trainer.callback_metrics.keys()


def test_the_picture_is_drawn(tmp_path):
    trainer = quiet_trainer(max_epochs=3, default_root_dir=tmp_path, enable_checkpointing=True)
    trainer.fit(ensemble(), datamodule=HeldOutData())
    assert (tmp_path / "family_weights.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_keeps_nothing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet_trainer(max_epochs=1).fit(ensemble(), datamodule=HeldOutData())
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": []}, "at least one family"),
        ({"families": [nn.Linear(8, 3), nn.Linear(8, 3)]}, "Two families are called Linear"),
        ({"min_alpha": 0.4}, "1/K = 0.3333 for K = 3"),
        ({"num_classes": 1}, "one_logit=True"),
        ({"one_logit": True}, "num_classes=3"),
        ({"members_per_family": 0}, "members_per_family=0"),
        ({"tier1": "logits"}, "'prob' or 'soup'"),
        ({"learn_on": "test"}, "'val' or 'train'"),
        ({"lr_w": 0.0}, "lr_w=0.0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"families": ["resnet1888"]}, "timm has no model of this name"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        ensemble(**options)


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        ({"precision": "bf16-true"}, {}, "bf16-mixed"),
        ({"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}, {}, "L-BFGS"),
        ({"limit_train_batches": 0}, {}, "limit_train_batches=0"),
        ({"limit_val_batches": 0}, {}, "no validation loader|no held-out batches"),
        ({}, {"num_classes": 3, "class_names": ["c", "b", "a"]}, "The classes of the data are a, b, c"),
        ({}, {"positive": "zebra"}, "positive='zebra' is not one of the classes a, b, c"),
        ({}, {"positive": 7}, "positive=7"),
        ({}, {"class_names": ["a"]}, "expected"),
    ],
)
def test_fits_that_cannot_be(trainer, options, message):
    module = ensemble(**options)
    before = state(module)
    with pytest.raises(UnsupportedSetup, match=message):
        quiet_trainer(max_epochs=1, **trainer).fit(module, datamodule=HeldOutData())
    assert {n: v.float() for n, v in before.items()}.keys() == state(module).keys()


def test_no_validation_data():
    with pytest.raises(UnsupportedSetup, match="no validation loader"):
        quiet_trainer(max_epochs=1).fit(ensemble(), TinyData().train_dataloader())


def test_frozen_members_that_know_nothing():
    module = AwareNet([Family(SMALL["model_name"], img_size=28, model_args=ARGS)], in_chans=1)
    with pytest.raises(UnsupportedSetup, match="members of vit_tiny_patch16_224 have random weights"):
        quiet_trainer(max_epochs=1).fit(module, datamodule=TwoClasses())


def test_a_member_that_predicts_nan():
    module = ensemble()
    module.members[1][0].net[0].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeights, match="families small predict NaN"):
        quiet_trainer(max_epochs=1).fit(module, datamodule=HeldOutData())


def test_targets_that_are_no_classes():
    x, y = TinyData().val.tensors
    loader = DataLoader(torch.utils.data.TensorDataset(x, y + 1), 16)
    with pytest.raises(UnsupportedSetup, match="Targets run from 1 to 3, but the members answer for 3 classes"):
        quiet_trainer(max_epochs=1).fit(ensemble(), TinyData().train_dataloader(), loader)


@pytest.mark.parametrize("change", [torch.Tensor.float, lambda y: y[:, None], lambda y: nn.functional.one_hot(y, 3)])
def test_targets_that_are_no_numbers_of_classes(change):
    x, y = TinyData().val.tensors
    loader = DataLoader(torch.utils.data.TensorDataset(x, change(y)), 16)
    with pytest.raises(UnsupportedSetup, match=r"The targets are .*; expected .* torch.int64 of shape \[16\]"):
        quiet_trainer(max_epochs=1).fit(ensemble(), TinyData().train_dataloader(), loader)


def test_data_of_other_classes():
    with pytest.raises(UnsupportedSetup, match="data has 3 classes, the ensemble 2"):
        quiet_trainer().test(AwareNet([nn.Linear(8, 2)]), datamodule=HeldOutData(), verbose=False)


def test_members_of_other_classes():
    with pytest.raises(UnsupportedSetup, match="Member 1 of the family two"):
        AwareNet([nn.Linear(8, 3), Family(modules=[nn.Linear(8, 2)], name="two")], num_classes=3)(torch.randn(2, 8))


def test_a_checkpoint_that_does_not_fit(member_files, tmp_path):
    wider = vit(member_files, model_args={**ARGS, "embed_dim": 32})
    with pytest.raises(UnsupportedSetup, match=r"member0.ckpt does not fit the model(.|\n)*the family's model"):
        AwareNet([wider], in_chans=1)
    with pytest.raises(UnreadableCheckpoint, match=r"none\.ckpt"):
        AwareNet([vit(member_files, checkpoints=[str(tmp_path / "none.ckpt")])], in_chans=1)
    with pytest.raises(UnsupportedSetup, match=r"no file is called .*nothing"):
        AwareNet([vit(member_files, checkpoints=[f"{tmp_path}/nothing*.ckpt"])], in_chans=1)
    assert issubclass(IncompatibleIngredients, Exception)


def test_members_with_another_order_of_classes(tmp_path):
    class Swapped(TwoClasses):
        class_names = ("real", "fake")

    class Small(ImageClassifier):
        def forward(self, x):
            return super().forward(x.new_zeros(len(x), 1, 28, 28))

    torch.manual_seed(0)
    module = Small(**SMALL, model_args=ARGS, num_classes=2)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, datamodule=Swapped())
    trainer.save_checkpoint(tmp_path / "member0.ckpt")
    assert open_checkpoint(tmp_path / "member0.ckpt").metadata["class_names"] == ["real", "fake"]
    ours = AwareNet([vit(tmp_path)], in_chans=1)
    with pytest.raises(
        UnsupportedSetup, match=r"classes of .*member0.ckpt are real, fake, in this order; expected fake, real"
    ):
        quiet_trainer(max_epochs=1).fit(ours, datamodule=TwoClasses())


@pytest.mark.parametrize("frozen", [True, False])
def test_a_fit_does_not_go_on_from_one_of_the_other_kind(frozen, tmp_path):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(ensemble(freeze_members=frozen), datamodule=HeldOutData())
    path = tmp_path / "end.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(UnsupportedSetup, match=f"training with freeze_members={frozen}"):
        quiet_trainer(max_epochs=2).fit(ensemble(freeze_members=not frozen), datamodule=HeldOutData(), ckpt_path=path)
    module = AwareNet.load_from_checkpoint(path, families=three_families(), freeze_members=not frozen)
    quiet_trainer(max_epochs=2).fit(module, datamodule=HeldOutData())


def test_members_that_disagree_on_the_order_of_classes(member_files):
    for number, names in enumerate([["fake", "real"], ["real", "fake"]]):
        path = member_files / f"member{number}.ckpt"
        torch.save({**torch.load(path, weights_only=True), "class_names": names}, path)
    module = AwareNet([vit(member_files)], in_chans=1)
    loader = DataLoader(torch.utils.data.TensorDataset(images(), torch.tensor([0, 1, 0, 1, 0])), 5)
    with pytest.raises(UnsupportedSetup, match=r"classes of .*member1.ckpt are real, fake, .*expected fake, real"):
        quiet_trainer(max_epochs=1).fit(module, loader, loader)  # which name no classes


def test_the_file_of_another_ensemble(tmp_path):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(ensemble(), datamodule=HeldOutData())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    good, small, random = three_families()
    with pytest.raises(
        UnsupportedSetup,
        match=r"families \['good', 'small', 'random'\], but this one has \['good', 'random', 'small'\]",
    ):
        quiet_trainer(max_epochs=1).fit(
            ensemble(families=[good, random, small]), datamodule=HeldOutData(), ckpt_path=str(tmp_path / "end.ckpt")
        )
    fewer = Family(name="random", modules=[trained(9)])
    with pytest.raises(UnsupportedSetup, match="sizes"):
        AwareNet.load_from_checkpoint(tmp_path / "end.ckpt", families=[good, small, fewer])
    with pytest.raises(UnsupportedSetup, match="expected either"):
        AwareNet.load_from_checkpoint(tmp_path / "end.ckpt")


# ----------------------------------------------------------------------------------------------------------------- CLI


def test_a_config_goes_on_from_a_file(member_files, tmp_path):
    """The CLI builds the ensemble from the checkpoint's hyperparameters, which name no files."""
    config = tmp_path / "config.yaml"
    for number in range(2):
        torch.manual_seed(number)
        trainer = quiet_trainer(max_epochs=0)
        trainer.strategy.connect(ImageClassifier(**SMALL, model_args=ARGS, num_classes=10))
        trainer.save_checkpoint(tmp_path / f"ten{number}.ckpt")
    config.write_text(f"""
seed_everything: 0
trainer:
  max_epochs: 5
  accelerator: cpu
  logger: false
  default_root_dir: {tmp_path}
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {tmp_path}, save_top_k: -1, filename: "at{{epoch}}", save_last: true}}
model:
  class_path: lightning_soup.modules.AwareNet
  init_args:
    in_chans: 1
    num_classes: 10
    families:
      - {{model: vit_tiny_patch16_224, img_size: 28, model_args: {ARGS}, name: a, checkpoints: [{tmp_path}/ten0.ckpt]}}
      - {{model: vit_tiny_patch16_224, img_size: 28, model_args: {ARGS}, name: b, checkpoints: [{tmp_path}/*n0.ckpt]}}
data:
  class_path: lightning_soup.data.HandwritingDataModule
  init_args: {{train_size: 50, val_size: 50, corrupted: none}}
""")
    main(["fit", "--config", str(config)])
    expected = AwareNet.load_from_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").unlink()
    main(["fit", "--config", str(config), "--ckpt_path", str(tmp_path / "atepoch=0.ckpt")])
    resumed = AwareNet.load_from_checkpoint(tmp_path / "last.ckpt")
    assert same(state(resumed), state(expected))


def test_from_a_config(member_files, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(f"""
seed_everything: 0
trainer:
  {{max_epochs: 4, accelerator: cpu, logger: false, default_root_dir: {tmp_path}, enable_progress_bar: false,
   enable_model_summary: false, log_every_n_steps: 1}}
model:
  class_path: lightning_soup.modules.AwareNet
  init_args:
    in_chans: 1
    num_classes: 10
    freeze_members: false
    families:
      - {{model: vit_tiny_patch16_224, img_size: 28, model_args: {ARGS}, name: vit, members: 2}}
      - test_efficientnet
    members_per_family: 1
data:
  class_path: lightning_soup.data.HandwritingDataModule
  init_args: {{train_size: 50, val_size: 50, corrupted: none}}
""")
    main(["fit", "--config", str(config)])
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    loaded = AwareNet.load_from_checkpoint(path)
    assert [len(members) for members in loaded.members] == [2, 1]
    main(["test", "--config", str(config), "--ckpt_path", str(path)])
    assert "test_auc" in capsys.readouterr().out
