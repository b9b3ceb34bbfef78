import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from timm.layers import resample_abs_pos_embed
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.classifier import ImageClassifier
from lightning_soup.weights import save_weights
from tests.helpers.images import write_folders, write_mnist
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks

TINY = {
    "model_name": "vit_tiny_patch16_224",
    "img_size": 8,
    "in_chans": 1,
    "num_classes": 3,
    "model_args": {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "lr": 5e-3,
}


class Shapes(LightningDataModule):
    """Three classes of 8×8 images: the brightest row tells. 48 train, 21 val, 15 + 9 test images."""

    test_names = ("test", "dark")

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def images(count, factor=1.0):
            targets = torch.arange(count) % 3
            x = torch.rand(count, 1, 8, 8, generator=generator)
            x[torch.arange(count), 0, 3 * targets] += 1.0
            return TensorDataset(factor * x, targets)

        self.train, self.val, self.tests = images(48), images(21), [images(15), images(9, 0.3)]

    def train_dataloader(self):
        return DataLoader(self.train, 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 8)

    def test_dataloader(self):
        return [DataLoader(test, 8) for test in self.tests]


def fit(model=None, **options):
    seed_everything(0, verbose=False)
    model = model or ImageClassifier(**TINY)
    trainer = quiet_trainer(**{"max_epochs": 2, **options})
    trainer.fit(model, datamodule=Shapes())
    return trainer, model


def by_hand(model, dataset):
    images, targets = dataset.tensors
    with torch.no_grad():
        logits = model.eval()(images)
        model.train()
        return (logits.argmax(1) == targets).float().mean().item(), F.cross_entropy(logits, targets).item()


def weights(model):
    return torch.cat([parameter.detach().flatten().float() for parameter in model.parameters()])


def test_it_learns_and_logs():
    trainer, model = fit(max_epochs=20)
    assert trainer.callback_metrics["val_acc"] > 0.9
    assert {"train_loss", "val_loss", "val_acc"} <= trainer.callback_metrics.keys()
    accuracy, loss = by_hand(model, Shapes().val)
    assert trainer.callback_metrics["val_acc"].item() == pytest.approx(accuracy)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(loss, abs=1e-5)


def test_every_test_set_has_its_name():
    trainer, model = fit()
    data = Shapes()
    results = trainer.test(model, datamodule=data, verbose=False)
    for result, suffix, dataset in zip(results, ("", "/dark"), data.tests, strict=True):
        accuracy, loss = by_hand(model, dataset)
        assert result == {
            f"test_acc{suffix}": pytest.approx(accuracy),
            f"test_loss{suffix}": pytest.approx(loss, abs=1e-5),
        }
    del Shapes.test_names
    try:
        results = trainer.test(model, datamodule=Shapes(), verbose=False)
    finally:
        Shapes.test_names = ("test", "dark")
    assert results[1].keys() == {"test_acc/1", "test_loss/1"}


def test_validating_testing_and_fitting_in_turns():
    """States made in inference mode must not break a later fit, nor counts be carried over."""
    model = ImageClassifier(**TINY)
    for _ in range(2):
        quiet_trainer().validate(model, datamodule=Shapes(), verbose=False)
        first = quiet_trainer().test(model, datamodule=Shapes(), verbose=False)
        assert quiet_trainer().test(model, datamodule=Shapes(), verbose=False) == first
        trainer, _ = fit(model)
        assert trainer.callback_metrics["val_acc"].item() == pytest.approx(by_hand(model, Shapes().val)[0])


class Interrupted(ImageClassifier):
    def validation_step(self, batch, batch_idx):
        if batch_idx == 1:
            raise InterruptedError
        return super().validation_step(batch, batch_idx)


def test_counts_of_a_validation_that_was_broken_off_are_dropped():
    model = Interrupted(**TINY)
    with pytest.raises(InterruptedError):
        quiet_trainer().validate(model, datamodule=Shapes(), verbose=False)
    model.validation_step = super(Interrupted, model).validation_step
    (result,) = quiet_trainer().validate(model, datamodule=Shapes(), verbose=False)
    assert result["val_acc"] == pytest.approx(by_hand(model, Shapes().val)[0])


def test_steps_without_a_trainer():
    model = ImageClassifier(**TINY).eval()
    images, targets = next(iter(Shapes().val_dataloader()))
    loss = model.validation_step((images, targets), 0)  # a warning would be an error here
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(model(images), targets).item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(model.training_step((images, targets), 0), loss)
    for batch in ((images, targets), [images, targets], images):
        assert torch.equal(model.predict_step(batch, 0), model(images))


def test_validation_loss_is_plain_whatever_training_uses():
    plain, smooth = ImageClassifier(**TINY).eval(), ImageClassifier(**TINY, label_smoothing=0.3, mixup=0.4).eval()
    smooth.load_state_dict(plain.state_dict())
    batch = next(iter(Shapes().val_dataloader()))
    assert torch.equal(plain.validation_step(batch), smooth.validation_step(batch))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixup_is_the_cross_entropy_of_soft_targets(smoothing):
    model = ImageClassifier(**TINY, label_smoothing=smoothing, mixup=0.5)
    images, targets = next(iter(Shapes().val_dataloader()))
    torch.manual_seed(11)
    loss = model.training_step((images, targets), 0)
    torch.manual_seed(11)
    blend = torch.distributions.Beta(0.5, 0.5).sample()
    partner = torch.randperm(len(images))
    one_hot = F.one_hot(targets, 3).float() * (1 - smoothing) + smoothing / 3
    mixed = model(blend * images + (1 - blend) * images[partner])
    expected = F.cross_entropy(mixed, blend * one_hot + (1 - blend) * one_hot[partner])
    torch.testing.assert_close(loss, expected)
    assert 0.01 < blend < 0.99


def test_learning_rate_follows_the_optimizer_steps():
    rates = []

    class Watched(ImageClassifier):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    fit(Watched(**{**TINY, "warmup": 0.25, "lr": 1.0}), accumulate_grad_batches=3, max_epochs=4, max_steps=-1)
    assert len(rates) == 8  # 6 batches, 2 steps in each of 4 epochs
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[5] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.1


class Endless(IterableDataset):
    def __iter__(self):
        yield from Shapes().train


def test_trainings_without_an_end():
    loader = DataLoader(Endless(), 8)
    with pytest.raises(UnsupportedSetup, match=r"warmup=0\.1 is a fraction"):
        quiet_trainer(max_epochs=1).fit(ImageClassifier(**TINY), loader, loader)
    model = ImageClassifier(**{**TINY, "warmup": 4})
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, loader, loader)
    assert trainer.optimizers[0].param_groups[0]["lr"] == TINY["lr"]
    bounded = quiet_trainer(max_steps=10)
    bounded.fit(ImageClassifier(**TINY), loader, loader)
    assert bounded.optimizers[0].param_groups[0]["lr"] == pytest.approx(0)


def test_the_same_seed_gives_the_same_weights():
    first, second = (fit(ImageClassifier(**TINY, mixup=0.2))[1] for _ in range(2))
    # Both were built under different random states, so only the runs from equal starts are compared.
    second.load_state_dict(first.state_dict())
    assert torch.equal(weights(fit(first)[1]), weights(fit(second)[1]))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision):
    trainer, model = fit(precision=precision, max_epochs=20)
    assert trainer.callback_metrics["val_acc"] > 0.8
    images, targets = next(iter(Shapes().val_dataloader()))
    alone = ImageClassifier(**TINY).bfloat16().eval()
    assert alone.validation_step((images.bfloat16(), targets)).dtype == torch.float32  # bf16 has three digits
    assert model.model.head.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, tracing a log call
def test_gradient_clipping_and_compiling():
    seed_everything(0, verbose=False)
    model = ImageClassifier(**TINY)
    twin = ImageClassifier(**TINY)
    twin.load_state_dict(model.state_dict())
    short = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "gradient_clip_val": 0.1}
    fit(model, **short)
    seed_everything(0, verbose=False)
    quiet_trainer(**short).fit(torch.compile(twin, backend="eager"), datamodule=Shapes())
    torch.testing.assert_close(weights(model), weights(twin))
    assert not any("_orig_mod" in name for name in twin.state_dict())


def _fit_on_a_rank():
    trainer, model = fit(devices=2, strategy="ddp", max_epochs=2)
    results = trainer.test(model, datamodule=Shapes(), verbose=False)
    return weights(model).tolist(), trainer.callback_metrics["test_acc"].item(), results[1], trainer.global_step


def test_two_ranks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises a single device for tests
        (mine, accuracy, dark, steps), (other, *rest) = run_on_two_ranks(_fit_on_a_rank)
    assert mine == other
    assert steps == 6
    assert rest[0] == accuracy
    assert rest[1] == dark
    assert dark.keys() == {"test_acc/dark", "test_loss/dark"}


def test_checkpoints_need_nothing_but_their_file(tmp_path):
    _, model = fit()
    start = tmp_path / "start.pt"
    torch.save(model.model.state_dict(), start)
    tuned = ImageClassifier(**{**TINY, "checkpoint_path": str(start), "mixup": 0.1})
    assert torch.equal(weights(tuned), weights(model))
    logger = CSVLogger(tmp_path)
    saver = ModelCheckpoint(tmp_path / "checkpoints")
    fit(tuned, logger=logger, callbacks=[saver], enable_checkpointing=True)
    start.unlink()
    stored = torch.load(saver.best_model_path, weights_only=True)["hyper_parameters"]
    assert stored["checkpoint_path"] is None
    assert {"lr": 5e-3, "mixup": 0.1, "model_args": TINY["model_args"]}.items() <= stored.items()
    back = ImageClassifier.load_from_checkpoint(saver.best_model_path)
    assert torch.equal(weights(back), weights(tuned))
    changed = ImageClassifier.load_from_checkpoint(saver.best_model_path, lr=1e-4)
    assert changed.hparams.lr == 1e-4
    logged = yaml.full_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert logged["checkpoint_path"] == str(start)  # the log says where it started


def test_a_head_for_other_classes_can_be_started_anew(tmp_path):
    _, model = fit()
    path = tmp_path / "start.ckpt"
    torch.save(model.state_dict(), path)
    with pytest.raises(UnsupportedSetup, match="reset_head=True"):
        ImageClassifier(**{**TINY, "num_classes": 4, "checkpoint_path": str(path)})
    other = ImageClassifier(**{**TINY, "num_classes": 4, "checkpoint_path": str(path), "reset_head": True})
    assert torch.equal(other.model.blocks[1].mlp.fc1.weight, model.model.blocks[1].mlp.fc1.weight)


def test_data_with_more_classes_than_the_head_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(Shapes, "num_classes", 5, raising=False)
    with pytest.raises(UnsupportedSetup, match=r"The data has 5 classes, the head of the model 3. Set num_classes=5"):
        fit()
    monkeypatch.setattr(Shapes, "num_classes", 2)
    fit(max_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_name": "vit_base_pach16_224"}, r"Closest names: vit_base_patch16_224,"),
        ({"model_name": "resnet18", "img_size": 64, "model_args": None}, r"could not build resnet18 .*'img_size'"),
        ({"model_args": {"depht": 3}}, r"'depht'.*Check img_size"),
        ({"pretrained": True, "checkpoint_path": "x.pt"}, r"both say where to start"),
        ({"num_classes": 1}, r"num_classes=1"),
        ({"lr": 0.0}, r"lr=0"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\)"),
        ({"warmup": 1.5}, r"warmup=1\.5: expected a number of steps"),
        ({"warmup": -1}, r"warmup=-1"),
        ({"layer_decay": 0.0}, r"layer_decay=0\.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0"),
        ({"mixup": -0.1}, r"mixup=-0\.1"),
        ({"lr": math.nan}, r"lr=nan"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        ImageClassifier(**{**TINY, **options})


def test_options_reach_the_timm_model():
    model = ImageClassifier(**{**TINY, "drop_rate": 0.3, "drop_path_rate": 0.2}).model
    assert model.head_drop.p == 0.3
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    kept = ImageClassifier(**{**TINY, "model_args": {**TINY["model_args"], "drop_rate": 0.4}}).model
    assert kept.head_drop.p == 0.4
    cnn = ImageClassifier("resnet18", num_classes=4)
    assert cnn(torch.rand(2, 3, 32, 32)).shape == (2, 4)


CONFIGS = Path(__file__).parents[2] / "configs"
SMALL_MODEL = {
    "model_name": "vit_tiny_patch16_224",
    "pretrained": False,
    "img_size": 16,
    "model_args": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
}
SMALL_TRAINER = {
    "accelerator": "cpu", "max_epochs": 1, "precision": "32-true", "enable_progress_bar": False,
    "enable_model_summary": False, "logger": False, "log_every_n_steps": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ["image_classifier", "torchvision"])
def test_configs_run_and_run_again_as_saved(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "image_classifier":
        for seed, part in enumerate(("train", "val", "test")):
            write_folders(Path("images") / part, ["cat", "dog"], seed=seed)
        own = {"root": "images"}
    else:
        write_mnist(Path("data"))
        own = {"name": "MNIST", "download": False}
    smaller = {
        "trainer": {**SMALL_TRAINER, "default_root_dir": "first"},
        "model": {"init_args": {**SMALL_MODEL, "num_classes": 2 if name == "image_classifier" else 10}},
        "data": {"init_args": {**own, "model_name": "vit_tiny_patch16_224", "img_size": 16, "num_workers": 0}},
    }
    Path("smaller.yaml").write_text(yaml.safe_dump(smaller))
    first = SoupCLI(["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--config", "smaller.yaml"])
    assert first.trainer.global_step > 0
    again = SoupCLI(["fit", "--config", "first/config.yaml", "--trainer.default_root_dir=second"])
    assert torch.equal(weights(first.model), weights(again.model))
    assert again.datamodule.augmentation == first.datamodule.augmentation
    assert again.datamodule.augmentation.scale == (0.5, 1.0)


@pytest.mark.parametrize("augment", ["none", "strong", "{degrees: 5, translate: 1, scale: 0.1}"])
def test_handwriting_from_the_command_line(augment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [f"--model.{key}={value}" for key, value in {**SMALL_MODEL, "img_size": 28, "in_chans": 1}.items()]
    flags += [f"--trainer.{key}={value}" for key, value in SMALL_TRAINER.items()]
    data = ["--data=HandwritingDataModule", f"--data.augment={augment}", "--data.train_size=10", "--data.val_size=10"]
    first = SoupCLI(["fit", "--model=ImageClassifier", *flags, *data, "--model.warmup=2"])
    assert first.model.hparams.warmup == 2
    assert isinstance(first.model.hparams.warmup, int)
    again = SoupCLI(["fit", "--config=config.yaml"])
    assert again.datamodule.augment == first.datamodule.augment
    assert torch.equal(weights(first.model), weights(again.model))


def test_a_barebones_trainer_has_nothing_to_log():
    model = ImageClassifier(**TINY)
    trainer = Trainer(barebones=True, accelerator="cpu", devices=1, max_epochs=1)
    trainer.fit(model, Shapes().train_dataloader(), Shapes().val_dataloader())
    assert trainer.global_step == 6


def test_a_new_head_is_the_same_in_runs_that_are_seeded_apart(tmp_path):
    start = ImageClassifier(**TINY)
    save_weights(start, tmp_path / "start.safetensors")
    other = {**TINY, "num_classes": TINY["num_classes"] + 2, "checkpoint_path": str(tmp_path / "start.safetensors")}
    heads, streams = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(1)
        torch.manual_seed(seed)
        heads.append(ImageClassifier(**other, reset_head=True).model.get_classifier().weight)
        streams.append(torch.rand(1) == expected)
    assert torch.equal(*heads)
    assert all(streams)
    assert not torch.equal(
        heads[0], ImageClassifier(**other, reset_head=True, head_seed=1).model.get_classifier().weight
    )


def test_training_from_nothing_follows_the_seed_of_the_run():
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(ImageClassifier(**TINY).model.get_classifier().weight)
    assert not torch.equal(*heads)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_model_at_another_size(dynamic):
    torch.manual_seed(0)
    model = ImageClassifier(**{**TINY, "model_args": {**TINY["model_args"], "dynamic_img_size": dynamic}}).eval()
    own, before = model.model, {name: value.clone() for name, value in model.state_dict().items()}
    changed = model.model_at_size((12, 16))
    assert (changed is own) == dynamic  # which takes any size as it is
    built = ImageClassifier(**{**TINY, "img_size": (12, 16)}).eval().model
    state = {name.removeprefix("model."): value for name, value in before.items()}
    state["pos_embed"] = resample_abs_pos_embed(own.pos_embed, (3, 4), (2, 2), num_prefix_tokens=1)
    built.load_state_dict(state)
    images = torch.rand(2, 1, 12, 16)
    torch.testing.assert_close(changed(images), built(images))
    assert model.model is own
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.model_at_size((8, 8)) is own
